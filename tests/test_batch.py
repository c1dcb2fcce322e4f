from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.batch import PER_SEGMENT, PER_TOKEN, Clip, PackedBatch, ReadStats


def clip(clip_id: int, num_tokens: int, text: Sequence[int] = (), **others: Any) -> Clip:
    tokens = 100.0 * clip_id + torch.arange(2.0 * num_tokens).reshape(num_tokens, 2)
    return Clip(
        **{
            "tokens": tokens,
            "grid": (num_tokens, 1, 1),
            "text": torch.tensor(text, dtype=torch.int64),
            "clip_id": clip_id,
            "fps": 8.0,
        }
        | others
    )


def small_pack() -> PackedBatch:
    """L = 10: a clip of 3 tokens, one of 4 that failed, an empty segment, 3 tokens of padding."""
    given = torch.tensor([True, False, False])
    batch = PackedBatch.from_clips(
        [
            clip(11, 3, (5, 6), epoch=1, weight=0.5, given=given),
            clip(12, 4, (7,), epoch=1, weight=0.0, source=1, grid=(1, 2, 2)),
        ],
        num_segments=4,
        max_tokens=10,
        max_text_tokens=4,
    )
    return replace(
        batch,
        epoch=1,
        epoch_step=2,
        pack=3,
        failed=("clip-12: no frame",),
        read=ReadStats(2, 99, 0.5, 0.25),
    )


def masked_pack() -> PackedBatch:
    """Of a 2 x 2 x 2 clip tokens 1, 4 and 6 are kept, of another one all; then padding."""
    kept = clip(3, 3, (1, 2), grid=(2, 2, 2), index=torch.tensor([1, 4, 6]), epoch=5)
    return PackedBatch.from_clips([kept, clip(4, 2, (3,))], num_segments=3, max_tokens=7)


def tensor_fields() -> set[str]:
    hints = get_type_hints(PackedBatch)
    return {f.name for f in fields(PackedBatch) if hints[f.name] in (Tensor, Tensor | None)}


def assert_equal(one: PackedBatch, two: PackedBatch) -> None:
    for field in fields(PackedBatch):
        ours, theirs = getattr(one, field.name), getattr(two, field.name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def test_a_pack_by_hand() -> None:
    by_hand = PackedBatch(
        tokens=torch.cat([clip(11, 3).tokens, clip(12, 4).tokens, torch.zeros(3, 2)]),
        grid=torch.tensor([[3, 1, 1], [1, 2, 2], [0, 0, 0], [1, 1, 3]], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3, 7, 7, 10], dtype=torch.int32),
        text=torch.tensor([5, 6, 7, 0]),
        cu_text=torch.tensor([0, 2, 3, 3, 4], dtype=torch.int32),
        clip_ids=torch.tensor([11, 12, -1, -1]),
        clip_epochs=torch.tensor([1, 1, 0, 0]),
        clip_weights=torch.tensor([0.5, 0.0, 0.0, 0.0]),
        source=torch.tensor([0, 1, -1, -1], dtype=torch.int32),
        fps=torch.tensor([8.0, 8.0, 0.0, 0.0]),
        given_mask=torch.arange(10) == 0,
        epoch=1,
        epoch_step=2,
        pack=3,
        failed=("clip-12: no frame",),
        read=ReadStats(2, 99, 0.5, 0.25),
    )
    assert_equal(small_pack(), by_hand)


def test_without_limits_a_pack_is_what_its_clips_fill() -> None:
    clips = [clip(11, 3, (5, 6)), clip(12, 4, (7,))]
    tight = PackedBatch.from_clips(clips)
    assert (tight.num_segments, len(tight.tokens), len(tight.text)) == (2, 7, 3)
    assert tight.index is None
    with_room = PackedBatch.from_clips(clips, num_segments=4)
    assert with_room.cu_seqlens.tolist() == [0, 3, 7, 7, 7]
    assert torch.equal(with_room.tokens, tight.tokens)


def test_dropped_tokens_leave_the_others_their_places() -> None:
    pack = masked_pack()
    assert pack.index is not None
    assert pack.index.dtype == torch.int32
    assert pack.token_index.tolist() == [1, 4, 6, 0, 1, 0, 1]


@pytest.mark.parametrize("pack", [small_pack(), masked_pack()], ids=["whole", "masked"])
def test_the_way_through_arrays_changes_nothing(pack: PackedBatch) -> None:
    arrays = pack.to_arrays()
    assert np.shares_memory(arrays["tokens"], pack.tokens.numpy())  # no copy on the way in
    assert not any(isinstance(value, Tensor) for value in arrays.values())
    for value in arrays.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False  # as Ray has them
    back = PackedBatch.from_arrays(arrays)
    assert_equal(back, pack)
    back.tokens[0] = -1.0
    assert pack.tokens[0, 0] != -1.0


def test_every_tensor_of_a_pack_is_doubled() -> None:
    """A field that is added must be said to be of tokens or of segments."""
    listed = [*PER_TOKEN, *PER_SEGMENT, "text", "cu_seqlens", "cu_text"]
    assert sorted(listed) == sorted(tensor_fields())
    pack = masked_pack()
    both = pack.twice(torch.tensor([97]))
    for name in (*PER_TOKEN, *PER_SEGMENT):
        once, doubled = getattr(pack, name), getattr(both, name)
        assert torch.equal(doubled, torch.cat([once, once])), name
        assert len(once) == (len(pack.tokens) if name in PER_TOKEN else pack.num_segments), name
    for field in fields(PackedBatch):
        if field.name not in tensor_fields():
            assert getattr(both, field.name) == getattr(pack, field.name), field.name


def test_both_halves_know_where_their_tokens_are() -> None:
    """With dropped tokens the copy had the places of the first half alone, and no epochs."""
    both = masked_pack().twice(torch.tensor([97]))
    assert both.token_index.tolist() == [1, 4, 6, 0, 1, 0, 1] * 2
    assert both.clip_epochs.tolist() == [5, 0, 0] * 2
    assert both.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    whole = PackedBatch.from_clips([clip(1, 3), clip(2, 2)]).twice(torch.tensor([97]))
    assert whole.token_index.tolist() == [0, 1, 2, 0, 1] * 2


def test_the_second_half_has_the_empty_caption() -> None:
    null = torch.tensor([97, 98, 99])
    batch = PackedBatch.from_clips([clip(4, 2, (0, 1)), clip(5, 3, (2, 3))], num_segments=3)
    both = batch.twice(null)
    assert both.cu_seqlens.tolist() == [0, 2, 5, 5, 7, 10, 10]
    assert both.cu_text.tolist() == [0, 2, 4, 4, 7, 10, 10]  # the empty segment gets no text
    assert both.text.tolist() == [0, 1, 2, 3, *null.tolist(), *null.tolist()]
    assert both.cu_seqlens.dtype == both.cu_text.dtype == torch.int32
    assert both.num_segments == 2 * batch.num_segments
    embedded = replace(batch, text=torch.randn(4, 8)).twice(torch.zeros(1, 8))
    assert embedded.text.shape == (6, 8)
    assert embedded.cu_text.tolist() == [0, 2, 4, 4, 5, 6, 6]


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
