"""The parts of the loss: the objective's own sums, and the loss by source, as means over a window.

Shapes: B segments.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from framework.batch import PackedBatch
from framework.train.loop import StepOutput
from framework.train.observers.meters.meter import Meter

MAX_NAME_CHARS = 100  # of a source in a metric; MLflow takes 250 with all that stands before it
Sums = dict[str, tuple[float, float]]  # name of a metric -> sum of loss, and of what it is over


class LossParts(Meter[Sums]):
    """Adds up what each pack gave; a part that met nothing is left out."""

    def __init__(self, sources: Sequence[str]) -> None:
        """sources: names by `PackedBatch.source`, as `Plan.sources` has them."""
        self._sources = source_metrics(sources)
        self._sums: dict[str, Tensor] = {}  # (2,) float64

    def step(self, output: StepOutput) -> None:
        """Add the packs of a step, whose end was waited for: reading them costs no time."""
        for (batch, _), losses in zip(output.inputs.packs, output.losses, strict=False):
            by_clip = losses.by_clip.cpu()
            self._add({**_on_cpu(losses.sums), **loss_by_source(batch, by_clip, self._sources)})

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def measure(self) -> Sums:
        """Of this rank; adding begins anew."""
        sums, self._sums = self._sums, {}
        return {name: (value[0].item(), value[1].item()) for name, value in sums.items()}

    def figures(self, by_rank: Sequence[Sums]) -> dict[str, float]:
        """The named losses of the objective and those of the sources: means over all ranks."""
        figures = {}
        for name in sorted({name for sums in by_rank for name in sums}):
            loss, over = (sum(sums[name][i] for sums in by_rank if name in sums) for i in (0, 1))
            if over > 0:
                figures[name] = loss / over
        return figures


def loss_by_source(
    batch: PackedBatch, by_clip: Tensor, metrics: Sequence[str]
) -> dict[str, Tensor]:
    """(2,) float64 for each source that bears loss: sums of loss and of tokens; all on the CPU."""
    tokens = torch.zeros_like(by_clip, dtype=torch.float64)
    tokens.index_add_(0, batch.segment_ids, batch.loss_mask.double())  # (B,)
    both = torch.stack([by_clip.double(), tokens])  # (2, B)
    known = (tokens > 0) & (batch.source >= 0) & (batch.source < len(metrics))
    sums = torch.zeros(2, len(metrics), dtype=torch.float64)
    sums.index_add_(1, batch.source[known].long(), both[:, known])
    seen = batch.source[known].unique().tolist()
    return {metrics[source]: sums[:, source] for source in seen}


def source_metrics(sources: Sequence[str]) -> list[str]:
    """A metric for each source, all different; MLflow takes letters, digits and `_ - . : space`."""
    names: list[str] = []
    for source in sources:
        # A slash would make a section of its own, and a path like `..` is refused.
        name = re.sub(r"[^\w\-.: ]", "_", source[:MAX_NAME_CHARS], flags=re.ASCII)
        name = name if name.strip(". ") else f"source_{len(names)}"
        while name in names:
            name += "_"
        names.append(name)
    return [f"loss_by_source/{name}" for name in names]


def _on_cpu(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By one transfer."""
    if not sums:
        return {}
    together = torch.stack([value.double() for value in sums.values()]).cpu()
    return dict(zip(sums, together, strict=True))
