"""Goodput: the share of a run's wall time in which steps were made that count.

Wall time runs from the start of a driver, through all that its workers do and suffer, to its last
commit; between two drivers nobody wanted the run to go on. Of it, steps that changed the weights
and were kept move the run forward, without the time that they waited for data.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from framework.train.observers.meters.meter import Meter
from framework.train.observers.meters.speed import Speed


class Goodput(Meter[None]):
    """run/goodput and run/restarts, through all sessions of the run."""

    def __init__(
        self, speed: Speed, session_began: float, restarts: int, kept: Mapping[str, Any]
    ) -> None:
        """`session_began`: when this driver began, in seconds since 1970. `kept`: what `state` gave
        for the checkpoint that this session goes on from; empty where there is none."""
        self._speed, self._session_began, self._restarts = speed, session_began, restarts
        self._wall_before_s = kept.get("wall_before_s", 0.0)
        self._productive_before_s = kept.get("productive_s", 0.0)
        if kept and kept["session_began"] != session_began:  # another driver's
            self._wall_before_s += kept["saved_at"] - kept["session_began"]

    @property
    def _productive_s(self) -> float:
        return self._productive_before_s + self._speed.productive_s

    def measure(self) -> None:
        """Rank 0's clock alone counts."""

    def figures(self, by_rank: Sequence[None]) -> dict[str, float]:
        """Of the run up to now."""
        wall_s = self._wall_before_s + time.time() - self._session_began
        return {
            "run/goodput": self._productive_s / max(wall_s, 1e-9),
            "run/restarts": float(self._restarts),
        }

    def state(self) -> dict[str, Any]:
        """What the next session goes on from."""
        return {
            "clock": {
                "session_began": self._session_began,
                "saved_at": time.time(),
                "wall_before_s": self._wall_before_s,
                "productive_s": self._productive_s,
            }
        }
