"""AdamW with a learning rate that is a pure function of the step.

There is no scheduler object and so no scheduler state: a resumed run asks for the rate of its step
and gets what an undisturbed run would have got.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

SCHEDULES = ("constant", "cosine", "trapezoid")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that train otherwise than the rest.

    `pattern`: of their names, as a shell has it ("*" any text, dots included).
    `lr_scale`: their learning rate is this times the schedule's. `weight_decay`: of all of them,
    biases and norms as well; None leaves it as it is.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.lr_scale < 0:
            raise ValueError(f"lr_scale={self.lr_scale} must be 0 (no training) or more")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019), gradient clipping and the learning-rate schedule.

    The rate warms up linearly over `warmup_steps`, then:
    `constant` stays at `lr`; `cosine` falls from `lr` at the end of the warm-up to `final * lr` at
    the end of the run; `trapezoid` stays at `lr` until the fraction `hold` of the run is over, then
    falls in a straight line to `final * lr` at its end.

    `groups`: exceptions by name; of those that match a parameter, it is in the first.
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
    groups: tuple[ParameterGroup, ...] = ()

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
        """The optimizer, with one of torch's groups for each pair of rate and decay.

        ValueError where a parameter is frozen, or a pattern matches none.
        """
        parameters = dict(named_parameters)
        self._check_patterns(list(parameters))
        alike: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                raise ValueError(f"parameter {name} is frozen: all parameters must be trainable")
            # A parameter that ZeRO-3 has partitioned keeps its real shape in `ds_shape`.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            alike.setdefault(self._rate_and_decay(name, len(shape)), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": params, "weight_decay": decay, "lr_scale": scale}
                for (scale, decay), params in alike.items()
            ],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,  # one kernel for all tensors, on the CPU as well
        )

    def _rate_and_decay(self, name: str, num_dims: int) -> tuple[float, float]:
        usual = self.weight_decay if num_dims > 1 else 0.0
        for group in self.groups:
            if fnmatchcase(name, group.pattern):
                decay = usual if group.weight_decay is None else group.weight_decay
                return group.lr_scale, decay
        return 1.0, usual

    def _check_patterns(self, names: list[str]) -> None:
        for group in self.groups:
            if not any(fnmatchcase(name, group.pattern) for name in names):
                near = difflib.get_close_matches(group.pattern, names, n=1, cutoff=0)
                raise ValueError(
                    f"groups: pattern {group.pattern!r} matches no parameter; "
                    f"the nearest name is {', '.join(near)}"
                )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each of the optimizer's groups its share of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _fraction(step: int, start: float, end: float) -> float:
    """How much of [start, end] is over at `step`; 1 from the end on."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1.0)))
