"""The training loop: plain torch, one screen, the same for every engine and any number of ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.diffusion.objective import Draw, Objective
from framework.train.engine import Engine, StepStats


@dataclass(frozen=True)
class StepInput:
    """One rank's share of one optimizer step."""

    number: int  # counted from 0 over all epochs
    epoch: int
    step: int  # within the epoch
    loss_tokens: int  # N: planned loss-bearing tokens of the step, over all ranks
    tokens: int  # video tokens of the step, over all ranks
    packs: list[tuple[PackedBatch, Draw]]


@dataclass(frozen=True)
class StepOutput:
    """What one rank knows after a step; `loss_share` summed over ranks is the step's loss."""

    inputs: StepInput
    loss_share: Tensor  # () float32
    stats: StepStats


def train(
    engine: Engine,
    objective: Objective,
    steps: Iterable[StepInput],
    after_step: Callable[[StepOutput], bool],
    *,
    dp_size: int,
    device: torch.device,
) -> None:
    """Train on `steps`, to their end or until `after_step` gives False.

    The loss of a step is the mean over its N planned loss-bearing tokens.
    The engine averages gradients over ranks and sums them over a rank's packs, so each pack's loss
    sum is scaled by dp_size / N and by nothing else.
    """
    for inputs in steps:
        loss_share = torch.zeros((), device=device)
        for batch, draw in inputs.packs:
            sums = objective.loss(engine.model, batch.to(device), draw.to(device))  # (B,)
            loss = sums.sum() / inputs.loss_tokens
            engine.backward(loss * dp_size)
            loss_share += loss.detach()
        if not after_step(StepOutput(inputs, loss_share, engine.step())):
            return
