"""A run's metrics as gauges of Ray, which each node's agent offers to Prometheus.

`train/loss` is `longtake_train_loss` here; Ray puts `ray_` before it. Tags are `run` and `rank`.
Outside Ray nothing happens, and a gauge that fails never stops training.
"""

import logging
import re
from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

_LOG = logging.getLogger(__name__)


def gauge_name(metric: str) -> str:
    """`speed/step_s` -> `longtake_speed_step_s`: Prometheus takes letters, digits and `_` only."""
    return "longtake_" + re.sub(r"[^A-Za-z0-9_]", "_", metric)


class Gauges:
    """What one rank shows; call `show` with the metrics that the tracker is given."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags, self._is_first = {"run": run, "rank": str(rank)}, rank == 0
        self._gauges: dict[str, Gauge] = {}
        self._works = ray.is_initialized()

    def show(self, metrics: Mapping[str, float], *, of_rank: bool = False) -> None:
        """Set the gauges of these metrics.

        of_rank: they are this rank's own; else they are of the whole run, and rank 0 alone shows
        them.
        """
        if not self._works or not (of_rank or self._is_first):
            return
        try:
            for metric, value in metrics.items():
                name = gauge_name(metric)
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, metric, tag_keys=tuple(self._tags))
                self._gauges[name].set(float(value), self._tags)
        except Exception:  # whatever Ray makes of it, a figure is not worth a run
            self._works = False
            _LOG.warning("Ray takes no gauges; there will be none of this rank", exc_info=True)
