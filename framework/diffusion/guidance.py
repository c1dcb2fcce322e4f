"""Classifier-free guidance (Ho and Salimans 2022), both halves in one forward.

The guided estimate is unconditioned + guidance_scale * (conditioned - unconditioned), taken
between estimates of the data; denoised() is affine in the output with equal coefficients for both
halves, so that this equals guidance of the velocity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.objectives.objective import Network, Objective, token_t

# (x_t (L, P), t) -> (L, P) estimate of the data; t is one number, the same for all clips.
Denoise = Callable[[Tensor, float], Tensor]


def guided(
    model: Network,
    objective: Objective,
    batch: PackedBatch,
    guidance_scale: float,
    null_text: Tensor,
) -> Denoise:
    """What a sampler calls, for the clips of `batch`: its text, grids and given_mask.

    null_text is the encoded empty caption, (k,) or (k, D). A scale of 1 is the plain conditioned
    estimate and costs half as much.
    """
    if guidance_scale == 1.0:
        return lambda x_t, t: _denoised(model, objective, batch, x_t, t)
    both = batch.twice(null_text)

    def denoise(x_t: Tensor, t: float) -> Tensor:
        estimates = _denoised(model, objective, both, torch.cat([x_t, x_t]), t)  # (2L, P)
        conditioned, unconditioned = estimates.chunk(2)
        return unconditioned + guidance_scale * (conditioned - unconditioned)

    return denoise


def _denoised(
    model: Network, objective: Objective, batch: PackedBatch, x_t: Tensor, t: float
) -> Tensor:
    by_clip = torch.full((batch.num_segments,), t, dtype=torch.float32, device=x_t.device)
    output = model(x_t, by_clip, batch, batch.text)
    return objective.denoised(output, x_t, token_t(by_clip, batch))
