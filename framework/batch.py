"""`PackedBatch`: the one thing that data hands to training.

Shapes: B segments, L video tokens, K text tokens, P values in one patch, D text width. A pack holds
clips of any duration and size end to end. Its shapes are static: the recipe's `max_clips`,
`max_tokens` and `max_text_tokens` give B = max_clips + 1, L and K. Clips come first; segments
without a clip are empty, and the last segment, the padding segment, holds whatever is left over of
L and of K. A segment without a clip has clip_id -1 and weight 0.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The tensors of PackedBatch by what their rows stand for. The others are `text`, with a row for
# each text token, and the offsets `cu_seqlens` and `cu_text`.
PER_TOKEN = ("tokens", "given_mask", "index")
PER_SEGMENT = ("grid", "clip_ids", "clip_epochs", "clip_weights", "source", "fps")

# A pack on its way through Ray Data: arrays and numbers by the names of the fields, and JSON.
Arrays = dict[str, Any]


@dataclass(frozen=True)
class ReadStats:
    """What it took to read clips; sums."""

    clips: int = 0
    size_bytes: int = 0
    fetch_s: float = 0.0  # waited for bytes, beside what was hidden behind decoding
    decode_s: float = 0.0  # decoding frames and making tokens of them

    def __add__(self, other: "ReadStats") -> "ReadStats":
        return ReadStats(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Clip:
    """One clip of a pack: n video tokens and k text tokens."""

    tokens: Tensor  # (n, P) float32
    grid: tuple[int, int, int]  # token rows in time, height, width; more than n where some drop out
    text: Tensor  # (k,) int64 ids, or (k, D) float embeddings
    clip_id: int
    fps: float
    epoch: int = 0
    weight: float = 1.0
    source: int = 0
    index: Tensor | None = None  # (n,): which tokens of the grid these are; None: the first n
    given: Tensor | None = None  # (n,) bool: tokens that are clean context; None: no token is

    @property
    def index_or_all(self) -> Tensor:
        """(n,) int32: `index`, or that of a clip none of whose tokens drops out."""
        if self.index is None:
            return torch.arange(len(self.tokens), dtype=torch.int32, device=self.tokens.device)
        return self.index.int()

    @property
    def given_or_none(self) -> Tensor:
        """(n,) bool: `given`, or that of a clip without context."""
        if self.given is None:
            return torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        return self.given


@dataclass(frozen=True)
class PackedBatch:
    """One pack of clips as tokens; it also is the `layout` that a network is handed.

    A clip of weight 0 (it failed to decode, or fills a dummy pack) keeps its place and bears no
    loss. `given_mask` marks tokens that are clean context: they bear no loss either.
    """

    tokens: Tensor  # (L, P) float32
    grid: Tensor  # (B, 3) int32: token rows in time, height, width
    cu_seqlens: Tensor  # (B+1,) int32
    text: Tensor  # (K,) int64 ids, or (K, D) float embeddings
    cu_text: Tensor  # (B+1,) int32
    clip_ids: Tensor  # (B,) int64
    clip_epochs: Tensor  # (B,) int64: how often the clip came before; all its draws hang on it
    clip_weights: Tensor  # (B,) float32
    source: Tensor  # (B,) int32
    fps: Tensor  # (B,) float32: frames a second that the model sees
    given_mask: Tensor  # (L,) bool
    index: Tensor | None = None  # (L,) int32: see `token_index`; None where no token is dropped
    epoch: int = 0
    epoch_step: int = 0  # counted from the epoch's first step
    pack: int = 0  # position of the pack in its step
    failed: tuple[str, ...] = ()  # keys of the clips that could not be decoded, with the cause
    read: ReadStats = ReadStats()

    @classmethod
    def from_clips(
        cls,
        clips: Sequence[Clip],
        *,
        num_segments: int | None = None,
        max_tokens: int | None = None,
        max_text_tokens: int | None = None,
    ) -> "PackedBatch":
        """Pack one or more clips end to end.

        num_segments: B, more than there are clips: the last one is the padding segment. None: every
        segment is a clip. max_tokens, max_text_tokens: L and K, to which the padding segment fills
        up with zeros. None: what the clips fill.
        """
        segments = list(clips)
        if num_segments is None:
            assert max_tokens is max_text_tokens is None, "padding is a segment: give num_segments"
        else:
            assert len(clips) < num_segments, (len(clips), num_segments)
            segments += [_without_clip(clips[0], 0, 0)] * (num_segments - len(clips) - 1)
            padding = _left_over(max_tokens, [len(clip.tokens) for clip in clips])
            text_padding = _left_over(max_text_tokens, [len(clip.text) for clip in clips])
            segments.append(_without_clip(clips[0], padding, text_padding, (1, 1, padding)))
        has_index = any(clip.index is not None for clip in clips)
        return cls(
            tokens=torch.cat([s.tokens for s in segments]),
            grid=torch.tensor([s.grid for s in segments], dtype=torch.int32),
            cu_seqlens=_offsets([len(s.tokens) for s in segments]),
            text=torch.cat([s.text for s in segments]),
            cu_text=_offsets([len(s.text) for s in segments]),
            clip_ids=torch.tensor([s.clip_id for s in segments]),
            clip_epochs=torch.tensor([s.epoch for s in segments]),
            clip_weights=torch.tensor([s.weight for s in segments], dtype=torch.float32),
            source=torch.tensor([s.source for s in segments], dtype=torch.int32),
            fps=torch.tensor([s.fps for s in segments], dtype=torch.float32),
            given_mask=torch.cat([s.given_or_none for s in segments]),
            index=torch.cat([s.index_or_all for s in segments]) if has_index else None,
        )

    def to_arrays(self) -> Arrays:
        """The pack for a journey through Ray Data, on the CPU; shares memory with the tensors."""
        arrays: Arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.index is None:
            del arrays["index"]
        tensors = {name: v.numpy() for name, v in arrays.items() if isinstance(v, Tensor)}
        words = {"failed": json.dumps(self.failed), "read": json.dumps(astuple(self.read))}
        return {**arrays, **tensors, **words}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "PackedBatch":
        """The reverse of `to_arrays`; copies, since Ray's arrays are read-only."""
        values: dict[str, Any] = {
            # five times as fast as torch.tensor
            name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else int(value)
            for name, value in arrays.items()
            if name not in ("failed", "read")
        }
        failed = tuple(json.loads(str(arrays["failed"])))
        read = ReadStats(*json.loads(str(arrays["read"])))
        return cls(**values, failed=failed, read=read)

    def twice(self, null_text: Tensor) -> "PackedBatch":
        """The pack and a copy of it whose text is the empty caption: 2L tokens, 2B segments.

        null_text: (k,) or (k, D). Segments without video tokens get no text in the copy.
        """
        lengths = self.cu_seqlens.diff()
        has_tokens = lengths > 0
        null_text = null_text.to(self.text)
        null_rows = null_text.repeat(int(has_tokens.sum()), *[1] * (null_text.ndim - 1))
        doubled: dict[str, Any] = {
            name: torch.cat([value, value])
            for name in (*PER_TOKEN, *PER_SEGMENT)
            if (value := getattr(self, name)) is not None
        }
        return replace(
            self,
            **doubled,
            cu_seqlens=_extended(self.cu_seqlens, lengths),
            text=torch.cat([self.text, null_rows]),
            cu_text=_extended(self.cu_text, len(null_text) * has_tokens),
        )

    @property
    def num_segments(self) -> int:
        """B, the padding segment included."""
        return self.clip_ids.shape[0]

    @property
    def segment_ids(self) -> Tensor:
        """(L,) int64: the segment of each token."""
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(
            torch.arange(self.num_segments, device=lengths.device),
            lengths,
            output_size=self.tokens.shape[0],
        )

    @property
    def token_index(self) -> Tensor:
        """(L,) int64: which token of its clip's grid, row-major in (time, height, width)."""
        if self.index is not None:
            return self.index.long()
        index = torch.arange(self.tokens.shape[0], device=self.cu_seqlens.device)
        return index - self.cu_seqlens.long()[self.segment_ids]

    @property
    def loss_mask(self) -> Tensor:
        """(L,) float32: the weight of each token in the loss; 0 for given and padding tokens."""
        return self.clip_weights[self.segment_ids] * ~self.given_mask

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same pack with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def _left_over(most: int | None, lengths: Sequence[int]) -> int:
    """What clips of these lengths leave of a static length; None: there is none."""
    left_over = 0 if most is None else most - sum(lengths)
    assert left_over >= 0, (most, lengths)
    return left_over


def _without_clip(
    like: Clip, num_tokens: int, num_text: int, grid: tuple[int, int, int] = (0, 0, 0)
) -> Clip:
    """A segment without a clip: zeros of the dtypes and widths of `like`.

    Positions are of no account in it, so that any grid will do.
    """
    tokens = like.tokens.new_zeros(num_tokens, *like.tokens.shape[1:])
    text = like.text.new_zeros(num_text, *like.text.shape[1:])
    return Clip(tokens, grid, text, clip_id=-1, fps=0.0, weight=0.0, source=-1)


def _offsets(lengths: Sequence[int]) -> Tensor:
    """n lengths -> (n+1,) int32 offsets."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _extended(offsets: Tensor, lengths: Tensor) -> Tensor:
    """Offsets (B+1,) followed by those of further segments of the given lengths (B,)."""
    return torch.cat([offsets, offsets[-1] + lengths.cumsum(0).to(offsets.dtype)])
