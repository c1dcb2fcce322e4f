"""What to do with a step whose loss cannot be right: NaN, infinite, or far above the others.

A spike is a loss more than `spike_deviations` robust standard deviations above the median of the
last `window` steps; 1.4826 times the median absolute deviation is one for a normal distribution.
PaLM (Chowdhery et al. 2022, sec. 5.1) went back to a checkpoint before a spike and left out the
batches around it: that is `rollback`.

Invariant: a verdict is a function of the steps before, of which a checkpoint keeps what counts; so
a run that was interrupted judges as one that was not.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["train", "skip", "rollback"]

MIN_HISTORY = 16  # steps before anything can be called a spike
NORMAL = 1.4826
LEAST_DEVIATION = 0.01  # of the median; a loss that hardly moves makes no spike of a small step


class Diverged(ArithmeticError):
    """Too many steps in a row could not be trained on."""


@dataclass(frozen=True)
class GuardConfig:
    """Rules for steps that went wrong.

    A step with a loss or gradient that is not finite never changes the weights. `on_spike`: `train`
    on it as on any other, `skip` its update, or `rollback` to the last checkpoint and come by it
    without the step itself and up to `rollback_steps - 1` before it. More than `max_skipped` steps
    in a row that changed nothing, for whatever reason, end the run.
    """

    max_skipped: int = 10
    on_spike: Verdict = "train"
    spike_deviations: float = 8.0
    window: int = 128
    rollback_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("max_skipped", "rollback_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.window < MIN_HISTORY:
            raise ValueError(f"window={self.window} must be at least {MIN_HISTORY}; try 128")
        if not self.spike_deviations > 0:
            raise ValueError(f"spike_deviations={self.spike_deviations} must be above 0; try 8")


class Guard:
    """Judges one step after another; every rank holds one and is told the same."""

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
        """`state`: what `state()` gave at the last checkpoint."""
        state = state or {"losses": [], "skipped": 0}
        self._config = config
        self._losses: deque[float] = deque(state["losses"], maxlen=config.window)
        self._skipped: int = state["skipped"]  # in a row

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        return {"losses": list(self._losses), "skipped": self._skipped}

    def judge(self, loss: float) -> Verdict:
        """What to do with a step of this loss, before its weights are updated.

        A loss that is not finite goes on to the engine, whose gradient is not finite either.
        """
        if math.isfinite(loss) and self._is_spike(loss):
            return self._config.on_spike
        return "train"

    def learn(self, step: int, loss: float, skipped: str) -> None:
        """Take a step that is over, with why it changed nothing, if so.

        Diverged where too many in a row did not.
        """
        if not skipped:
            self._losses.append(loss)
            self._skipped = 0
            return
        self._skipped += 1
        if self._skipped > self._config.max_skipped:
            raise Diverged(
                f"{self._skipped} steps in a row changed no weight (the last, step {step}: "
                f"{skipped}; train.guard.max_skipped={self._config.max_skipped}); lower "
                "optimizer.lr, or look at their clips in failed/"
            )

    def _is_spike(self, loss: float) -> bool:
        if self._config.on_spike == "train" or len(self._losses) < MIN_HISTORY:
            return False
        median = statistics.median(self._losses)
        deviation = NORMAL * statistics.median(abs(value - median) for value in self._losses)
        deviation = max(deviation, LEAST_DEVIATION * abs(median))
        return loss > median + self._config.spike_deviations * deviation
