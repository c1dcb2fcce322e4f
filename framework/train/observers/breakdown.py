"""The loss by noise level and by source, as means over the loss-bearing tokens of a window.

Sums are kept on the device: adding a pack makes the step wait for nothing. At a window's end `take`
fetches them in one transfer; the caller sums them over ranks, and `metrics` names the quotients.

Shapes: B segments, S sums: one for each bin of t, one for each source, one for what has neither.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from framework.batch import PackedBatch


class Breakdown:
    """Sums of loss and of tokens since the last `take`."""

    def __init__(
        self, sources: Sequence[str], device: torch.device | str, *, num_bins: int = 10
    ) -> None:
        """sources: names by `PackedBatch.source`, as `Plan.sources` has them; empty: no such split.

        num_bins: equal parts of t in [0, 1]; t = 0 is data. 10 or 5 give names that read well.
        """
        if num_bins < 1:
            raise ValueError(f"num_bins={num_bins} must be at least 1; try 10")
        edges = [round(i / num_bins, 4) for i in range(num_bins + 1)]
        bins = [f"loss/t_{low}-{high}" for low, high in pairwise(edges)]
        self.names = bins + _source_metrics(sources)
        self._num_bins, self._num_sources = num_bins, len(sources)
        self._sums = torch.zeros(2, len(self.names) + 1, dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, t: Tensor, loss_sums: Tensor) -> None:
        """Add a pack; batch, t (B,) and `Objective.loss`'s sums (B,) lie on the device."""
        tokens = torch.zeros_like(loss_sums, dtype=torch.float64)
        tokens.index_add_(0, batch.segment_ids, batch.loss_mask.double())  # (B,)
        both = torch.stack([loss_sums.detach().double(), tokens])  # (2, B)
        nowhere = len(self.names)
        bears_loss = tokens > 0
        bins = (t * self._num_bins).long().clamp(0, self._num_bins - 1)
        bins = torch.where(bears_loss, bins, nowhere)
        known = bears_loss & (batch.source >= 0) & (batch.source < self._num_sources)
        sources = torch.where(known, batch.source.long() + self._num_bins, nowhere)
        self._sums.index_add_(1, bins, both).index_add_(1, sources, both)

    def take(self) -> Tensor:
        """(2, S) float64 on the CPU: sums of loss and of tokens; adding begins anew."""
        sums = self._sums.cpu().clone()
        self._sums.zero_()
        return sums

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """What `take` gave, summed over ranks -> loss a token; what met no token is left out."""
        rows = zip(self.names, *sums[:, :-1].tolist(), strict=True)
        return {name: loss / tokens for name, loss, tokens in rows if tokens > 0}


def _source_metrics(sources: Sequence[str]) -> list[str]:
    """A metric for each source, all different; MLflow takes letters, digits and `_ - . : space`."""
    names: list[str] = []
    for source in sources:
        # A slash would make a section of its own, and a path like `..` is refused.
        name = re.sub(r"[^\w\-.: ]", "_", source, flags=re.ASCII)
        name = name if name.strip(". ") else f"source_{len(names)}"
        while name in names:
            name += "_"
        names.append(name)
    return [f"loss_by_source/{name}" for name in names]
