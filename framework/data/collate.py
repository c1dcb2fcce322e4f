"""Clips of a plan to a PackedBatch: fetch, decode, tokenize, pack. Runs wherever it is called.

A clip that is damaged or gone keeps its place with weight zero and is named, so that shapes,
positions and the plan's counts hold. A store that does not answer is no fault of a clip: its error
goes on, or an outage would train on nothing.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from framework.batch import PackedBatch, ReadStats
from framework.data.fetch import fetch
from framework.data.plan import ClipPlan, PackPlan, Recipe
from framework.storage import Store
from framework.video import VideoError, decode

Arrays = dict[str, Any]


class ClipRead(NamedTuple):
    """What came of one clip."""

    tokens: np.ndarray  # (n, P) float32; zeros where there is a cause
    cause: str  # why it could not be read, or ""
    stats: ReadStats


@dataclass(frozen=True)
class ClipReader:
    """Read one clip of a plan as tokens; picklable, so that it travels into Ray tasks.

    tokenize: uint8 (T, H, W, 3) -> float32 (n, P). encode_text: caption -> (k,) ids or (k, D).
    """

    shards: Store
    tokenize: Callable[[np.ndarray], np.ndarray]
    encode_text: Callable[[str], np.ndarray]
    token_size: int  # P
    exclude: frozenset[int] = frozenset()  # ids of clips that leave a hole in their packs

    def seen_id(self, clip: ClipPlan) -> int:
        """The clip's id in a batch: -1 for one that is taken out."""
        return -1 if clip.clip_id in self.exclude else clip.clip_id

    def frames(self, clip: ClipPlan, data: bytes | None = None) -> np.ndarray:
        """The frames of the clip's view, uint8 (T, H, W, 3); VideoError, EOFError or OSError.

        data: the clip's bytes, where they are at hand.
        """
        if data is None:
            data = self.shards.read_range(clip.shard, clip.offset, clip.size_bytes)
        if zlib.crc32(data) != clip.checksum:
            raise VideoError("its bytes have changed since the manifest was made (checksum)")
        view = clip.view
        return decode(data, view.frames, view.height, view.width, view.flip)

    def read(self, clips: Sequence[ClipPlan]) -> Iterator[ClipRead]:
        """Each clip's tokens; or zeros and the cause, where it is damaged or gone.

        OSError where the store fails for another cause: access denied, time-outs after retries.
        """
        wanted = [clip for clip in clips if self.seen_id(clip) >= 0]
        payloads = fetch(self.shards, wanted)
        for clip in clips:
            zeros = np.zeros((clip.tokens, self.token_size), np.float32)
            if self.seen_id(clip) < 0:
                yield ClipRead(zeros, "", ReadStats())
                continue
            began = time.perf_counter()
            payload = next(payloads)
            fetched = time.perf_counter()
            tokens, cause = zeros, ""
            try:
                if not isinstance(payload, bytes):
                    raise payload
                tokens = self.tokenize(self.frames(clip, payload))
                assert tokens.shape == zeros.shape, (clip.key, tokens.shape, zeros.shape)
            except (VideoError, EOFError, FileNotFoundError) as error:
                cause = str(error)
            decode_s = time.perf_counter() - fetched
            yield ClipRead(tokens, cause, ReadStats(1, clip.size_bytes, fetched - began, decode_s))


def assemble(
    pack: PackPlan, reader: ClipReader, recipe: Recipe, static_shapes: bool = True
) -> Arrays:
    """One pack as arrays, named as the fields of PackedBatch.

    With `static_shapes` L and K are the recipe's budgets, the padding segment taking the rest;
    without, they are what the clips fill: no work on padding, where nothing is compiled.
    """
    num_segments = recipe.max_clips + 1
    count = len(pack.clips)
    tokens_by_clip, texts, failed = [], [], []
    lengths, text_lengths = np.zeros(num_segments, np.int64), np.zeros(num_segments, np.int64)
    weights, ids = np.zeros(num_segments, np.float32), np.full(num_segments, -1, np.int64)
    start = 0
    stats = ReadStats()
    for i, (clip, (clip_tokens, cause, clip_stats)) in enumerate(
        zip(pack.clips, reader.read(pack.clips), strict=True)
    ):
        tokens_by_clip.append(clip_tokens)
        stats += clip_stats
        start += clip.tokens
        texts.append(reader.encode_text(clip.caption))
        lengths[i], text_lengths[i] = clip.tokens, len(texts[-1])
        ids[i] = reader.seen_id(clip)
        weights[i] = 0.0 if cause or ids[i] < 0 else clip.weight
        if cause:
            failed.append(f"{clip.key}: {cause}")
    joined = np.concatenate(texts)
    assert start <= recipe.max_tokens, (pack, recipe.max_tokens)
    assert len(joined) <= recipe.max_text_tokens, (pack, recipe.max_text_tokens)
    if static_shapes:
        lengths[-1] = recipe.max_tokens - start
        text_lengths[-1] = recipe.max_text_tokens - len(joined)
    tokens = _resized(np.concatenate(tokens_by_clip), int(lengths.sum()))
    text = _resized(joined, int(text_lengths.sum()))

    def by_clip(name: str, dtype: type, fill: float) -> np.ndarray:
        values: np.ndarray = np.full(num_segments, fill, dtype)
        values[:count] = [getattr(clip, name) for clip in pack.clips]
        return values

    grid = np.zeros((num_segments, 3), np.int32)
    grid[:count] = [clip.grid for clip in pack.clips]
    grid[-1] = (1, 1, lengths[-1])  # positions of the padding segment are of no account
    return {
        "tokens": tokens,
        "grid": grid,
        "cu_seqlens": np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        "text": text,
        "cu_text": np.concatenate([[0], text_lengths.cumsum()]).astype(np.int32),
        "clip_ids": ids,
        "clip_epochs": by_clip("epoch", np.int64, 0),
        "clip_weights": weights,
        "source": by_clip("source_id", np.int32, -1),
        "fps": by_clip("fps", np.float32, 0.0),
        "given_mask": np.zeros(len(tokens), bool),
        "failed": json.dumps(failed),
        "read": json.dumps(astuple(stats)),
    }


def _resized(rows: np.ndarray, length: int) -> np.ndarray:
    """(n, …) -> (length, …) with zero rows at the end."""
    padded = np.zeros((length, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def to_batch(arrays: Arrays, epoch: int, step: int, pack: int) -> PackedBatch:
    """Arrays from `assemble` as a PackedBatch; copies, since Ray's arrays are read-only."""
    tensors = {
        name: torch.tensor(value) for name, value in arrays.items() if isinstance(value, np.ndarray)
    }
    failed = tuple(json.loads(str(arrays["failed"])))
    read = ReadStats(*json.loads(str(arrays["read"])))
    return PackedBatch(**tensors, epoch=epoch, step=step, pack=pack, failed=failed, read=read)
