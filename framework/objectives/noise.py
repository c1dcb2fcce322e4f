"""What a diffusion objective draws for a pack: noise levels and noise, each clip's by itself.

Shapes: B segments, L video tokens, P values in one patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.seeding import draws


@dataclass(frozen=True)
class NoiseDraw:
    """The random numbers of one pack; drawn on the CPU."""

    t: Tensor  # (B,) float32 in [0, 1]; 0 where a segment holds no clip
    noise: Tensor  # (L, P) float32 standard normal; 0 where a segment holds no clip

    def to(self, device: torch.device | str) -> "NoiseDraw":
        """The same draw with its tensors on `device`."""
        return NoiseDraw(
            self.t.to(device, non_blocking=True), self.noise.to(device, non_blocking=True)
        )


def clip_noise(batch: PackedBatch, seed: int, epochs: Sequence[int], purpose: str) -> Tensor:
    """(L, P) float32 on the CPU: each clip's own noise in its rows, zeros elsewhere.

    A function of (seed, the clip's epoch in `epochs` (B,), its id, purpose).
    """
    num_values = batch.tokens.shape[1]
    noise = torch.zeros(batch.tokens.shape, dtype=torch.float32)
    bounds = batch.cu_seqlens.tolist()
    clips = zip(batch.clip_ids.tolist(), epochs, pairwise(bounds), strict=True)
    for clip_id, epoch, (start, end) in clips:
        if clip_id >= 0:
            values = draws(seed, epoch, clip_id, purpose).normal((end - start) * num_values)
            noise[start:end] = torch.from_numpy(values).view(-1, num_values)
    return noise
