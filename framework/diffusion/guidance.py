"""Classifier-free guidance (Ho and Salimans 2022), both halves in one forward.

The guided estimate is unconditioned + guidance_scale * (conditioned - unconditioned), taken
between estimates of the data; denoised() is affine in the output with equal coefficients for both
halves, so that this equals guidance of the velocity.
"""

from collections.abc import Callable
from dataclasses import replace

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
    both = with_null_half(batch, null_text)

    def denoise(x_t: Tensor, t: float) -> Tensor:
        estimates = _denoised(model, objective, both, torch.cat([x_t, x_t]), t)  # (2L, P)
        conditioned, unconditioned = estimates.chunk(2)
        return unconditioned + guidance_scale * (conditioned - unconditioned)

    return denoise


def with_null_half(batch: PackedBatch, null_text: Tensor) -> PackedBatch:
    """The pack and a copy of it whose text is the empty caption: 2L tokens, 2B segments.

    Segments without video tokens get no text in the copy.
    """
    lengths = batch.cu_seqlens.diff()
    null_lengths = null_text.shape[0] * (lengths > 0).to(batch.cu_text.dtype)
    null_text = null_text.to(batch.text)
    num_clips = int((lengths > 0).sum())
    null_rows = null_text.repeat(num_clips, *[1] * (null_text.ndim - 1))
    return replace(
        batch,
        tokens=torch.cat([batch.tokens, batch.tokens]),
        grid=torch.cat([batch.grid, batch.grid]),
        cu_seqlens=_appended(batch.cu_seqlens, lengths),
        text=torch.cat([batch.text, null_rows]),
        cu_text=_appended(batch.cu_text, null_lengths),
        clip_ids=torch.cat([batch.clip_ids, batch.clip_ids]),
        clip_weights=torch.cat([batch.clip_weights, batch.clip_weights]),
        source=torch.cat([batch.source, batch.source]),
        fps=torch.cat([batch.fps, batch.fps]),
        given_mask=torch.cat([batch.given_mask, batch.given_mask]),
    )


def _denoised(
    model: Network, objective: Objective, batch: PackedBatch, x_t: Tensor, t: float
) -> Tensor:
    by_clip = torch.full((batch.num_segments,), t, dtype=torch.float32, device=x_t.device)
    output = model(x_t, by_clip, batch, batch.text)
    return objective.denoised(output, x_t, token_t(by_clip, batch))


def _appended(cu: Tensor, lengths: Tensor) -> Tensor:
    """Offsets (B+1,) followed by those of further segments of the given lengths (B,)."""
    return torch.cat([cu, cu[-1] + lengths.cumsum(0).to(cu.dtype)])
