"""Which noise levels t are visited when sampling, and the shift of t that training shares.

See `framework.diffusion.path` for what t is.
"""


def shift_t(t: float, shift: float) -> float:
    """Move t toward noise: shift * t / (1 + (shift - 1) * t); shift = 1 leaves it as it is.

    Esser et al. 2024, eq. 23: the more tokens repeat each other, the more noise hides them.
    """
    # The same fraction, written so that 0 and 1 come out exactly.
    return t / (t + (1 - t) / shift)


def sampling_grid(num_steps: int, shift: float) -> list[float]:
    """The num_steps + 1 values of t that a sampler visits: evenly spaced from 1 to 0, then shifted.

    Esser et al. 2024, sec. 5.3.2. The first is exactly 1, the last exactly 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1; try 20")
    return [shift_t(1 - i / num_steps, shift) for i in range(num_steps + 1)]
