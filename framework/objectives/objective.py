"""The training contract: what the training loop, the plan and the metrics ask of an objective.

An objective owns what a network's output means. Training asks it for the loss; where it is one of
diffusion, sampling asks it for `path` and `denoised`. Nothing else in Longtake knows whether a
network predicts velocity, noise or data.

Shapes: B segments of a pack, L video tokens, P values in one patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from framework.batch import PackedBatch
from framework.diffusion.path import Path

# What a step's loss is a mean over; the plan knows how many of them a step has.
AveragedOver = Literal["video_tokens", "text_tokens", "pixels"]


class Draw(Protocol):
    """The random numbers of one pack; drawn on the CPU, each clip's by itself."""

    def to(self, device: torch.device | str) -> "Draw":
        """The same draw with its tensors on `device`."""
        ...


@dataclass(frozen=True)
class Losses:
    """What an objective says of one pack, on the pack's device."""

    by_clip: Tensor  # (B,) float32, differentiable: loss sums by clip
    # Name of a metric -> (2,) float64, detached: a sum of loss and a sum of what it is over. The
    # metric is the quotient of both, each summed over packs and ranks; zeros say nothing.
    sums: Mapping[str, Tensor]


class Objective(Protocol):
    """What a network is trained to do."""

    @property
    def averaged_over(self) -> AveragedOver:
        """What `Losses.by_clip` sums over."""

    def draw(self, batch: PackedBatch, seed: int, step: int) -> Draw:
        """The random numbers of a pack: a function of seed and the clips' ids and epochs.

        step: counted over the whole run, for what changes in its course.
        """
        ...

    def loss(self, model: nn.Module, batch: PackedBatch, draw: Draw) -> Losses:
        """Loss sums by clip; divide by the number of what they are averaged over.

        Each sums over what of the clip bears loss, weighted by `batch.clip_weights`.
        """
        ...


@runtime_checkable
class DiffusionObjective(Objective, Protocol):
    """An objective whose network can be sampled from: a `framework.diffusion` parametrization."""

    @property
    def path(self) -> Path:
        """Between data and noise."""

    def fixed_draw(self, batch: PackedBatch, t: float, seed: int) -> Draw:
        """Every clip at noise level t, its noise a function of (seed, clip id): for validation."""
        ...

    def denoised(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(L, P) float32 estimate of the data; t is (L, 1), each token's own."""
        ...


class ObjectiveConfig(Protocol):
    """What a run wants of the config of an objective of any kind."""

    def build(self, token_std: Tensor) -> Objective:
        """`token_std`: (P,) standard deviation of each value of a token over the clips."""
        ...
