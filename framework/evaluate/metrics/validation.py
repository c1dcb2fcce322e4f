"""Validation loss: held-out clips at fixed noise levels, each with its own fixed noise.

Training draws t and noise at random, so that its loss is noisy and rests on the density of t. Here
levels and noise are the same at every evaluation: two checkpoints differ by their weights alone.
"""

from collections.abc import Iterable, Sequence

from framework.batch import PackedBatch
from framework.diffusion.denoiser import Denoiser
from framework.objectives.objective import DiffusionObjective

# From nearly clean to nearly noise; chosen by hand.
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def validation_loss(
    denoiser: Denoiser[DiffusionObjective],
    batches: Iterable[PackedBatch],
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> dict[str, float]:
    """Mean loss per token by level ("loss_t0.1" and so on), and the mean of these ("loss").

    Tokens count by their weight, `batch.loss_mask`: failed, given and padding tokens by none.

    Runs in eval mode on the model's device and goes through `batches` once. ValueError where they
    hold no loss-bearing token.
    """
    if not levels:
        raise ValueError(f"levels={levels} must name at least one t in [0, 1]")
    model, objective = denoiser.model, denoiser.parametrization
    sums, num_tokens = [0.0] * len(levels), 0.0
    with denoiser.evaluating():
        for batch in batches:
            on_device = batch.to(denoiser.device)
            num_tokens += float(on_device.loss_mask.sum())
            for i, level in enumerate(levels):
                draw = objective.fixed_draw(batch, level, seed).to(denoiser.device)
                losses = objective.loss(model, on_device, draw)
                sums[i] += float(losses.by_clip.double().sum())
    if num_tokens == 0:
        raise ValueError("the validation batches hold no loss-bearing token; check the split")
    means = {f"loss_t{level:g}": s / num_tokens for level, s in zip(levels, sums, strict=True)}
    return {"loss": sum(means.values()) / len(means), **means}
