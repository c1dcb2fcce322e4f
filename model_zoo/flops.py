"""FLOPs of a pack in closed form, for MFU, plans, estimates and tests.

A multiplication with its addition is two FLOPs; only matrix products count, as in
`torch.utils.flop_counter`. Each model's config says what its forward pass takes, as `Work`.
Shapes: a clip has n = f * h * w video tokens, its grid, and k text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Grid = tuple[int, int, int]  # tokens in time, height, width


@dataclass(frozen=True)
class Work:
    """What a forward pass takes, by what it grows with.

    Weights count those in matrices, times how often each token (or clip) passes them. Widths are
    sums over layers of the attention's width (heads times head dim).
    """

    video_weights: int  # passed by each video token: MFU's N
    text_weights: int = 0  # by each text token
    clip_weights: int = 0  # by each clip once: time, modulation
    self_widths: int = 0  # video tokens of a clip to one another
    cross_widths: int = 0  # video tokens to text tokens
    joint_widths: int = 0  # video and text tokens together, to both
    clip_tokens: int = 0  # of each clip, that join these two
    text_widths: int = 0  # text tokens to one another
    space_widths: int = 0  # video tokens of one time step to one another
    time_widths: int = 0  # video tokens of one place to one another


def forward_flops(work: Work, grids: Sequence[Grid], text_lengths: Sequence[int]) -> int:
    """FLOPs of one forward pass of a pack of clips of these grids and text lengths."""
    weights = work.clip_weights * len(grids)
    pairs = 0
    for (f, h, w), k in zip(grids, text_lengths, strict=True):
        n = f * h * w
        weights += work.video_weights * n + work.text_weights * k
        pairs += work.self_widths * n * n + work.cross_widths * n * k
        pairs += work.joint_widths * (n + k + work.clip_tokens) ** 2 + work.text_widths * k * k
        pairs += work.space_widths * f * (h * w) ** 2 + work.time_widths * h * w * f * f
    return 2 * weights + 4 * pairs  # q k^T and weights v


def training_flops_per_token(work: Work, grids: Sequence[Grid]) -> float:
    """FLOPs that MFU counts for one video token: 6 N + 12 layers D (sum n^2 / sum n).

    Forward and backward, without recomputation. Text, and what acts once a clip, are left out
    (PaLM's convention, Chowdhery et al. 2022, appendix B).
    """
    tokens = sum(map(prod, grids))
    video = Work(
        video_weights=work.video_weights,
        self_widths=work.self_widths + work.joint_widths,
        space_widths=work.space_widths,
        time_widths=work.time_widths,
    )
    return 3 * forward_flops(video, grids, [0] * len(grids)) / max(1, tokens)


def cost_coefficients(work: Work, text_tokens: int) -> tuple[int, int]:
    """(linear, quadratic): a clip of n tokens takes linear * n + quadratic * n^2 forward FLOPs.

    `text_tokens` is the usual length of a caption, whose attention to and from the clip is part of
    the linear term. These are constants for a recipe; what is equal for all clips is left out, and
    so is attention within one time step or place, which is short.
    """
    joint = 2 * work.joint_widths * (text_tokens + work.clip_tokens)
    attention = 4 * (work.cross_widths * text_tokens + joint)
    quadratic = 4 * (work.self_widths + work.joint_widths)
    return 2 * work.video_weights + attention, quadratic
