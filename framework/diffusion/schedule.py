"""Time in a diffusion: t = 0 is data, t = 1 is noise, and x_t = (1 - t) * latents + t * noise.

Stated here once, for all of Longtake. This file says which t are trained on (a density, as a
map of one standard normal to t) and which are visited when sampling (a grid from 1 down to 0).
"""

import math

from torch import Tensor


def shift_t(t: float, shift: float) -> float:
    """Move t toward noise: shift * t / (1 + (shift - 1) * t); shift = 1 leaves it as it is.

    Esser et al. 2024, eq. 23: the more tokens repeat each other, the more noise hides them.
    """
    # The same fraction, written so that 0 and 1 come out exactly.
    return t / (t + (1 - t) / shift)


def logit_normal_t(normal: float, mean: float, std: float, shift: float) -> float:
    """A standard normal draw -> t of logit-normal density, then shifted; Esser et al. 2024, 3.1."""
    logit = mean + std * normal
    # Written for either sign, so that exp never overflows.
    t = 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
    return shift_t(t, shift)


def uniform_t(normal: float, shift: float) -> float:
    """A standard normal draw -> t of uniform density, then shifted."""
    return shift_t(0.5 * math.erfc(-normal / math.sqrt(2.0)), shift)


def sampling_grid(num_steps: int, shift: float) -> list[float]:
    """The num_steps + 1 values of t that a sampler visits: evenly spaced from 1 to 0, then shifted.

    Esser et al. 2024, sec. 5.3.2. The first is exactly 1, the last exactly 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1; try 20")
    return [shift_t(1 - i / num_steps, shift) for i in range(num_steps + 1)]


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) * latents + t * noise; t broadcasts against the other two."""
    return (1 - t) * latents + t * noise
