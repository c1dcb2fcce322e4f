"""Steps as a loop gives them, made by hand: clips of one token each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.batch import PackedBatch, ReadStats
from framework.objectives.objective import Losses
from framework.train.engine.protocol import StepStats
from framework.train.loop import StepInput, StepOutput


def pack(
    clip_ids: Sequence[int],
    *,
    lengths: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    source: Sequence[int] | None = None,
    failed: tuple[str, ...] = (),
    read: ReadStats | None = None,
) -> PackedBatch:
    """Clips of these ids, of one token each where no `lengths` are given."""
    count = len(clip_ids)
    sizes = torch.tensor(lengths or [1] * count)
    num_tokens = int(sizes.sum())
    return PackedBatch(
        tokens=torch.zeros(num_tokens, 2),
        grid=torch.stack([sizes, torch.ones(count), torch.ones(count)], dim=1).int(),
        cu_seqlens=torch.cat([torch.zeros(1), sizes.cumsum(0)]).int(),
        text=torch.zeros(count, dtype=torch.int64),
        cu_text=torch.arange(count + 1, dtype=torch.int32),
        clip_ids=torch.tensor(clip_ids),
        clip_epochs=torch.zeros(count, dtype=torch.int64),
        clip_weights=torch.tensor(weights or [1.0] * count),
        source=torch.tensor(source or [0] * count, dtype=torch.int32),
        fps=torch.ones(count),
        given_mask=torch.zeros(num_tokens, dtype=torch.bool),
        failed=failed,
        read=read or ReadStats(),
    )


def step_output(
    step: int,
    *packs: PackedBatch,
    loss: float = 1.0,
    skipped: str = "",
    by_clip: Sequence[Tensor] | None = None,
    sums: Mapping[str, Tensor] | None = None,
    **inputs: Any,
) -> StepOutput:
    """A step of these packs, or of one clip whose id is the step's number."""
    batches = packs or (pack([step]),)
    tokens = sum(len(batch.tokens) for batch in batches)
    losses = by_clip or [torch.zeros(batch.num_segments) for batch in batches]
    fields = {"num_averaged": tokens, "tokens": tokens, **inputs}
    given = StepInput(step, 0, step, packs=[(batch, None) for batch in batches], **fields)
    stats = StepStats(grad_norm=0.5, lr=0.1)
    return StepOutput(given, loss, [Losses(one, sums or {}) for one in losses], stats, skipped)
