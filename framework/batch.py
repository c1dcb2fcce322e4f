"""`PackedBatch`: the one thing that data hands to training.

Shapes: B segments, L video tokens, K text tokens, P values in one patch, D text width. A pack holds
clips of any duration and size end to end. Its shapes are static: the recipe's `max_clips`,
`max_tokens` and `max_text_tokens` give B = max_clips + 1, L and K. Clips come first; segments
without a clip are empty, and the last segment, the padding segment, holds whatever is left over of
L and of K. A segment without a clip has clip_id -1 and weight 0.
"""

import operator
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


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
class PackedBatch:
    """One pack of clips as tokens; it also is the `layout` that a Denoiser is handed.

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
    step: int = 0  # step within the epoch
    pack: int = 0  # position of the pack in its step
    failed: tuple[str, ...] = ()  # keys of the clips that could not be decoded, with the cause
    read: ReadStats = ReadStats()

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
