"""What judges the videos that a checkpoint makes: one small protocol.

A new metric is a file, and a line in `framework.evaluate.evaluate.sample_metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from framework.demo.clips.moving_shapes import ClipSpec


@dataclass(frozen=True)
class Sample:
    """A video made from a held-out caption, beside what the caption describes.

    `real` and `made`: uint8 (T, H, W, 3), of the same size and duration. `spec`: of a synthetic
    clip, what a strict reader should find in it.
    """

    caption: str
    real: np.ndarray
    made: np.ndarray
    spec: ClipSpec | None = None


class Metric(Protocol):
    """Samples, one or more, to figures by name; none where it has nothing to say of them.

    The name on the chart has "eval/" before it. The ends of an interval end in `_low` and `_high`,
    the count behind a figure in `_num_videos`: they are kept and not charted.
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Judge the samples; ValueError where they are too few."""
        ...
