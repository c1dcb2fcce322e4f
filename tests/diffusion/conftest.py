from collections.abc import Callable, Sequence

import pytest
import torch

from framework.batch import PackedBatch

PackMaker = Callable[..., PackedBatch]


@pytest.fixture
def make_pack() -> PackMaker:
    """A pack of clips given by id, each always with its own tokens, then a padding segment."""

    def make(
        clip_ids: Sequence[int],
        *,
        lengths: dict[int, int] | None = None,
        std: torch.Tensor | None = None,
        num_values: int = 6,
        padding: int = 3,
        epoch: int = 0,
        weights: Sequence[float] | None = None,
        given: Sequence[int] = (),
    ) -> PackedBatch:
        scale = torch.ones(num_values) if std is None else std
        num_tokens = [(lengths or {}).get(clip_id, 2 + clip_id % 4) for clip_id in clip_ids]
        rows = [
            scale * torch.randn(n, len(scale), generator=torch.Generator().manual_seed(clip_id))
            for clip_id, n in zip(clip_ids, num_tokens, strict=True)
        ]
        sizes = torch.tensor([0, *num_tokens, padding])
        text_sizes = torch.tensor([0] + [2] * len(clip_ids) + [0])
        given_mask = torch.zeros(int(sizes.sum()), dtype=torch.bool)
        given_mask[list(given)] = True
        return PackedBatch(
            tokens=torch.cat([*rows, torch.zeros(padding, len(scale))]),
            grid=torch.tensor([[n, 1, 1] for n in [*num_tokens, padding]], dtype=torch.int32),
            cu_seqlens=sizes.cumsum(0).int(),
            text=torch.arange(2 * len(clip_ids)),
            cu_text=text_sizes.cumsum(0).int(),
            clip_ids=torch.tensor([*clip_ids, -1]),
            clip_epochs=torch.full((len(clip_ids) + 1,), epoch),
            clip_weights=torch.tensor([*(weights or [1.0] * len(clip_ids)), 0.0]),
            source=torch.zeros(len(clip_ids) + 1, dtype=torch.int32),
            fps=torch.full((len(clip_ids) + 1,), 8.0),
            given_mask=given_mask,
        )

    return make
