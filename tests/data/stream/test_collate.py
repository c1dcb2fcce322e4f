"""A clip that is damaged or gone is a hole; a store that does not answer is an error."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from framework.data.plan.cost import CostModel
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import ClipPlan, PackPlan
from framework.data.plan.views import Geometry, View, ViewConfig, kept_tokens
from framework.data.stream.collate import VideoReader, assemble
from framework.storage import Store
from framework.video import encode

CLIP = ClipPlan(
    clip_id=7,
    epoch=0,
    shard="shard-000000.tar",
    key="shard-000000/clip-7",
    offset=4,
    size_bytes=8,
    checksum=1,
    checked_bytes=8,
    view=View(0, 1, 2, 8, 8),
    grid=(2, 1, 1),
    fps=8.0,
    caption="a square",
    tokens=2,
    text_tokens=1,
    source="",
    source_id=0,
    weight=1.0,
    dummy=False,
)


class LockedStore(Store):
    """A store whose credentials have expired."""

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        raise PermissionError(f"{name}: ACCESS_DENIED")


def reader(store: Store) -> VideoReader:
    return VideoReader(
        shards=store,
        exclude=frozenset(),
        tokenize=lambda frames: np.ones((len(frames), 3), np.float32),
        encode_text=lambda caption: np.zeros(1, np.int64),
        token_size=3,
    )


@pytest.mark.parametrize(
    ("shard", "cause"),
    [(None, "shard-000000.tar"), (b"short", "the object ends at 5"), (bytes(12), "checksum")],
    ids=["gone", "cut off", "changed"],
)
def test_a_clip_that_is_damaged_or_gone_is_a_named_hole(
    tmp_path: Path, shard: bytes | None, cause: str
) -> None:
    store = Store(tmp_path)
    if shard is not None:
        store.write(CLIP.shard, shard)
    ((tokens, text, found, stats),) = reader(store).read([CLIP])
    assert (stats.clips, stats.size_bytes) == (1, 8)
    assert np.array_equal(tokens, np.zeros((2, 3), np.float32))
    assert len(text) == CLIP.text_tokens
    assert cause in found


def test_a_store_that_denies_access_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="ACCESS_DENIED"):
        list(reader(LockedStore(tmp_path)).read([CLIP]))


def test_a_clip_that_is_taken_out_leaves_a_hole_and_is_not_read(tmp_path: Path) -> None:
    video = encode(np.full((2, 8, 8, 3), 99, np.uint8), 8.0)
    store = Store(tmp_path)
    store.write(CLIP.shard, b"....." + video)
    kept = replace(CLIP, clip_id=8, epoch=3, offset=5, size_bytes=len(video))
    kept = replace(kept, checksum=zlib.crc32(video), checked_bytes=len(video))
    recipe = Recipe(
        views=ViewConfig(frames=(2,), sizes=((8, 8),)),
        geometry=Geometry(1, 8, False, (1, 1, 1)),
        cost=CostModel(1),
        max_tokens=6,
        max_text_tokens=3,
        max_clips=3,
        global_batch_packs=1,
    )
    pack = PackPlan((CLIP, kept), 0)  # the first is damaged: were it read, it would be named
    batch = assemble(pack, replace(reader(store), exclude=frozenset({7})), recipe)
    assert batch.failed == ()
    assert batch.clip_ids.tolist() == [-1, 8, -1, -1]
    assert batch.clip_epochs.tolist() == [0, 3, 0, 0]
    assert batch.clip_weights.tolist() == [0, 1, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 4, 6]  # its place is kept
    assert batch.loss_mask.tolist() == [0, 0, 1, 1, 0, 0]
    assert batch.read.clips == 1


def test_dropped_tokens_are_drawn_and_those_left_keep_their_places(tmp_path: Path) -> None:
    video = encode(np.full((2, 8, 8, 3), 99, np.uint8), 8.0)
    store = Store(tmp_path)
    store.write(CLIP.shard, video)
    clip = replace(CLIP, offset=0, size_bytes=len(video), grid=(2, 3, 4), tokens=10)
    clip = replace(clip, checksum=zlib.crc32(video), checked_bytes=len(video))
    recipe = Recipe(
        views=ViewConfig(frames=(2,), sizes=((8, 8),)),
        geometry=Geometry(1, 8, False, (1, 1, 1)),
        cost=CostModel(1),
        max_tokens=16,
        max_text_tokens=3,
        max_clips=2,
        global_batch_packs=1,
        keep=((0, 0.4),),
        seed=5,
    )
    numbered = replace(
        reader(store), tokenize=lambda _: np.arange(24, dtype=np.float32)[:, None].repeat(3, 1)
    )
    batch = assemble(PackPlan((clip,), 0), numbered, recipe)
    kept = kept_tokens(5, 0, 7, 24, 10).tolist()
    assert batch.tokens[:10, 0].tolist() == kept
    assert batch.token_index.tolist() == [*kept, *range(6)]
    assert batch.grid[0].tolist() == [2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 10, 10, 16]
    assert batch.loss_mask.sum() == 10
