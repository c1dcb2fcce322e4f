"""Clips of a plan to a PackedBatch: fetch, decode, tokenize, pack. Runs wherever it is called.

A clip that is damaged or gone keeps its place with weight zero and is named, so that shapes,
positions and the plan's counts hold. A store that does not answer is no fault of a clip: its error
goes on, or an outage would train on nothing.
"""

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from framework.batch import Clip, PackedBatch, ReadStats
from framework.data.encode.latents import load_clip
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import ClipPlan, PackPlan
from framework.data.plan.views import View, kept_tokens
from framework.data.shards.fetch import fetch
from framework.storage import Store
from framework.video import VideoError, decode


class ClipRead(NamedTuple):
    """What came of one clip."""

    tokens: np.ndarray  # (n, P) float32, all of its grid; zeros where there is a cause
    text: np.ndarray  # (k,) ids, or (k, D) embeddings
    cause: str  # why it could not be read, or ""
    stats: ReadStats


def decode_view(data: bytes, checksum: int, checked_bytes: int, view: View) -> np.ndarray:
    """The frames of a clip's view, uint8 (T, H, W, 3); VideoError."""
    if zlib.crc32(memoryview(data)[:checked_bytes]) != checksum:
        raise VideoError("its bytes have changed since the manifest was made (checksum)")
    return decode(data, view.frames, view.height, view.width, view.flip)


