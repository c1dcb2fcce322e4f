"""Latents to tokens and back: a token is a patch of pt x ph x pw latent positions, flattened.

Shapes: C channels, F H W latent grid, n tokens, P = pt * ph * pw * C values in one patch. Tokens
come row-major in (time, height, width); within a token the channel runs fastest (as in Wan's head).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Patch = tuple[int, int, int]  # latent positions of a patch in time, height, width


def patchify(latents: Tensor, patch_size: Patch) -> Tensor:
    """(C, F, H, W) -> (n, P), n = ceil(F/pt) * ceil(H/ph) * ceil(W/pw).

    A side that `patch_size` does not divide is padded by repeating its last row.
    """
    for axis, step in enumerate(patch_size, start=1):
        missing = -latents.shape[axis] % step
        if missing:
            edge = latents.narrow(axis, latents.shape[axis] - 1, 1)
            latents = torch.cat([latents, *[edge] * missing], dim=axis)
    channels, *sides = latents.shape
    (f, h, w), (pt, ph, pw) = (s // p for s, p in zip(sides, patch_size, strict=True)), patch_size
    tokens = latents.reshape(channels, f, pt, h, ph, w, pw).permute(1, 3, 5, 2, 4, 6, 0)
    return tokens.reshape(f * h * w, pt * ph * pw * channels)


def unpatchify(
    tokens: Tensor, grid: Patch, patch_size: Patch, channels: int, latent_shape: Patch
) -> Tensor:
    """(n, P) -> (C, F, H, W), cropped to latent_shape = (F, H, W); the inverse of `patchify`.

    Raises ValueError where n or P do not fit `grid` (token rows in time, height, width) and
    `patch_size`.
    """
    expected = (math.prod(grid), math.prod(patch_size) * channels)
    if tuple(tokens.shape) != expected:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not fit grid={grid}, "
            f"patch_size={patch_size} and channels={channels}, which want {expected}"
        )
    (f, h, w), (pt, ph, pw) = grid, patch_size
    latents = tokens.reshape(f, h, w, pt, ph, pw, channels).permute(6, 0, 3, 1, 4, 2, 5)
    latents = latents.reshape(channels, f * pt, h * ph, w * pw)
    return latents[:, : latent_shape[0], : latent_shape[1], : latent_shape[2]]


def patch_std(latent_std: Sequence[float], patch_size: Patch) -> Tensor:
    """Standard deviation of each value of a token: (C,) -> (P,) float32."""
    return torch.tensor(latent_std).repeat(math.prod(patch_size))
