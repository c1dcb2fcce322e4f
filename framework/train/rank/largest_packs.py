"""The worst packs that a recipe admits, tried before step 0: memory should run out then or never.

Two packs are made, by the functions that make real ones: one with the longest clip, since attention
and codec feel length most, and one of the most clips; both are filled with video and text as far as
the recipe lets them. No storage is read. Trying them changes weights and moments, so that the
caller begins anew afterwards: load a checkpoint, or build the engine again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from framework.batch import PackedBatch, ReadStats
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import ClipPlan, PackPlan, unread_clip
from framework.data.plan.views import View, num_kept
from framework.data.stream.collate import (
    ClipRead,
    ClipReader,
    LatentReader,
    VideoReader,
    assemble,
)
from framework.objectives.objective import Objective
from framework.train.engine.protocol import Engine
from framework.train.observers.meters.memory import memory_limit_gib, memory_stats

# What torch, cuBLAS, cuDNN and NCCL say where it is not an OutOfMemoryError.
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",
)


class _Size(NamedTuple):
    """A size that a clip of the plan may have."""

    tokens: int  # those that are kept, where tokens are dropped
    view: View


@dataclass(frozen=True)
class _BlankReader(ClipReader):
    """Clips of zeros with the empty caption's tokens over and over; nothing is read."""

    null_text: np.ndarray

    def read(self, clips: Sequence[ClipPlan]) -> Iterator[ClipRead]:
        for clip in clips:
            tokens = np.zeros((int(np.prod(clip.grid)), self.token_size), np.float32)
            yield ClipRead(tokens, self.empty_text(clip), "", ReadStats())

    def empty_text(self, clip: ClipPlan) -> np.ndarray:
        return np.resize(self.null_text, (clip.text_tokens, *self.null_text.shape[1:]))

    @property
    def text_token_bytes(self) -> int:
        return self.null_text[0].nbytes

    def _tokens(self, clip: ClipPlan, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("nothing is read")

    def _frames(self, clip: ClipPlan, data: bytes) -> np.ndarray:
        raise AssertionError("nothing is read")


def largest_packs(
    recipe: Recipe,
    reader: ClipReader,
    max_clip_text: int | None = None,
    static_shapes: bool = True,
) -> list[PackedBatch]:
    """Two packs at the recipe's limits, on the CPU: with the longest clip, and of the most clips.

    reader: the run's own, which knows the size of a token and the empty caption. max_clip_text: the
    most text tokens of one clip; None: as many as a pack's. static_shapes: as `assemble` has it.
    Clips of one grid only where the recipe's policy is "bucketed". With masked training each pack
    is the worst over all phases.
    """
    null_text = _null_text(reader)
    longest_text = min(max_clip_text or recipe.max_text_tokens, recipe.max_text_tokens)
    shortest_text = min(len(null_text), longest_text)
    most_clips = min(recipe.max_clips, recipe.max_text_tokens // shortest_text)
    phases = [_sizes(recipe, rate) for _, rate in recipe.keep]
    longest = [_fill(sizes, recipe, 1, most_clips) for sizes in phases]
    many = [_fill(sizes, recipe, most_clips, most_clips) for sizes in phases]
    chosen = (max(longest, key=partial(_cost, recipe)), max(many, key=len))
    blank = _BlankReader(reader.shards, reader.token_size, frozenset(), null_text)
    packs = []
    for index, sizes in enumerate(chosen):
        texts = _share_out(recipe.max_text_tokens, len(sizes), shortest_text, longest_text)
        clips = [_clip(recipe, i, *one) for i, one in enumerate(zip(sizes, texts, strict=True))]
        packs.append(assemble(PackPlan(tuple(clips), index), blank, recipe, static_shapes))
    return packs


def try_packs(
    engine: Engine,
    objective: Objective,
    packs: Sequence[PackedBatch],
    device: torch.device,
    *,
    packs_per_step: int = 1,
) -> None:
    """A whole optimizer step on each pack; every rank calls it with the same packs.

    packs_per_step: a rank's packs in a real step: above 1, each pack comes twice in its step, since
    the second meets the gradient of the first. ValueError where memory runs out; then the engine
    is of no use any more, and the other ranks wait in vain: let the error end the rank.
    """
    for pack in packs:
        try:
            for _ in range(min(packs_per_step, 2)):
                batch, draw = pack.to(device), objective.draw(pack, seed=0, step=0).to(device)
                loss = objective.loss(engine.model, batch, draw).by_clip.sum() / len(batch.tokens)
                engine.backward(loss)
                del batch, draw, loss
            engine.step()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            peak, limit = memory_stats(device)["memory/peak_gib"], memory_limit_gib(device)
            raise ValueError(
                f"memory runs out on a pack that the recipe admits: {describe(pack)}; peak "
                f"{peak:.1f} of {limit:.1f} GiB on {device}. Lower data.max_tokens, set "
                "train.activation_checkpointing.mode=full, keep the optimizer's state on the CPU "
                f"(engine.offload), or use more ranks (cluster.num_workers). {_first_line(error)}"
            ) from error


def try_longest_view(recipe: Recipe, reader: VideoReader) -> None:
    """Encode a black clip of the longest view.

    Call it where the stream's tasks run, which may be other machines than the ranks'. ValueError
    where memory runs out; on a CPU the kernel may end the process instead.
    """
    view = longest_view(recipe)
    frames = np.zeros((view.num_frames, view.height, view.width, 3), np.uint8)
    try:
        tokens = reader.tokenize(frames)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise codec_too_large(view, error) from error
    wanted = (_num_tokens(recipe, view), reader.token_size)
    assert tokens.shape == wanted, (tokens.shape, wanted)


def longest_view(recipe: Recipe) -> View:
    """The view of the most pixels that a clip may have."""
    views = [size.view for _, rate in recipe.keep for size in _sizes(recipe, rate)]
    return max(views, key=lambda view: view.num_frames * view.height * view.width)


def codec_too_large(view: View, error: BaseException) -> ValueError:
    """That the codec has no memory for a view, and what to change."""
    return ValueError(
        f"memory runs out when the codec encodes {view.num_frames} frames of "
        f"{view.height}x{view.width}; take smaller data.views.frames or data.views.sizes, or "
        f"encode ahead (python -m framework.data.encode). {_first_line(error)}"
    )


def describe(pack: PackedBatch) -> str:
    """Clips, tokens and text of a pack, in words."""
    lengths = pack.cu_seqlens.diff()[pack.clip_ids >= 0]
    text = int(pack.cu_text.diff()[pack.clip_ids >= 0].sum())
    return (
        f"{len(lengths)} clip(s) of up to {int(lengths.max()):,} video tokens, "
        f"{len(pack.tokens):,} video and {text:,} text tokens in all"
    )


def _null_text(reader: ClipReader) -> np.ndarray:
    if isinstance(reader, LatentReader):
        return reader.null_text
    assert isinstance(reader, VideoReader), type(reader)
    return reader.encode_text("")


def _sizes(recipe: Recipe, rate: float) -> list[_Size]:
    """The sizes that clips of an epoch at this rate of kept tokens may have, the smallest first."""
    views = [View(0, 1, t, *size) for t in recipe.views.lengths for size in recipe.views.sizes]
    tokens = [_num_tokens(recipe, view) for view in views]
    kept = num_kept(np.array(tokens), rate).tolist()
    sizes = [_Size(n, v) for n, v in zip(kept, views, strict=True) if n <= recipe.max_tokens]
    return sorted(sizes, key=lambda size: size.tokens)


def _fill(sizes: list[_Size], recipe: Recipe, fewest: int, most: int) -> list[_Size]:
    """The largest clips that fit, one after the other, with room left for `fewest` clips in all.

    Or as many as fit, where the budget does not hold so many.
    """
    if recipe.policy == "bucketed":
        sizes = sizes[-1:] if fewest == 1 else sizes[:1]
    smallest, room = sizes[0].tokens, recipe.max_tokens
    fewest = min(fewest, room // smallest)
    pack: list[_Size] = []
    while len(pack) < most and smallest <= room:
        reserved = max(fewest - len(pack) - 1, 0) * smallest
        pack.append([size for size in sizes if size.tokens <= room - reserved][-1])
        room -= pack[-1].tokens
    return pack


def _cost(recipe: Recipe, pack: list[_Size]) -> int:
    return int(recipe.cost.clip_costs(np.array([size.tokens for size in pack])).sum())


def _num_tokens(recipe: Recipe, view: View) -> int:
    return recipe.geometry.num_tokens(view.num_frames, view.height, view.width)


def _share_out(total: int, count: int, least: int, most: int) -> list[int]:
    """`count` numbers between `least` and `most`, the first ones as large as `total` allows."""
    shares = [least] * count
    for i in range(count):
        shares[i] += min(most - least, total - sum(shares))
    return shares


def _clip(recipe: Recipe, number: int, size: _Size, text_tokens: int) -> ClipPlan:
    return unread_clip(
        recipe,
        size.view,
        text_tokens,
        clip_id=number,
        key=f"largest-{number}",
        tokens=size.tokens,
        source_id=0,
        weight=1.0,
        dummy=False,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return named or any(words in str(error) for words in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
