"""The norm of all weights, at each window's end."""

from collections.abc import Sequence

from framework.train.engine.protocol import Engine
from framework.train.observers.meters.meter import Meter


class WeightNorm(Meter[float]):
    """train/weight_norm: L2, of the float32 weights as one vector."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def measure(self) -> float:
        """A collective."""
        return self._engine.weight_norm()

    def figures(self, by_rank: Sequence[float]) -> dict[str, float]:
        """The same on every rank."""
        return {"train/weight_norm": by_rank[0]}
