"""The training loop: plain torch, one screen, the same for every engine and any number of ranks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.objectives.objective import Draw, Objective
from framework.train.engine.protocol import Engine, StepStats


@dataclass(frozen=True)
class StepInput:
    """One rank's share of one optimizer step."""

    number: int  # counted from 0 over all epochs
    epoch: int
    step: int  # within the epoch
    loss_tokens: int  # N: planned loss-bearing tokens of the step, over all ranks
    tokens: int  # video tokens of the step, over all ranks
    packs: list[tuple[PackedBatch, Draw]]
    leave_out: bool = False  # a step before a loss spike, after a roll-back


@dataclass(frozen=True)
class StepOutput:
    """What one rank knows after a step."""

    inputs: StepInput
    loss: float  # of the step, over all ranks; NaN where it was left out
    clip_losses: list[Tensor]  # (B,) float32 of each pack: loss sums by clip
    stats: StepStats
    skipped: str  # why the weights were not updated; empty where they were


def train(
    engine: Engine,
    objective: Objective,
    steps: Iterable[StepInput],
    before_update: Callable[[StepInput, Tensor], tuple[float, str]],
    after_step: Callable[[StepOutput], bool],
    *,
    dp_size: int,
    device: torch.device,
) -> None:
    """Train on `steps`, to their end or until `after_step` gives False.

    The loss of a step is the mean over its N planned loss-bearing tokens.
    The engine averages gradients over ranks and sums them over a rank's packs, so each pack's loss
    sum is scaled by dp_size / N and by nothing else.

    `before_update` is handed this rank's share of the step's loss, () float32; it gives the loss
    over all ranks, and why the update is to be left out, or an empty string. A step with
    `leave_out` is come by without its packs.
    """
    for inputs in steps:
        loss_share, clip_losses = torch.zeros((), device=device), []
        for batch, draw in [] if inputs.leave_out else inputs.packs:
            sums = objective.loss(engine.model, batch.to(device), draw.to(device))  # (B,)
            loss = sums.sum() / inputs.loss_tokens
            engine.backward(loss * dp_size)
            loss_share += loss.detach()
            clip_losses.append(sums.detach())
        step_loss, skip = before_update(inputs, loss_share)
        stats = engine.skip() if skip else engine.step()
        if not (skip or math.isfinite(stats.grad_norm)):
            skip = "not finite"
        if not after_step(StepOutput(inputs, step_loss, clip_losses, stats, skip)):
            return
