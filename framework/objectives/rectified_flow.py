"""Rectified flow (Liu et al. 2022; Esser et al. 2024): learn the velocity of a straight path.

x_t = (1 - t) * latents + t * noise moves with velocity v = noise - latents; the loss is the plain
squared error of v, and its weighting is the density of t. One class owns the reading of the
network's output for the loss and for sampling alike, so that the two cannot disagree.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.diffusion.denoiser import Network, token_t
from framework.diffusion.path import StraightPath, interpolate
from framework.objectives.noise import NoiseDraw, clip_noise
from framework.objectives.noise_levels import loss_by_noise_level
from framework.objectives.objective import AveragedOver, Draw, Losses
from framework.objectives.timesteps import logit_normal_t, uniform_t
from framework.seeding import draws

_DENSITIES = ("logit_normal", "uniform")


@dataclass(frozen=True)
class RectifiedFlowConfig:
    """Density of the trained t, and whether the output is preconditioned.

    The defaults were found on the demo; Esser et al. 2024 use logit_mean 0, logit_std 1, and
    shift 3 at 1024 x 1024.
    """

    density: str = "logit_normal"  # or "uniform", which ignores logit_mean and logit_std
    logit_mean: float = 0.0
    logit_std: float = 1.2
    shift: float = 3.0  # > 1 trains more on noisy t; the sampler has its own
    precondition: bool = True

    def __post_init__(self) -> None:
        if self.density not in _DENSITIES:
            raise ValueError(f"density={self.density!r} must be one of {', '.join(_DENSITIES)}")
        if self.logit_std < 0:
            raise ValueError(f"logit_std={self.logit_std} must not be negative; try 1.0")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} must be positive; 1 shifts nothing")

    def build(self, token_std: Tensor) -> "RectifiedFlow":
        """`token_std`: (P,) standard deviation of each value of a token, zero-mean over clips."""
        return RectifiedFlow(self, token_std.detach().float().cpu())


@dataclass(frozen=True, eq=False)
class RectifiedFlow:
    """The objective; see `framework.objectives.objective.Objective` for the contract.

    Preconditioning. With latents ~ N(0, s^2) the best linear guess of v from x_t is
    E[v x_t] / E[x_t^2] * x_t = (t - (1-t) s^2) / D * x_t, where D = t^2 + (1-t)^2 s^2, and what it
    leaves has variance (1 + s^2) - (t - (1-t) s^2)^2 / D = s^2 / D. So the network is given a
    target of unit variance at every t: v = (t - (1-t) s^2) / D * x_t + sqrt(s^2 / D) * output.
    (Karras et al. 2022, sec. 5, ask the same of their parametrisation.)
    """

    config: RectifiedFlowConfig
    token_std: Tensor  # (P,) float32

    averaged_over: ClassVar[AveragedOver] = "video_tokens"
    path: ClassVar[StraightPath] = StraightPath()

    def __post_init__(self) -> None:
        if self.token_std.ndim != 1 or not bool((self.token_std > 0).all()):
            raise ValueError(
                f"token_std of shape {tuple(self.token_std.shape)} with minimum "
                f"{float(self.token_std.min())} must be (P,) and positive; "
                "leave constant channels out of the codec"
            )

    def draw(self, batch: PackedBatch, seed: int, step: int) -> NoiseDraw:
        """A timestep and noise for each clip, from (seed, its epoch, its id), at whatever step."""
        epochs = batch.clip_epochs.tolist()
        t = [
            self._to_t(float(draws(seed, epoch, clip_id, "timestep").normal(1)[0]))
            if clip_id >= 0
            else 0.0
            for clip_id, epoch in zip(batch.clip_ids.tolist(), epochs, strict=True)
        ]
        noise = clip_noise(batch, seed, epochs, "noise")
        return NoiseDraw(torch.tensor(t, dtype=torch.float32), noise)

    def fixed_draw(self, batch: PackedBatch, t: float, seed: int) -> NoiseDraw:
        """Every clip at t, with noise from (seed, clip id): the same in every epoch and at every t.

        ValueError where t is outside [0, 1].
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t={t} must lie in [0, 1]")
        by_clip = torch.where(batch.clip_ids.cpu() >= 0, t, 0.0).float()
        return NoiseDraw(by_clip, clip_noise(batch, seed, [0] * batch.num_segments, "fixed noise"))

    def loss(self, model: Network, batch: PackedBatch, draw: Draw) -> Losses:
        """Sums by clip over its loss-bearing tokens, of the mean over P; and by noise level."""
        assert isinstance(draw, NoiseDraw)
        t = token_t(draw.t, batch)  # (L, 1)
        x_t = interpolate(self.path, batch.tokens, draw.noise, t)  # (L, P); given stay clean
        velocity = self._velocity(model(x_t, draw.t, batch, batch.text), x_t, t)
        error = velocity - (draw.noise - batch.tokens)
        by_token = error.square().mean(dim=1) * batch.loss_mask  # (L,)
        sums = torch.zeros(batch.num_segments, dtype=torch.float32, device=by_token.device)
        by_clip = sums.index_add(0, batch.segment_ids, by_token)  # (B,)
        return Losses(by_clip, loss_by_noise_level(batch, draw.t, by_clip))

    def denoised(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(L, P) float32 estimate of the data: x_t - t * v, since x_t = latents + t * v."""
        return x_t.float() - t * self._velocity(model_output, x_t, t)

    def _to_t(self, normal: float) -> float:
        config = self.config
        if config.density == "uniform":
            return uniform_t(normal, config.shift)
        return logit_normal_t(normal, config.logit_mean, config.logit_std, config.shift)

    def _velocity(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(L, P), (L, P), (L, 1) -> (L, P), in float32 whatever the network computes in."""
        output, x_t = model_output.float(), x_t.float()
        if not self.config.precondition:
            return output
        variance = self.token_std.to(x_t.device).square()  # (P,)
        total = t.square() + (1 - t).square() * variance  # (L, P): D
        return (t - (1 - t) * variance) / total * x_t + (variance / total).sqrt() * output
