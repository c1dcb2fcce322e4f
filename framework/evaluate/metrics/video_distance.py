"""The Fréchet distance of the videos made to the real ones, in the features that name it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from framework.evaluate.metrics.features import VideoFeatures
from framework.evaluate.metrics.frechet import Moments, frechet_distance
from framework.evaluate.metrics.metric import Sample


@dataclass(frozen=True)
class VideoDistance:
    """`frechet_<features>`, and how many videos it rests on."""

    features: VideoFeatures

    def __call__(self, samples: Sequence[Sample]) -> dict[str, float]:
        """ValueError with fewer than 2 samples."""
        real, made = Moments(self.features.dim), Moments(self.features.dim)
        real.update(np.stack([self.features(sample.real) for sample in samples]))
        made.update(np.stack([self.features(sample.made) for sample in samples]))
        found = frechet_distance(real, made)
        return {
            f"frechet_{self.features.name}": found.distance,
            "frechet_num_videos": found.num_b,
        }
