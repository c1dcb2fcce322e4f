"""A meter: some figures of a window of steps, measured on every rank and joined.

To add a metric, write a meter and name it in `framework.train.rank.watchers`.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from framework.train.loop import StepOutput

T = TypeVar("T")


class Meter(Protocol[T]):
    """Inherit from it, and say what you want to know; what you leave out does nothing.

    All ranks have the same meters in the same order, so that a meter may use collectives.
    """

    def begin(self) -> None:
        """Training begins."""
        return

    def step(self, output: StepOutput) -> None:
        """A step is over."""
        return

    def stalled(self, seconds: float) -> None:
        """Training stood still for so long, for a checkpoint."""
        return

    def measure(self) -> T:
        """What this rank knows of the window that ends here; picklable."""
        ...

    def figures(self, by_rank: Sequence[T]) -> dict[str, float]:
        """The window's metrics from what `measure` gave on each rank; the same on every rank."""
        ...

    def check(self) -> None:
        """ValueError, on every rank alike, where training must not go on."""
        return

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        return {}
