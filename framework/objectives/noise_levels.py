"""The loss by noise level, as named sums that a diffusion objective reports.

Shapes: B segments, L video tokens.
"""

from itertools import pairwise

import torch
from torch import Tensor

from framework.batch import PackedBatch

NUM_BINS = 10  # equal parts of t in [0, 1]: 10 or 5 give names that read well


def _names(num_bins: int) -> list[str]:
    edges = [round(i / num_bins, 4) for i in range(num_bins + 1)]
    return [f"loss/t_{low}-{high}" for low, high in pairwise(edges)]


NAMES = tuple(_names(NUM_BINS))


def loss_by_noise_level(batch: PackedBatch, t: Tensor, by_clip: Tensor) -> dict[str, Tensor]:
    """Name of a bin of t -> (2,) float64 on the device: sums of loss and of its weighted tokens.

    batch, t (B,) and by_clip (B,), loss sums of clips, lie on one device. All bins are named, those
    that met no token with zeros: to leave them out, the device would have to be waited for.
    """
    tokens = torch.zeros_like(by_clip, dtype=torch.float64)
    tokens.index_add_(0, batch.segment_ids, batch.loss_mask.double())  # (B,)
    both = torch.stack([by_clip.detach().double(), tokens])  # (2, B)
    bins = (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    bins = torch.where(tokens > 0, bins, NUM_BINS)  # the last one is read by nobody
    sums = torch.zeros(2, NUM_BINS + 1, dtype=torch.float64, device=by_clip.device)
    sums.index_add_(1, bins, both)
    return dict(zip(NAMES, sums[:, :-1].unbind(1), strict=True))
