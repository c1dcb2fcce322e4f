"""How uneven the work of a step was, by predicted cost."""

from collections.abc import Sequence

import torch

from framework.data.plan.cost import CostModel
from framework.train.loop import StepOutput
from framework.train.observers.meters.meter import Meter


class Imbalance(Meter[list[float]]):
    """speed/imbalance: a step's dearest rank over the mean of all, on the average of a window."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._costs: list[float] = []  # of this rank's packs, a step each

    def step(self, output: StepOutput) -> None:
        """Predict the cost of this rank's packs."""
        lengths = [
            batch.cu_seqlens.diff()[batch.clip_ids >= 0].numpy() for batch, _ in output.inputs.packs
        ]
        self._costs.append(float(sum(self._cost.clip_costs(tokens).sum() for tokens in lengths)))

    def measure(self) -> list[float]:
        """Of each step."""
        costs, self._costs = self._costs, []
        return costs

    def figures(self, by_rank: Sequence[list[float]]) -> dict[str, float]:
        """Of all ranks."""
        costs = torch.tensor(by_rank, dtype=torch.float64)  # (W, steps)
        uneven = (costs.amax(0) / costs.mean(0).clamp(min=1e-30)).mean()
        return {"speed/imbalance": uneven.item()}
