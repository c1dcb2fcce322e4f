"""The contract between an objective, the training loop and the samplers.

An objective owns what a network's output means. Training asks it for the loss, sampling for
`denoised`; nothing else in Longtake knows whether a network predicts velocity, noise or data.

Shapes: B segments of a pack, L video tokens, P values in one patch. t = 0 is data, t = 1 noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from framework.batch import PackedBatch

# A `model_zoo.protocols.Denoiser`: (tokens (L, P), t (B,), layout, text) -> (L, P).
Network = Callable[[Tensor, Tensor, PackedBatch, Tensor], Tensor]


@dataclass(frozen=True)
class Draw:
    """The random numbers of one pack; drawn on the CPU, each clip's by itself."""

    t: Tensor  # (B,) float32 in [0, 1]; 0 where a segment holds no clip
    noise: Tensor  # (L, P) float32 standard normal; 0 where a segment holds no clip

    def to(self, device: torch.device | str) -> "Draw":
        """The same draw with its tensors on `device`."""
        return Draw(self.t.to(device, non_blocking=True), self.noise.to(device, non_blocking=True))


class Objective(Protocol):
    """What a network is trained to do, and how its output is read."""

    def draw(self, batch: PackedBatch, seed: int) -> Draw:
        """Timesteps and noise of a pack: a function of seed and the clips' ids and epochs."""
        ...

    def fixed_draw(self, batch: PackedBatch, t: float, seed: int) -> Draw:
        """Every clip at noise level t, its noise a function of (seed, clip id): for validation."""
        ...

    def loss(self, model: Network, batch: PackedBatch, draw: Draw) -> Tensor:
        """(B,) float32 loss sums by clip; divide by the loss-bearing tokens for loss per token.

        Each sums, over the clip's tokens weighted by `batch.loss_mask`, the mean over P of the
        squared error.
        """
        ...

    def denoised(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(L, P) float32 estimate of the data; t is (L, 1), each token's own."""
        ...


class ObjectiveConfig(Protocol):
    """What a run wants of the config of an objective of any kind."""

    def build(self, token_std: Tensor) -> Objective:
        """`token_std`: (P,) standard deviation of each value of a token over the clips."""
        ...


def token_t(t: Tensor, batch: PackedBatch) -> Tensor:
    """t by clip (B,) -> t by token (L, 1): given tokens are clean, so theirs is 0."""
    return (t[batch.segment_ids] * ~batch.given_mask)[:, None]
