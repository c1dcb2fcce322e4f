"""Rotary positions in three dimensions: time, height, width (Su et al. 2021).

Shapes: B segments, L tokens, N heads, d head dim. A position is the row of a token in its own
clip's grid, so it does not depend on where the clip lies in the pack, nor on fps.
"""

import torch
from torch import Tensor

from model_zoo.protocols import Layout

AxisPairs = tuple[int, int, int]  # rotated channel pairs of a head for time, height, width


def token_positions(grid: Tensor, cu_seqlens: Tensor, segment_ids: Tensor) -> Tensor:
    """Time, height and width row of each token; token order is row-major in (time, height, width).

    grid (B, 3), cu_seqlens (B+1,), segment_ids (L,) -> (L, 3) int64. A segment whose grid is zero
    (padding) counts upwards in time.
    """
    index = torch.arange(segment_ids.shape[0], device=segment_ids.device)  # (L,)
    index = index - cu_seqlens.long()[segment_ids]
    height, width = grid.long().clamp(min=1)[:, 1:][segment_ids].unbind(-1)  # (L,), (L,)
    return torch.stack([index // (height * width), index // width % height, index % width], dim=-1)


def axis_pairs(head_dim: int) -> AxisPairs:
    """Wan's split of the d/2 rotated pairs into time, height, width: (p - 2 (p//3), p//3, p//3).

    Raises ValueError where a head cannot serve all three axes.
    """
    pairs = head_dim // 2
    if head_dim % 2 or pairs < 3:
        raise ValueError(f"head_dim={head_dim} must be even and at least 6; change num_heads")
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def rotations(
    positions: Tensor, head_dim: int, theta: float, axes: AxisPairs | None = None
) -> Tensor:
    """Unit complex numbers by which each pair of a head's channels turns.

    positions (L, 3) -> (L, 1, d/2) complex64; pair j of an axis with m pairs turns by
    position * theta^(-j/m). axes: pairs of each axis, d/2 in all; `axis_pairs` where left out.
    """
    angles = []
    for axis, pairs in enumerate(axes or axis_pairs(head_dim)):
        exponent = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
        angles.append(positions[:, axis, None] * theta**-exponent)  # (L, pairs)
    angle = torch.cat(angles, dim=-1).unsqueeze(1)  # (L, 1, d/2)
    return torch.polar(torch.ones_like(angle), angle)


def pack_rotations(
    layout: Layout, head_dim: int, theta: float, axes: AxisPairs | None = None
) -> Tensor:
    """`rotations` of all tokens of a pack, (L, 1, d/2) complex64; made once a forward pass."""
    positions = token_positions(layout.grid, layout.cu_seqlens, layout.segment_ids)
    return rotations(positions, head_dim, theta, axes)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x (L, N, d) by rotation (L, 1, d/2); computed in float32.

    One complex product: a quarter of the time of its four real ones on a CPU.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (L, N, d/2)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)  # (L, N, d)
