"""Clips of a plan to a PackedBatch: fetch, decode, tokenize, pack. Runs wherever it is called.

A clip that is damaged or gone keeps its place with weight zero and is named, so that shapes,
positions and the plan's counts hold. A store that does not answer is no fault of a clip: its error
goes on, or an outage would train on nothing.
"""

import json
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from framework.batch import PackedBatch, ReadStats
from framework.data.encode.latents import load_clip
from framework.data.plan.recipe import Recipe
from framework.data.plan.store import ClipPlan, PackPlan
from framework.data.plan.views import View, kept_tokens
from framework.data.shards.fetch import fetch
from framework.storage import Store
from framework.video import VideoError, decode

Arrays = dict[str, Any]


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
    """Reads clips that were encoded ahead.

    patchify: latents (C, F, h, w) -> float32 (n, P). decode: latents, number of frames -> uint8
    (T, H, W, 3). null_text: text tokens of the empty caption.
    """

    patchify: Callable[[torch.Tensor], np.ndarray]
    decode: Callable[[torch.Tensor, int], np.ndarray]
    null_text: np.ndarray

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
            return load_clip(data, clip.caption)
        except ValueError as error:
            raise VideoError(str(error)) from error

    def _frames(self, clip: ClipPlan, data: bytes) -> np.ndarray:
        return self.decode(self._load(clip, data)[0], clip.view.num_frames)

    def _tokens(self, clip: ClipPlan, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        latents, text = self._load(clip, data)
        return self.patchify(latents), text.numpy()


def assemble(
    pack: PackPlan, reader: ClipReader, recipe: Recipe, static_shapes: bool = True
) -> Arrays:
    """One pack as arrays, named as the fields of PackedBatch.

    With `static_shapes` L and K are the recipe's budgets, the padding segment taking the rest;
    without, they are what the clips fill: no work on padding, where nothing is compiled.
    """
    num_segments = recipe.max_clips + 1
    count = len(pack.clips)
    tokens_by_clip, texts, failed, index = [], [], [], []
    lengths, text_lengths = np.zeros(num_segments, np.int64), np.zeros(num_segments, np.int64)
    weights, ids = np.zeros(num_segments, np.float32), np.full(num_segments, -1, np.int64)
    start = 0
    stats = ReadStats()
    for i, (clip, (clip_tokens, text_tokens, cause, clip_stats)) in enumerate(
        zip(pack.clips, reader.read(pack.clips), strict=True)
    ):
        index.append(
            kept_tokens(recipe.seed, clip.epoch, clip.clip_id, len(clip_tokens), clip.tokens)
        )
        tokens_by_clip.append(clip_tokens[index[-1]])
        stats += clip_stats
        start += clip.tokens
        texts.append(text_tokens)
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
    index.append(np.arange(lengths[-1]))  # of the padding segment
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
        "index": np.concatenate(index).astype(np.int32),
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
        name: torch.from_numpy(value.copy())  # five times as fast as torch.tensor
        for name, value in arrays.items()
        if isinstance(value, np.ndarray)
    }
    failed = tuple(json.loads(str(arrays["failed"])))
    read = ReadStats(*json.loads(str(arrays["read"])))
    return PackedBatch(**tensors, epoch=epoch, step=step, pack=pack, failed=failed, read=read)
