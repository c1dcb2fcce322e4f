"""An exponential moving average of the weights, over whatever shards of them a rank holds.

The update is elementwise, so that it needs no communication and does not know how the weights are
cut.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_decay_at(decay: float, num_updates: int) -> float:
    """The decay of the next update after `num_updates` of them: `decay`, less in the beginning.

    The ramp (1 + n) / (10 + n) is that of TensorFlow's `ExponentialMovingAverage`: a young average
    forgets its random start.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def update_ema(
    ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float, num_updates: int
) -> None:
    """In place: ema = d * ema + (1 - d) * weights, d = `ema_decay_at(decay, num_updates)`.

    `ema` and `weights` are float32 tensors of pairwise equal shapes.
    """
    average = get_ema_multi_avg_fn(ema_decay_at(decay, num_updates))
    average(list(ema), list(weights), None)


def check_decay(decay: float) -> None:
    """ValueError where `decay` is not in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay={decay} must lie in [0, 1); try 0.999, or 0 for no averaging")
