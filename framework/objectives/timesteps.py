"""Which noise levels t are trained on: densities, as maps of one standard normal draw to t."""

import math

from framework.diffusion.schedule import shift_t


def logit_normal_t(normal: float, mean: float, std: float, shift: float) -> float:
    """A standard normal draw -> t of logit-normal density, then shifted; Esser et al. 2024, 3.1."""
    logit = mean + std * normal
    # Written for either sign, so that exp never overflows.
    t = 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
    return shift_t(t, shift)


def uniform_t(normal: float, shift: float) -> float:
    """A standard normal draw -> t of uniform density, then shifted."""
    return shift_t(0.5 * math.erfc(-normal / math.sqrt(2.0)), shift)
