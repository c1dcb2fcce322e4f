"""Predicted cost of a pack, by which the planner puts alike packs into one step."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CostModel:
    """Cost of a clip of n tokens: `linear * n + quadratic * n^2`, in units of one's own choice.

    The coefficients are constants of the recipe, never measured at start-up: another machine must
    make the same plan. They are integers, so that no rounding can reorder packs. A transformer of
    width d with an MLP ratio of 4 spends 24 d^2 n + 4 d n^2 FLOPs a layer and direction, which is
    linear = 6 d for quadratic = 1. Text is left out: it is short beside video.
    """

    linear: int
    quadratic: int = 1

    def __post_init__(self) -> None:
        for name in ("linear", "quadratic"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative; use 0 to leave it out")
        if self.linear == self.quadratic == 0:
            raise ValueError("linear=0 and quadratic=0 make all packs equal; use linear=1")

    def clip_costs(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) numbers of tokens -> (n,) int64 costs."""
        tokens = tokens.astype(np.int64)
        return tokens * (self.linear + self.quadratic * tokens)
