"""The path between data and noise: x_t = alpha(t) * latents + sigma(t) * noise.

t = 0 is data and t = 1 is noise, stated here once for all of Longtake: alpha(0) = sigma(1) = 1 and
alpha(1) = sigma(0) = 0. Objectives choose a path; guidance and samplers are handed it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T", float, Tensor)


class Path(Protocol):
    """How data turns into noise; t is one number, or a tensor that broadcasts against tokens."""

    def alpha(self, t: T) -> T:
        """The share of data in x_t."""
        ...

    def sigma(self, t: T) -> T:
        """The share of noise in x_t."""
        ...

    def velocity(self, x_t: Tensor, data: Tensor, t: float | Tensor) -> Tensor:
        """dx_t/dt = alpha'(t) * data + sigma'(t) * noise, of the noise that x_t and data imply.

        For t > 0: at t = 0 there is no noise in x_t to tell.
        """
        ...


@dataclass(frozen=True)
class StraightPath:
    """A `Path`: alpha = 1 - t and sigma = t (Liu et al. 2022), of constant velocity."""

    def alpha(self, t: T) -> T:
        """1 - t."""
        return 1 - t

    def sigma(self, t: T) -> T:
        """The identity."""
        return t

    def velocity(self, x_t: Tensor, data: Tensor, t: float | Tensor) -> Tensor:
        """(x_t - data) / t, which is noise - data."""
        return (x_t - data) / t


def interpolate(path: Path, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) * latents + sigma(t) * noise; t broadcasts against the other two."""
    return path.alpha(t) * latents + path.sigma(t) * noise


@dataclass(frozen=True)
class Flow:
    """What a sampler follows: a path, and estimates of the data along it.

    Guidance, packing and what the network predicts are settled before.
    """

    path: Path
    # (x_t (L, P), t) -> (L, P) estimate of the data; t is one number, the same for all clips.
    denoise: Callable[[Tensor, float], Tensor]

    def velocity(self, x_t: Tensor, t: float) -> Tensor:
        """The right-hand side of the probability-flow ODE, dx_t/dt, for t > 0."""
        return self.path.velocity(x_t, self.denoise(x_t, t), t)
