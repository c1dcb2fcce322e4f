"""Rotary positions in three dimensions: time, height, width (Su et al. 2021).

Shapes: B segments, L tokens, N heads, d head dim. A position is the row of a token in its own
clip's grid, so it does not depend on where the clip lies in the pack, nor on fps.
"""

import torch
from torch import Tensor

from model_zoo.protocols import Layout

AxisPairs = tuple[int, int, int]  # rotated channel pairs of a head for time, height, width


def token_positions(layout: Layout) -> Tensor:
    """Time, height and width row of each token in its clip's grid, (L, 3) int64.

    A segment whose grid is zero (padding) counts upwards in time.
    """
    index = layout.token_index  # (L,)
    sides = layout.grid.long().clamp(min=1)[layout.segment_ids]  # (L, 3)
    _, height, width = sides.unbind(-1)
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
    """Unit complex numbers by which each pair of a head's channels turns, as real pairs.

    positions (L, 3) -> (L, 1, d/2, 2) float32; pair j of an axis with m pairs turns by
    position * theta^(-j/m). axes: pairs of each axis, d/2 in all; `axis_pairs` where left out.
    """
    angles = []
    for axis, pairs in enumerate(axes or axis_pairs(head_dim)):
        exponent = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
        angles.append(positions[:, axis, None] * theta**-exponent)  # (L, pairs)
    angle = torch.cat(angles, dim=-1).unsqueeze(1)  # (L, 1, d/2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def pack_rotations(
    layout: Layout, head_dim: int, theta: float, axes: AxisPairs | None = None
) -> Tensor:
    """`rotations` of all tokens of a pack, (L, 1, d/2, 2); made once a forward pass."""
    return rotations(token_positions(layout), head_dim, theta, axes)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x (L, N, d) by rotation (L, 1, d/2, 2), in float32.

    One complex product: a quarter of the time of its four real ones on a CPU. Compiled code has no
    complex numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (L, N, d/2, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)  # 2 x 2 x (L, N, d/2)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)  # (L, N, d/2)
        turned = torch.view_as_real(product)
    return turned.flatten(-2).to(x.dtype)  # (L, N, d)
