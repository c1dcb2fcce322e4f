"""The Fréchet distance between two sets of feature vectors, each taken as a Gaussian.

|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Dowson and Landau 1982. Its estimate from N
vectors is biased upward, by about 1/N: compare only distances of equal N, on both sides.
"""

from dataclasses import dataclass

import numpy as np


class Moments:
    """Mean and covariance of a stream of vectors, in float64; parts merge without loss."""

    def __init__(self, dim: int) -> None:
        """`dim`: D, the length of a vector."""
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of (x - mean) (x - mean)^T

    def update(self, features: np.ndarray) -> None:
        """Take in vectors (N, D). ValueError where one is not finite or of another length."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of {features.shape} must be (N, {len(self.mean)})")
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite; look at the videos that it comes from")
        if len(features) == 0:
            return
        part = Moments(len(self.mean))
        part.count = len(features)
        part.mean = features.mean(axis=0, dtype=np.float64)
        centred = features.astype(np.float64) - part.mean
        part._scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: "Moments") -> None:
        """Take in all that `other` has seen; Chan, Golub and LeVeque 1983."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        weight = self.count * other.count / total
        self._scatter += other._scatter + weight * np.outer(delta, delta)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), unbiased. ValueError with fewer than 2 vectors."""
        if self.count < 2:
            raise ValueError(f"{self.count} vectors have no covariance; give at least 2")
        return self._scatter / (self.count - 1)


@dataclass(frozen=True)
class Frechet:
    """A distance and the sizes of the two sets that it comes from; it means little without them."""

    distance: float
    num_a: int
    num_b: int


def frechet_distance(a: Moments, b: Moments) -> Frechet:
    """The squared Fréchet distance of two sets. ValueError where one has fewer than 2 vectors."""
    covariance_a, covariance_b = a.covariance, b.covariance
    # tr (S_a S_b)^(1/2) is the nuclear norm of R_a^T R_b, where S = R R^T: exact also for singular
    # covariances, where a matrix square root turns complex.
    cross = np.linalg.norm(_root(covariance_a).T @ _root(covariance_b), ord="nuc")
    gap = a.mean - b.mean
    distance = gap @ gap + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return Frechet(max(float(distance), 0.0), a.count, b.count)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (D, D) with R R^T = covariance (D, D)."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0))
