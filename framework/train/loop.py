"""The training loop: plain torch, one screen, the same for every engine and any number of ranks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.objectives.objective import Draw, Losses, Objective
from framework.train.engine.protocol import Engine, StepStats


@dataclass(frozen=True)
class StepInput:
    """One rank's share of one optimizer step."""

    step: int  # counted from 0 over all epochs
    epoch: int
    epoch_step: int  # counted from 0 within the epoch
    num_averaged: int  # N: what the loss is averaged over, planned, over all ranks
    tokens: int  # video tokens of the step, over all ranks
    packs: list[tuple[PackedBatch, Draw]]  # each with what the objective drew for it
    leave_out: bool = False  # a step before a loss spike, after a roll-back


@dataclass(frozen=True)
class StepOutput:
    """What one rank knows after a step."""

    inputs: StepInput
    loss: float  # of the step, over all ranks; NaN where it was left out
    losses: list[Losses]  # of each pack, detached
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

    The loss of a step is the mean over its N planned tokens (or what else the objective averages
    over). The engine averages gradients over ranks and sums them over a rank's packs, so each
    pack's loss sum is scaled by dp_size / N and by nothing else.

    `before_update` is handed this rank's share of the step's loss, () float32; it gives the loss
    over all ranks, and why the update is to be left out, or an empty string. A step with
    `leave_out` runs none of its packs.
    """
    for inputs in steps:
        loss_share, losses = torch.zeros((), device=device), []
        for batch, draw in [] if inputs.leave_out else inputs.packs:
            found = objective.loss(engine.model, batch.to(device), draw.to(device))
            loss = found.by_clip.sum() / inputs.num_averaged
            engine.backward(loss * dp_size)
            loss_share += loss.detach()
            losses.append(Losses(found.by_clip.detach(), found.sums))
        step_loss, skip = before_update(inputs, loss_share)
        stats = engine.skip() if skip else engine.step()
        if not (skip or math.isfinite(stats.grad_norm)):
            skip = "not finite"
        if not after_step(StepOutput(inputs, step_loss, losses, stats, skip)):
            return
