from dataclasses import fields

import torch
from torch import Tensor

from framework.batch import PackedBatch


def small_pack() -> PackedBatch:
    """L = 10: a clip of 3 tokens, one of 4 that failed, an empty segment, 3 tokens of padding."""
    given = torch.zeros(10, dtype=torch.bool)
    given[0] = True
    return PackedBatch(
        tokens=torch.arange(20.0).reshape(10, 2),
        grid=torch.tensor([[3, 1, 1], [1, 2, 2], [0, 0, 0], [3, 1, 1]], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3, 7, 7, 10], dtype=torch.int32),
        text=torch.tensor([5, 6, 7, 0]),
        cu_text=torch.tensor([0, 2, 3, 3, 4], dtype=torch.int32),
        clip_ids=torch.tensor([11, 12, -1, -1]),
        clip_epochs=torch.tensor([1, 1, 0, 0]),
        clip_weights=torch.tensor([0.5, 0.0, 0.0, 0.0]),
        source=torch.zeros(4, dtype=torch.int32),
        fps=torch.tensor([8.0, 8.0, 0.0, 0.0]),
        given_mask=given,
        epoch=1,
        step=2,
        pack=3,
        failed=("clip-12: no frame",),
    )


def test_segments_cover_every_token() -> None:
    pack = small_pack()
    assert pack.num_segments == 4
    assert pack.segment_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 3, 3, 3]
    assert pack.segment_ids.dtype == torch.int64


def test_given_failed_and_padding_tokens_bear_no_loss() -> None:
    mask = small_pack().loss_mask
    assert mask.tolist() == [0.0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]
    assert mask.dtype == torch.float32


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    pack = small_pack()
    moved = pack.to("meta")
    for field in fields(PackedBatch):
        old, new = getattr(pack, field.name), getattr(moved, field.name)
        if isinstance(old, Tensor):
            assert new.device.type == "meta"
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        else:
            assert new == old
    assert pack.tokens.device.type == "cpu"
    # Known without reading a tensor, so that a pack on a GPU costs no synchronisation.
    assert moved.segment_ids.shape == (10,)
