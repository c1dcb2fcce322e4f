"""Samplers: free functions that follow the probability-flow ODE from noise to data.

A sampler sees a `Flow` alone: the path, and estimates of the data along it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from framework.diffusion.path import Flow
from framework.diffusion.schedule import sampling_grid


def euler(flow: Flow, noise: Tensor, grid: list[float]) -> Tensor:
    """First order: one call a step (Liu et al. 2022, sec. 2.1). noise and result are (L, P)."""
    x = noise
    for t, t_next in pairwise(grid):
        velocity = flow.velocity(x, t)
        x = x + (t_next - t) * velocity
    return x


def heun(flow: Flow, noise: Tensor, grid: list[float]) -> Tensor:
    """Second order: two calls a step, one in the last (Karras et al. 2022, algorithm 1)."""
    x = noise
    for t, t_next in pairwise(grid):
        velocity = flow.velocity(x, t)
        x_euler = x + (t_next - t) * velocity
        if t_next == 0:  # an estimate of the data gives no velocity there
            return x_euler
        velocity_next = flow.velocity(x_euler, t_next)
        x = x + (t_next - t) * 0.5 * (velocity + velocity_next)
    return x


class SamplerConfig(Protocol):
    """What sampling wants of a sampler of any kind."""

    @property
    def guidance_scale(self) -> float:
        """Strength of classifier-free guidance; 1 is none, and half the cost."""

    def sample(
        self,
        flow: Flow,
        noise: Tensor,
        given_tokens: Tensor | None = None,
        given_mask: Tensor | None = None,
    ) -> Tensor:
        """Noise (L, P) -> data (L, P); rows of given_tokens marked in given_mask (L,) stay."""


@dataclass(frozen=True)
class _OnGrid(ABC):
    """A sampler that visits a grid of t."""

    num_steps: int = 20
    shift: float = 3.0  # of the grid, toward noise
    guidance_scale: float = 2.5

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1; try 20")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} must be positive; 1 shifts nothing")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale} must not be negative; try 2.5")

    @abstractmethod
    def integrate(self, flow: Flow, noise: Tensor, grid: list[float]) -> Tensor:
        """From noise (L, P) at grid[0] to data (L, P) at grid[-1]."""

    def sample(
        self,
        flow: Flow,
        noise: Tensor,
        given_tokens: Tensor | None = None,
        given_mask: Tensor | None = None,
    ) -> Tensor:
        """Noise (L, P) -> data (L, P); rows of given_tokens (L, P) marked in given_mask (L,) stay.

        Given tokens are clean context (frames to extend, regions to keep): `flow.denoise` sees them
        as they are at every t, whatever the path and the sampler make of their rows.
        """
        if (given_tokens is None) != (given_mask is None):
            raise ValueError("given_tokens and given_mask go together; pass both or neither")
        grid = sampling_grid(self.num_steps, self.shift)
        if given_tokens is None or given_mask is None:
            return self.integrate(flow, noise, grid)
        held, clean = given_mask[:, None], given_tokens  # (L, 1), (L, P)

        def denoise_rest(x_t: Tensor, t: float) -> Tensor:
            return torch.where(held, clean, flow.denoise(torch.where(held, clean, x_t), t))

        sampled = self.integrate(Flow(flow.path, denoise_rest), noise, grid)
        return torch.where(held, clean, sampled)


@dataclass(frozen=True)
class EulerConfig(_OnGrid):
    """Euler's method, see `euler`."""

    def integrate(self, flow: Flow, noise: Tensor, grid: list[float]) -> Tensor:
        """By `euler`."""
        return euler(flow, noise, grid)


@dataclass(frozen=True)
class HeunConfig(_OnGrid):
    """Heun's method, see `heun`; a step costs two of Euler's."""

    def integrate(self, flow: Flow, noise: Tensor, grid: list[float]) -> Tensor:
        """By `heun`."""
        return heun(flow, noise, grid)
