"""Absolute positions that are not learned: sines and cosines, added to the tokens.

Shapes: B segments, L tokens, D width. Positions are rows in a clip's own grid, as in `rope`.
"""

import torch
from torch import Tensor

from model_zoo.layers import sinusoidal_embedding
from model_zoo.protocols import Layout
from model_zoo.rope import token_positions


def pack_sincos(layout: Layout, hidden_size: int) -> Tensor:
    """What is added to each token of a pack, (L, D) float32; `hidden_size` must be divisible by 4.

    In the image plane as in DiT (Peebles and Xie 2023, after MAE): half of the channels tell the
    column, half the row. Time, which DiT has not, is added in all channels as in Latte (Ma et al.
    2024), less what it is at the first step, so that an image is positioned exactly as in DiT.
    """
    time, row, column = token_positions(layout).unbind(-1)  # 3 x (L,)
    plane = torch.cat(
        [_axis(column, hidden_size // 2), _axis(row, hidden_size // 2)], dim=-1
    )  # (L, D)
    return plane + _axis(time, hidden_size) - _axis(torch.zeros_like(time[:1]), hidden_size)


def _axis(position: Tensor, dim: int) -> Tensor:
    """(n,) -> (n, dim): sines, then cosines, of frequencies 10000^(-2i/dim)."""
    return sinusoidal_embedding(position, dim).roll(dim // 2, dims=-1)