@dataclass(frozen=True)
class ClipReader(ABC):
    """Read the clips of a plan as tokens; picklable, so that it travels into Ray tasks."""

    shards: Store
    token_size: int  # P
    exclude: frozenset[int]  # ids of clips that leave a hole in their packs

    @abstractmethod
    def empty_text(self, clip: ClipPlan) -> np.ndarray:
        """The text tokens of a clip that is not read."""

    @abstractmethod
    def _tokens(self, clip: ClipPlan, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and text of the clip with these bytes; VideoError."""

    @abstractmethod
    def _frames(self, clip: ClipPlan, data: bytes) -> np.ndarray:
        """What `_tokens` makes tokens of, for people."""

    @property
    @abstractmethod
    def text_token_bytes(self) -> int:
        """Bytes of one text token."""

    def seen_id(self, clip: ClipPlan) -> int:
        """The clip's id in a batch: -1 for one that is taken out."""
        return -1 if clip.clip_id in self.exclude else clip.clip_id

    def frames(self, clip: ClipPlan) -> np.ndarray:
        """The frames of the clip's view, uint8 (T, H, W, 3); VideoError, EOFError or OSError."""
        (payload,) = fetch(self.shards, [clip])
        if not isinstance(payload, bytes):
            raise payload
        return self._frames(clip, payload)

    def read(self, clips: Sequence[ClipPlan]) -> Iterator[ClipRead]:
        """Each clip's tokens; or zeros and the cause, where it is damaged or gone.

        OSError where the store fails for another cause: access denied, time-outs after retries.
        """
        wanted = [clip for clip in clips if self.seen_id(clip) >= 0]
        payloads = fetch(self.shards, wanted)
        for clip in clips:
            tokens = zeros = np.zeros((prod(clip.grid), self.token_size), np.float32)
            if self.seen_id(clip) < 0:
                yield ClipRead(zeros, self.empty_text(clip), "", ReadStats())
                continue
            began = time.perf_counter()
            payload = next(payloads)
            fetched = time.perf_counter()
            cause = ""
            try:
                if not isinstance(payload, bytes):
                    raise payload
                tokens, text = self._tokens(clip, payload)
                assert tokens.shape == zeros.shape, (clip.key, tokens.shape, zeros.shape)
            except (VideoError, EOFError, FileNotFoundError) as error:
                cause, text = str(error), self.empty_text(clip)
            decode_s = time.perf_counter() - fetched
            stats = ReadStats(1, clip.size_bytes, fetched - began, decode_s)
            yield ClipRead(tokens, text, cause, stats)


@dataclass(frozen=True)
class VideoReader(ClipReader):
    """Decodes videos and stills, and encodes them.

    tokenize: uint8 (T, H, W, 3) -> float32 (n, P). encode_text: caption -> (k,) ids or (k, D).
    """

    tokenize: Callable[[np.ndarray], np.ndarray]
    encode_text: Callable[[str], np.ndarray]

    def empty_text(self, clip: ClipPlan) -> np.ndarray:
        """Its caption's all the same."""
        return self.encode_text(clip.caption)

    @property
    def text_token_bytes(self) -> int:
        """Of the empty caption's first token."""
        return self.encode_text("")[0].nbytes

    def _frames(self, clip: ClipPlan, data: bytes) -> np.ndarray:
        return decode_view(data, clip.checksum, clip.checked_bytes, clip.view)

    def _tokens(self, clip: ClipPlan, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenize(self._frames(clip, data)), self.encode_text(clip.caption)


@dataclass(frozen=True)
class LatentReader(ClipReader):
    """Reads clips that were encoded ahead, and takes nothing for granted of what is in them.

    patch_size: latents (time, height, width) in a token. patchify: latents (C, F, h, w) -> float32
    (n, P). decode: latents, number of frames -> uint8 (T, H, W, 3). null_text: text tokens of the
    empty caption. vocab_size: where text comes as ids, they are below it.
    """

    patch_size: tuple[int, int, int]
    patchify: Callable[[torch.Tensor], np.ndarray]
    decode: Callable[[torch.Tensor, int], np.ndarray]
    null_text: np.ndarray
    vocab_size: int | None

    def __post_init__(self) -> None:
        if not len(self.null_text):
            raise ValueError(f"{self.shards.url}: its empty caption has no text token")
        self._check_values(torch.from_numpy(self.null_text))

    def empty_text(self, clip: ClipPlan) -> np.ndarray:
        """As many tokens as the plan has; they meet no video token that counts."""
        return np.resize(self.null_text, (clip.text_tokens, *self.null_text.shape[1:]))

    @property
    def text_token_bytes(self) -> int:
        """Of the empty caption's first token."""
        return self.null_text[0].nbytes

    def _load(self, clip: ClipPlan, data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        if zlib.crc32(data) != clip.checksum:
            raise VideoError("its latents have changed since the manifest was made (checksum)")
        try:
            latents, text = load_clip(data, clip.caption)
            self._check(clip, latents, text)
        except ValueError as error:
            raise VideoError(str(error)) from error
        return latents, text

    def _check(self, clip: ClipPlan, latents: torch.Tensor, text: torch.Tensor) -> None:
        """ValueError where a clip holds something else than the plan, codec and encoder say."""
        sizes = tuple(n * p for n, p in zip(clip.grid, self.patch_size, strict=True))
        shape = (self.token_size // prod(self.patch_size), *sizes)
        if latents.shape != shape:
            raise ValueError(f"its latents are {tuple(latents.shape)}; the plan has {shape}")
        if not latents.isfinite().all():
            raise ValueError("its latents are not all finite")
        null_text = torch.from_numpy(self.null_text)
        shape = (clip.text_tokens, *null_text.shape[1:])
        if text.shape != shape or text.dtype != null_text.dtype:
            found = f"{text.dtype} {tuple(text.shape)}"
            raise ValueError(f"its text is {found}; the plan has {null_text.dtype} {shape}")
        self._check_values(text)

    def _check_values(self, text: torch.Tensor) -> None:
        if self.vocab_size is None:
            if not text.isfinite().all():
                raise ValueError("its text is not all finite")
        elif not ((text >= 0) & (text < self.vocab_size)).all():
            raise ValueError(f"its text has ids that are not in 0 to {self.vocab_size - 1}")

    def _frames(self, clip: ClipPlan, data: bytes) -> np.ndarray:
        return self.decode(self._load(clip, data)[0], clip.view.num_frames)

    def _tokens(self, clip: ClipPlan, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        latents, text = self._load(clip, data)
        return self.patchify(latents), text.numpy()


def assemble(
    pack: PackPlan,
    reader: ClipReader,
    recipe: Recipe,
    static_shapes: bool = True,
    *,
    epoch: int = 0,
    epoch_step: int = 0,
) -> PackedBatch:
    """The clips of a plan's pack, read and packed.

    With `static_shapes` L and K are the recipe's budgets, the padding segment taking the rest;
    without, they are what the clips fill: no work on padding, where nothing is compiled.
    """
    clips, failed, stats = [], [], ReadStats()
    for clip, read in zip(pack.clips, reader.read(pack.clips), strict=True):
        clips.append(_kept(clip, read, reader.seen_id(clip), recipe.seed))
        stats += read.stats
        if read.cause:
            failed.append(f"{clip.key}: {read.cause}")
    num_tokens, num_text = sum(len(c.tokens) for c in clips), sum(len(c.text) for c in clips)
    assert num_tokens <= recipe.max_tokens, (pack, recipe.max_tokens)
    assert num_text <= recipe.max_text_tokens, (pack, recipe.max_text_tokens)
    batch = PackedBatch.from_clips(
        clips,
        num_segments=recipe.max_clips + 1,
        max_tokens=recipe.max_tokens if static_shapes else None,
        max_text_tokens=recipe.max_text_tokens if static_shapes else None,
    )
    return replace(
        batch,
        epoch=epoch,
        epoch_step=epoch_step,
        pack=pack.index,
        failed=tuple(failed),
        read=stats,
    )


def _kept(clip: ClipPlan, read: ClipRead, seen_id: int, seed: int) -> Clip:
    """What was read of a clip, without the tokens that its epoch drops."""
    tokens = torch.from_numpy(read.tokens)
    index = torch.from_numpy(kept_tokens(seed, clip.epoch, clip.clip_id, len(tokens), clip.tokens))
    return Clip(
        tokens=tokens if len(index) == len(tokens) else tokens[index],
        grid=clip.grid,
        text=torch.from_numpy(read.text),
        clip_id=seen_id,
        fps=clip.fps,
        epoch=clip.epoch,
        weight=0.0 if read.cause or seen_id < 0 else clip.weight,
        source=clip.source_id,
        index=index,
    )
