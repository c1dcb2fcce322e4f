"""AdamW with a learning rate that is a pure function of the step.

There is no scheduler object and so no scheduler state: a resumed run asks for the rate of its step
and gets what an undisturbed run would have got.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("constant", "cosine", "trapezoid")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019), gradient clipping and the learning-rate schedule.

    The rate warms up linearly over `warmup_steps`, then:
    `constant` stays at `lr`; `cosine` falls from `lr` at the end of the warm-up to `final * lr` at
    the end of the run; `trapezoid` stays at `lr` until the fraction `hold` of the run is over, then
    falls in a straight line to `final * lr` at its end.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on tensors of two and more dimensions; biases and norms are spared
    max_grad_norm: float = 1.0  # L2 norm over all gradients; 0 means no clipping
    schedule: str = "constant"
    warmup_steps: int = 40
    hold: float = 0.5
    final: float = 0.05

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be above 0; try 1e-3")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1); try (0.9, 0.99)")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps} must be above 0; try 1e-8")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more")
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be 0 (no clipping) or more")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be 0 or more")
        for name, value in (("hold", self.hold), ("final", self.final)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a fraction and must lie in [0, 1]")

    def lr_at(self, step: int, num_steps: int) -> float:
        """The learning rate of step `step` (from 0) of a run of `num_steps` steps."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            done = _fraction(step, self.warmup_steps, num_steps)
            return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)
        if self.schedule == "trapezoid":
            done = _fraction(step, max(self.warmup_steps, self.hold * num_steps), num_steps)
            return self.lr * (1 - (1 - self.final) * done)
        return self.lr

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
        """The optimizer, with one group for tensors that decay and one for those that do not."""
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                raise ValueError(f"parameter {name} is frozen: all parameters must be trainable")
            # A parameter that ZeRO-3 has partitioned keeps its real shape in `ds_shape`.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else spared).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,  # one kernel for all tensors, on the CPU as well
        )


def _fraction(step: int, start: float, end: float) -> float:
    """How much of [start, end] is over at `step`; 1 from the end on."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1.0)))
