"""Classifier-free guidance (Ho and Salimans 2022), both halves in one forward.

The guided estimate is unconditioned + guidance_scale * (conditioned - unconditioned), taken
between estimates of the data. A path's velocity is affine in the data, with equal coefficients for
both halves, so that this equals guidance of the velocity.
"""

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.diffusion.denoiser import Denoiser, Parametrization
from framework.diffusion.path import Flow


def guided(
    denoiser: Denoiser[Parametrization],
    batch: PackedBatch,
    guidance_scale: float,
    null_text: Tensor,
) -> Flow:
    """What a sampler follows, for the clips of `batch`: its text, grids and given_mask.

    null_text is the encoded empty caption, (k,) or (k, D). A scale of 1 is the plain conditioned
    estimate and costs half as much.
    """
    if guidance_scale == 1.0:
        return Flow(denoiser.path, lambda x_t, t: denoiser.denoised(batch, x_t, t))
    both = batch.twice(null_text)

    def denoise(x_t: Tensor, t: float) -> Tensor:
        estimates = denoiser.denoised(both, torch.cat([x_t, x_t]), t)  # (2L, P)
        conditioned, unconditioned = estimates.chunk(2)
        return unconditioned + guidance_scale * (conditioned - unconditioned)

    return Flow(denoiser.path, denoise)
