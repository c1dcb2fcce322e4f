"""Small packs for the tests of models."""

from collections.abc import Callable, Sequence

import pytest
import torch

from framework.batch import PackedBatch

# Models this small are slower on several threads, by far so where others use the machine.
torch.set_num_threads(1)

Grid = tuple[int, int, int]
MakePack = Callable[..., PackedBatch]


def _cumulated(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


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
    lengths = [f * h * w for f, h, w in grids] + [0, padding[0]]
    text_lengths = [*text_lengths, 0, padding[1]]
    num_tokens, num_text, num_segments = sum(lengths), sum(text_lengths), len(lengths)
    if text_dim is None:
        text = torch.randint(0, vocab or 1, (num_text,), generator=generator)
    else:
        text = torch.randn(num_text, text_dim, generator=generator)
    weights = torch.ones(num_segments)
    weights[-2:] = 0
    return PackedBatch(
        tokens=torch.randn(num_tokens, token_size, generator=generator),
        grid=torch.tensor([*grids, (0, 0, 0), (0, 0, 0)], dtype=torch.int32),
        cu_seqlens=_cumulated(lengths),
        text=text,
        cu_text=_cumulated(text_lengths),
        clip_ids=torch.arange(num_segments),
        clip_epochs=torch.zeros(num_segments, dtype=torch.int64),
        clip_weights=weights,
        source=torch.zeros(num_segments, dtype=torch.int32),
        fps=torch.full((num_segments,), 8.0),
        given_mask=torch.zeros(num_tokens, dtype=torch.bool),
    )


@pytest.fixture
def make_pack() -> MakePack:
    return _make_pack
