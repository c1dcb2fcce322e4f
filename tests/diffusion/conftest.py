from collections.abc import Callable, Sequence

import pytest
import torch

from framework.batch import Clip, PackedBatch

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
        batch = PackedBatch.from_clips(
            [
                Clip(
                    tokens=tokens,
                    grid=(len(tokens), 1, 1),
                    text=torch.arange(2 * i, 2 * i + 2),
                    clip_id=clip_id,
                    fps=8.0,
                    epoch=epoch,
                    weight=weights[i] if weights else 1.0,
                )
                for i, (clip_id, tokens) in enumerate(zip(clip_ids, rows, strict=True))
            ],
            num_segments=len(clip_ids) + 1,
            max_tokens=sum(num_tokens) + padding,
        )
        batch.given_mask[list(given)] = True
        return batch

    return make
