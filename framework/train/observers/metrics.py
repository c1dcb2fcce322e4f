"""The run's figures: of each step, and of each window of steps by its meters.

They go to the tracker, to Ray's gauges, and as a line to the terminal; rank 0 speaks for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from framework.terminal import Show
from framework.tracking.gauges import Gauges
from framework.tracking.tracker import Tracker
from framework.train.collectives import all_gather
from framework.train.loop import StepOutput
from framework.train.observers.meters.meter import Meter
from framework.train.observers.observer import Kept, Observer


@dataclass(frozen=True)
class Outputs:
    """Where figures go from this rank; on all but rank 0 each does nothing."""

    tracker: Tracker
    gauges: Gauges
    show: Show


class Metrics(Observer):
    """Keeps the steps of a window, and logs them at its end."""

    def __init__(
        self, meters: Sequence[Meter[Any]], outputs: Outputs, dp_size: int, num_steps: int
    ) -> None:
        """`num_steps`: of the whole run."""
        self._meters, self._outputs = meters, outputs
        self._dp_size, self._num_steps = dp_size, num_steps
        self._steps: list[tuple[int, dict[str, float]]] = []  # of the window: step, its metrics

    def begin(self) -> None:
        """Tell the meters."""
        for meter in self._meters:
            meter.begin()

    def step(self, output: StepOutput) -> None:
        """Note what is logged of every step."""
        self._steps.append((output.inputs.step, step_metrics(output)))
        for meter in self._meters:
            meter.step(output)

    def window(self) -> None:
        """Gather over ranks what happened since the last window, and log it."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        by_rank = all_gather([meter.measure() for meter in self._meters], self._dp_size)
        figures: dict[str, float] = {}
        for meter, measured in zip(self._meters, zip(*by_rank, strict=True), strict=True):
            figures |= meter.figures(measured)
        for step, metrics in steps:
            self._outputs.tracker.log_metrics(metrics, step)
        last, of_last = steps[-1]
        self._outputs.tracker.log_metrics(figures, last)
        self._outputs.gauges.show({**of_last, **figures})
        losses = [metrics["train/loss"] for _, metrics in steps if "train/loss" in metrics]
        self._outputs.show(
            {
                "step": last + 1,
                "steps": self._num_steps,
                "loss": sum(losses) / len(losses) if losses else math.nan,
                **figures,
            }
        )
        for meter in self._meters:
            meter.check()

    def commit(self, steps_done: int) -> Kept:
        """The meters' states."""
        state: dict[str, Any] = {}
        for meter in self._meters:
            state |= meter.state()
        return Kept(meta=state)

    def stalled(self, steps_done: int, seconds: float) -> None:
        """Tell the meters."""
        for meter in self._meters:
            meter.stalled(seconds)


def step_metrics(output: StepOutput) -> dict[str, float]:
    """What is logged of every step; what is no number is left out."""
    figures = {
        "train/loss": output.loss,
        "train/grad_norm": output.stats.grad_norm,
        "train/lr": output.stats.lr,
        "train/epoch": output.inputs.epoch,
        "train/skipped": float(bool(output.skipped)),
        "data/tokens": output.inputs.tokens,
    }
    return {name: value for name, value in figures.items() if math.isfinite(value)}
