"""The stream carries the plan out: in its order, on any number of ranks, holes and all."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.assembly import Assembly
from framework.config import compose
from framework.data.config import IndexConfig, SyntheticConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.data.plan.store import Plan
from framework.data.shards.tar import write_shards
from framework.data.stream.collate import assemble
from framework.data.stream.stream import open_stream, segment_steps
from framework.demo.clips.moving_shapes import shard_samples
from framework.storage import Store

SHARD = "shard-000000.tar"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembly, Plan, str]:
    """A line on 40 clips, with its plan; the bytes of one clip are spoilt after indexing."""
    folder = tmp_path_factory.mktemp("stream")
    config = compose(
        [
            "experiment=demo",
            f"data.shards={folder}/clips",
            f"data.manifest={folder}/manifest",
            "data.max_tokens=192",
            "data.global_batch_packs=3",
        ]
    )
    store = Store(folder / "clips")
    write_shards(store, shard_samples(SyntheticConfig(num_clips=40), 0), 40)
    chosen = IndexConfig(heldout_fraction=0.0)
    found = {SHARD: index_shard(store.url, SHARD, chosen)}
    write_index(store.url, f"{folder}/manifest", found, chosen)
    assembly = Assembly.of(config)
    plan = assembly.planner().make(Store(folder), 1, print)
    return assembly, plan, store.url


def spoil(url: str, plan: Plan) -> str:
    """Overwrite the bytes of the first clip of step 1; its key."""
    clip = plan.packs(0, 1, 0, 1)[0].clips[0]
    store = Store(url)
    data = bytearray(store.read(SHARD))
    data[clip.offset : clip.offset + clip.size_bytes] = b"\xff" * clip.size_bytes
    store.write(SHARD, bytes(data))
    return clip.key


def test_a_pack_has_the_recipes_static_shapes(line: tuple[Assembly, Plan, str]) -> None:
    assembly, plan, shards_url = line
    (pack, *_) = plan.packs(0, 0, 0, 1)
    reader = assembly.reader(shards_url)
    batch = assemble(pack, reader, plan.recipe)
    recipe = plan.recipe
    assert batch.tokens.shape == (recipe.max_tokens, 144)
    assert batch.text.shape == (recipe.max_text_tokens,)
    assert batch.num_segments == recipe.max_clips + 1
    assert batch.cu_seqlens[-1] == recipe.max_tokens
    assert batch.cu_text[-1] == recipe.max_text_tokens
    assert batch.loss_mask.sum() == sum(clip.tokens for clip in pack.clips)
    grid_tokens = batch.grid[: len(pack.clips)].prod(dim=1)
    assert grid_tokens.tolist() == batch.cu_seqlens.diff()[: len(pack.clips)].tolist()
    assert batch.tokens[: batch.cu_seqlens[len(pack.clips)]].abs().sum() > 0

    tight = assemble(pack, reader, plan.recipe, static_shapes=False)
    used = len(tight.tokens)
    assert used == sum(clip.tokens for clip in pack.clips)
    assert np.array_equal(tight.tokens, batch.tokens[:used])


def test_two_segments_fit_the_object_store(line: tuple[Assembly, Plan, str]) -> None:
    assembly, plan, shards_url = line
    reader, config = assembly.reader(shards_url), assembly.data.stream
    recipe = replace(plan.recipe, max_tokens=1000, max_text_tokens=8000)
    # A pack: 1000 tokens of 144 float32 and 8000 int64 ids, 640,000 bytes; a step has 3.
    longest = replace(config, segment_steps=64, object_store_mb=512)
    assert segment_steps(recipe, reader, longest, 3) == 64
    assert segment_steps(recipe, reader, replace(longest, object_store_mb=50), 3) == 13
    assert segment_steps(recipe, reader, replace(longest, object_store_mb=1), 3) == 1

    embedded = replace(reader, encode_text=lambda _: np.zeros((5, 32), np.float32))
    # 1000 * 144 * 4 + 8000 * 32 * 4 = 1,600,000 bytes
    assert segment_steps(recipe, embedded, replace(longest, object_store_mb=50), 3) == 5


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_number_of_ranks_may_change_at_any_step(
    line: tuple[Assembly, Plan, str], data: st.DataObject
) -> None:
    """Of 1, 2, 3, 4 and 8 ranks; over the border of epochs, each clip once and only once."""
    assembly, plan, _ = line
    wide = replace(assembly, data=replace(assembly.data, global_batch_packs=8))
    run = plan.store.child("wide")
    per_epoch = wide.planner().make(run, 1, lambda _: None).num_steps(0)
    plan = wide.planner().make(run, per_epoch + 1, lambda _: None)
    seen: dict[int, list[int]] = {0: [], 1: []}
    size = 1
    for step in range(2 * per_epoch):
        if data.draw(st.booleans()):  # stopped here, and resumed on so many
            size = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        place = plan.locate(step)
        packs = [pack for rank in range(size) for pack in plan.packs(*place, rank, size)]
        assert len({len(plan.packs(*place, rank, size)) for rank in range(size)}) == 1
        real = sorted((pack for pack in packs if not pack.dummy), key=lambda pack: pack.index)
        assert real == [pack for pack in plan.packs(*place, 0, 1) if not pack.dummy]
        seen[place[0]] += [clip.clip_id for pack in real for clip in pack.clips if not clip.dummy]
    for epoch, clips in seen.items():
        assert len(clips) == len(set(clips)) == plan.summary(epoch).clips


@pytest.fixture
def local_ray() -> Iterator[None]:
    import ray

    ray.init(num_cpus=4, include_dashboard=False, address="local", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_global_batches_do_not_know_the_number_of_ranks(line: tuple[Assembly, Plan, str]) -> None:
    assembly, plan, shards_url = line
    key = spoil(shards_url, plan)
    reader, config = assembly.reader(shards_url), assembly.data.stream
    count = plan.num_steps(0)
    # Several packs of different shapes are rows of one block.
    assert (config.steps_per_task, config.static_shapes) == (4, False)

    def batches(start: int, rank: int, size: int) -> list[list[tuple[list[int], float]]]:
        with open_stream(plan, reader, config, start, count, rank, size) as steps:
            return [
                [(b.clip_ids[b.clip_ids >= 0].tolist(), float(b.tokens.double().sum())) for b in s]
                for s in steps
            ]

    whole = batches(0, 0, 1)
    assert len(whole) == count
    seen = [clip for step in whole for clips, _ in step for clip in clips]
    assert sorted(seen) == sorted(set(seen))  # each clip once
    assert len(seen) == plan.summary(0).clips

    halves = [batches(0, rank, 2) for rank in range(2)]
    for step, packs in enumerate(whole):
        both = [pack for rank in range(2) for pack in halves[rank][step] if pack[0]]
        assert sorted(both) == sorted(pack for pack in packs if pack[0])
        assert len(halves[0][step]) == len(halves[1][step]) == 2  # 3 packs and a dummy
    assert batches(2, 0, 1) == whole[2:]  # a resume is an integer

    # Over the border of epochs, never stopped; and stopped just before, on and after it.
    plan = assembly.planner().make(plan.store.child("longer"), count + 2, lambda _: None)
    start, count = count - 2, count + 2
    whole = batches(start, 0, 1)
    for stop in range(1, 4):
        assert batches(start + stop, 0, 1) == whole[stop:]

    with open_stream(plan, reader, config, 1, 2, 0, 1) as steps:
        (packs,) = list(steps)
    (failure,) = [name for batch in packs for name in batch.failed]
    assert failure.startswith(f"{key}: ")
    assert packs[0].clip_weights[0] == 0
    assert packs[0].tokens[: packs[0].cu_seqlens[1]].abs().sum() == 0
