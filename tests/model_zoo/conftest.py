"""Small packs for the tests of models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from framework.batch import Clip, PackedBatch

# Models this small are slower on several threads, by far so where others use the machine.
torch.set_num_threads(1)

Grid = tuple[int, int, int]
MakePack = Callable[..., PackedBatch]


def _make_pack(
    grids: Sequence[Grid],
    text_lengths: Sequence[int],
    token_size: int,
    vocab: int | None = 258,
    text_dim: int | None = None,
    padding: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> PackedBatch:
    """Clips of these grids, an empty segment, and a padding segment of (video, text) tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [math.prod(grid) for grid in grids]
    num_tokens, num_text = sum(lengths) + padding[0], sum(text_lengths) + padding[1]
    if text_dim is None:
        text = torch.randint(0, vocab or 1, (num_text,), generator=generator)
    else:
        text = torch.randn(num_text, text_dim, generator=generator)
    tokens = torch.randn(num_tokens, token_size, generator=generator)
    pack = PackedBatch.from_clips(
        [
            Clip(rows, grid, words, clip_id=i, fps=8.0)
            for i, (rows, grid, words) in enumerate(
                zip(
                    tokens.split([*lengths, padding[0]])[:-1],
                    grids,
                    text.split([*text_lengths, padding[1]])[:-1],
                    strict=True,
                )
            )
        ],
        num_segments=len(grids) + 2,
        max_tokens=num_tokens,
        max_text_tokens=num_text,
    )
    pack.grid[-1] = 0  # the grid of the padding segment is of no account
    return replace(pack, tokens=tokens, text=text)  # random in the padding segment, too


@pytest.fixture
def make_pack() -> MakePack:
    return _make_pack
