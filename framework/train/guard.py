"""What to do with a step whose loss cannot be right: NaN, infinite, or far above the others.

A spike is a loss more than `spike_deviations` robust standard deviations above the median of the
last `window` steps; 1.4826 times the median absolute deviation is one for a normal distribution.
PaLM (Chowdhery et al. 2022, sec. 5.1) went back to a checkpoint before a spike and left out the
batches around it: that is `rollback`.

Invariant: a verdict is a function of the losses of earlier steps, which the ledger keeps; so a run
that was interrupted judges as one that was not.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["train", "skip", "rollback"]

MIN_HISTORY = 16  # steps before anything can be called a spike
NORMAL = 1.4826


class Diverged(ArithmeticError):
    """Too many steps in a row were no numbers."""


@dataclass(frozen=True)
class GuardConfig:
    """Rules for steps that went wrong.

    A step with a loss or gradient that is not finite never changes the weights; more than
    `max_non_finite` of them in a row end the run. `on_spike`: `train` on it as on any other,
    `skip` its update, or `rollback` to the last checkpoint and come by it without the step itself
    and the `rollback_steps - 1` before it.
    """

    max_non_finite: int = 10
    on_spike: Verdict = "train"
    spike_deviations: float = 8.0
    window: int = 128
    rollback_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("max_non_finite", "rollback_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.window < MIN_HISTORY:
            raise ValueError(f"window={self.window} must be at least {MIN_HISTORY}; try 128")
        if not self.spike_deviations > 0:
            raise ValueError(f"spike_deviations={self.spike_deviations} must be above 0; try 8")


class Guard:
    """Judges one step after another; every rank holds one and is told the same."""

    def __init__(self, config: GuardConfig, losses: Iterable[float]) -> None:
        """`losses`: of the steps before, as far as they trained, newest last."""
        self._config = config
        self._losses: deque[float] = deque(losses, maxlen=config.window)
        self._non_finite = 0

    def judge(self, loss: float) -> Verdict:
        """What to do with a step of this loss, before its weights are updated.

        A loss that is not finite goes on to the engine, whose gradient is not finite either.
        """
        if math.isfinite(loss) and self._is_spike(loss):
            return self._config.on_spike
        return "train"

    def learn(self, step: int, loss: float, is_finite: bool) -> None:
        """Take a step that was trained on; Diverged where too many in a row were no numbers.

        `is_finite`: whether its gradient was.
        """
        if is_finite:
            self._losses.append(loss)
            self._non_finite = 0
            return
        self._non_finite += 1
        if self._non_finite > self._config.max_non_finite:
            raise Diverged(
                f"the loss or its gradient was not finite in {self._non_finite} steps in a row, "
                f"the last step {step} (train.guard.max_non_finite={self._config.max_non_finite}); "
                "lower optimizer.lr, or look at the clips of these steps in the ledger"
            )

    def _is_spike(self, loss: float) -> bool:
        if self._config.on_spike == "train" or len(self._losses) < MIN_HISTORY:
            return False
        median = statistics.median(self._losses)
        deviation = NORMAL * statistics.median(abs(value - median) for value in self._losses)
        return loss > median + self._config.spike_deviations * deviation
