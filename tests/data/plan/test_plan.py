"""Laws of the plan: every clip once, the same global batches on any ranks, the same bytes."""

import hashlib
import math
import pickle
import threading
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pytest

from framework.data.plan.cost import CostModel
from framework.data.plan.planner import make_epoch
from framework.data.plan.recipe import FORMAT, Recipe, RecipeConfig, plan_digest, plan_identity
from framework.data.plan.store import Plan
from framework.data.plan.views import Geometry, ViewConfig, kept_tokens
from framework.data.plan.writer import deal_steps
from framework.seeding import hash64_array
from framework.storage import Store

ASPECTS = ((16, 9), (4, 3), (1, 1))


@dataclass(frozen=True)
class Clips:
    table: pa.Table
    fingerprint: str = "clips"
    num_parts: int = 1
    scores: tuple[str, ...] = ()

    @property
    def sources(self) -> list[str]:
        return sorted(self.table["source"].unique().to_pylist())

    def part(self, index: int) -> pa.Table:
        part = self.table["clip_id"].to_numpy() % self.num_parts == index
        return self.table.filter(pa.array(part))


def log_normal_clips(count: int, areas: tuple[int, ...], seed: int = 0) -> Clips:
    """Durations of 2 to 20 s at 24 fps, log-normal; sizes of three aspect ratios."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(rng.lognormal(np.log(6.0), 0.6, count), 2, 20)
    height = rng.choice(areas, count)
    aspect = np.array(ASPECTS)[rng.integers(0, 3, count)]
    ids = (hash64_array(7, np.arange(count)) >> np.uint64(1)).astype(np.int64)
    columns = {
        "clip_id": ids,
        "key": [f"clip{i}" for i in range(count)],
        "shard": [f"shard{i % 5}.tar" for i in range(count)],
        "offset": np.arange(count) * 512,
        "size_bytes": np.full(count, 100),
        "checksum": np.arange(count),
        "checked_bytes": np.arange(count) + 7,
        "first_frame": np.zeros(count, np.int32),
        "num_frames": (seconds * 24).astype(np.int32),
        "fps": np.full(count, 24, np.float32),
        "height": height.astype(np.int32),
        "width": (height * aspect[:, 0] // aspect[:, 1]).astype(np.int32),
        "captions": [[f"caption {i}", "x" * (1 + i % 30)] for i in range(count)],
        "source": [("web", "film")[i % 2] for i in range(count)],
        "split": ["train"] * count,
    }
    return Clips(pa.table(columns))


CLIPS = log_normal_clips(300, (64, 96, 128))
RECIPE = Recipe(
    views=ViewConfig(
        frames=tuple(range(8, 161, 8)),
        sizes=((64, 112), (64, 80), (64, 64), (96, 160), (96, 128), (96, 96), (128, 224)),
        fps=8.0,
    ),
    geometry=Geometry(4, 8, False, (1, 2, 2)),
    cost=CostModel(linear=500),
    max_tokens=2500,
    max_text_tokens=200,
    max_clips=12,
    global_batch_packs=8,
    window_steps=4,
    seed=3,
)


def pack_cost(tokens) -> int:
    return int(RECIPE.cost.clip_costs(np.array(list(tokens))).sum())


def num_text_tokens(caption: str) -> int:
    return len(caption) + 1


def make(store: Store, clips: Clips = CLIPS, recipe: Recipe = RECIPE, epoch: int = 0):
    return make_epoch(clips, recipe, store, epoch, num_text_tokens, "bytes")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module")
def plan(store):
    return make(store)


def all_packs(plan, epoch=0):
    """[step][pack], read as one rank."""
    return [plan.packs(epoch, step, 0, 1) for step in range(plan.num_steps(epoch))]


def real_clips(plan, epoch=0):
    return [c for packs in all_packs(plan, epoch) for p in packs for c in p.clips if not c.dummy]


def bytes_of(store: Store, digest: str) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list(f"plan/{digest}")}


@pytest.mark.parametrize("policy", ["mixed", "bucketed"])
def test_every_usable_clip_once_an_epoch(store, policy):
    recipe = replace(RECIPE, policy=policy)
    for epoch in (0, 1):
        plan = make(store, recipe=recipe, epoch=epoch)
        refused = [key for key, _ in plan.refused(epoch)]
        planned = [clip.key for clip in real_clips(plan, epoch)]
        assert sorted(planned + refused) == sorted(CLIPS.table["key"].to_pylist())
        assert len(planned) > 250
    assert set(planned) == {clip.key for clip in real_clips(plan, 0)}
    assert planned != [clip.key for clip in real_clips(plan, 0)]


@pytest.mark.parametrize("policy", ["mixed", "bucketed"])
def test_no_pack_over_a_limit_and_tokens_are_the_geometrys(store, policy):
    plan = make(store, recipe=replace(RECIPE, policy=policy))
    for packs in all_packs(plan):
        assert [pack.index for pack in packs] == list(range(8))
        for pack in packs:
            assert 0 < len(pack.clips) <= RECIPE.max_clips
            assert sum(clip.tokens for clip in pack.clips) <= RECIPE.max_tokens
            assert sum(clip.text_tokens for clip in pack.clips) <= RECIPE.max_text_tokens
            tokens = [clip.tokens for clip in pack.clips]
            assert tokens == sorted(tokens)  # runs of equal length are neighbours
            for clip in pack.clips:
                view = clip.view
                grid = RECIPE.geometry.token_grid(view.num_frames, view.height, view.width)
                assert clip.grid == grid
                assert clip.tokens == np.prod(grid)
                assert clip.text_tokens == num_text_tokens(clip.caption)
            if policy == "bucketed":
                assert len({clip.grid for clip in pack.clips}) == 1


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
def test_global_batches_do_not_know_the_number_of_ranks(plan, dp_size):
    for step, expected in enumerate(all_packs(plan)):
        ranks = [plan.packs(0, step, rank, dp_size) for rank in range(dp_size)]
        assert {len(packs) for packs in ranks} == {-(-8 // dp_size)}
        dealt = sorted((p for packs in ranks for p in packs), key=lambda pack: pack.index)
        assert dealt[:8] == expected
        assert all(pack.dummy for pack in dealt[8:])
        for rank, packs in enumerate(ranks):
            assert [pack.index % dp_size for pack in packs] == [rank] * len(packs)


def test_only_the_last_step_holds_planned_dummies(plan):
    steps = all_packs(plan)
    assert not any(pack.dummy for packs in steps[:-1] for pack in packs)
    dummies = [pack for pack in steps[-1] if pack.dummy]
    assert 0 < len(dummies) < 8
    (clip,) = dummies[0].clips
    assert (clip.clip_id, clip.source_id, clip.weight, clip.dummy) == (-1, -1, 0.0, True)
    assert (clip.tokens, clip.grid, clip.text_tokens) == (16, (1, 4, 4), 1)
    # A gap in the ranks' share is filled with the same clip.
    assert plan.packs(0, 0, 2, 3)[-1].clips == dummies[0].clips


def test_rows_carry_what_the_manifest_says(plan):
    rows = {row["clip_id"]: row for row in CLIPS.table.to_pylist()}
    assert plan.sources == ("film", "web")
    dropped = 0
    for clip in real_clips(plan):
        row = rows[clip.clip_id]
        for name in ("key", "shard", "offset", "size_bytes", "checksum", "checked_bytes", "source"):
            assert getattr(clip, name) == row[name]
        assert plan.sources[clip.source_id] == clip.source
        assert (clip.fps, clip.weight, clip.view.stride) == (8.0, 1.0, 3)
        assert clip.caption in ["", *row["captions"]]
        dropped += clip.caption == ""
    # Drawn at 0.1 from some 290 clips: 29 expected, standard deviation 5.
    assert 5 < dropped < 55


def test_two_runs_write_the_same_bytes_in_whatever_order_rows_come(plan, store, tmp_path):
    rows = np.random.default_rng(1).permutation(len(CLIPS.table))
    other = Store(tmp_path)
    assert make(other, Clips(CLIPS.table.take(rows))).digest == plan.digest
    written = bytes_of(other, plan.digest)
    names = {name.split("/", 2)[2] for name in written}
    assert {"recipe.json", "epoch-00000/index.parquet", "epoch-00000/window-00000.parquet"} < names
    first = bytes_of(store, plan.digest)
    assert all(first[name] == data for name, data in written.items())


def test_a_committed_epoch_is_not_made_again_and_an_uncommitted_one_is(tmp_path):
    store = Store(tmp_path)
    plan = make(store)
    window = f"plan/{plan.digest}/epoch-00000/window-00000.parquet"
    good = store.read(window)
    store.write(window, b"kept")
    make(store)
    assert store.read(window) == b"kept"
    store.delete(f"plan/{plan.digest}/epoch-00000/index.parquet")
    assert not plan.has_epoch(0)
    make(store)
    assert plan.has_epoch(0)
    assert store.read(window) == good


def test_all_that_shapes_a_plan_names_it(store, plan):
    digests = {plan.digest}
    for change in (
        {"seed": 4},
        {"max_tokens": 2499},
        {"cost": CostModel(501)},
        {"views": replace(RECIPE.views, flip=True)},
        {"geometry": replace(RECIPE.geometry, temporal_stride=8)},
    ):
        digests.add(make(store, recipe=replace(RECIPE, **change)).digest)
    digests.add(make(store, Clips(CLIPS.table, "other")).digest)
    digests.add(make_epoch(CLIPS, RECIPE, store, 0, num_text_tokens, "other").digest)
    assert len(digests) == 8


def test_digests_are_those_of_the_same_recipes_before():
    """A run resumes only where its plan is found again under the same name."""
    other = replace(
        RECIPE,
        sources={"web": 2.0, "film": 1.0},
        where="motion > 1",
        keep=((0, 0.25), (3, 1.0)),
        encoded=True,
    )
    digests = [
        plan_digest(plan_identity(recipe, "clips", "bytes", "train")) for recipe in (RECIPE, other)
    ]
    # Format 4 added the pixels of each step to the index. In format 3 these were
    # f0dd379719b991b7 and 750d323ead5d1ab9.
    assert FORMAT == 4
    assert digests == ["ed3a2687ceac306c", "849603666f8a4e16"]
    identity = plan_identity(RECIPE, "clips", "bytes", "train")
    assert plan_digest(identity | {"format": 3}) == "f0dd379719b991b7"


def test_any_step_reads_the_same_from_a_fresh_reader(store, plan):
    make(store, epoch=1)
    steps = [(epoch, step) for epoch in (0, 1) for step in range(plan.num_steps(epoch))]
    in_order = [plan.packs(epoch, step, 1, 3) for epoch, step in steps]
    reopened = pickle.loads(pickle.dumps(Plan(store, plan.digest)))
    assert reopened.recipe == RECIPE
    for i in np.random.default_rng(0).permutation(len(steps)):
        assert reopened.packs(*steps[i], 1, 3) == in_order[i]
        assert reopened.locate(int(i)) == steps[i]


def test_the_planner_has_not_changed_unnoticed(tmp_path):
    # Whoever changes what is planned must raise recipe.FORMAT, or runs resume into another plan.
    rows = CLIPS.table.slice(0, 60).to_pylist()
    for i, row in enumerate(rows):  # nothing here hangs on a library's random numbers
        height, width = ((64, 112), (96, 130), (99, 99))[i % 3]
        size = {"height": height, "width": width}
        rows[i] = row | size | {"clip_id": i, "num_frames": 48 + 37 * i % 400}
    plan = make(Store(tmp_path), Clips(pa.Table.from_pylist(rows, CLIPS.table.schema)))
    content = repr(
        [[[(c.key, c.view, c.caption) for c in p.clips] for p in s] for s in all_packs(plan)]
    )
    found = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    assert found == "1d5e44491c8d50c3"


def test_totals_and_summary_agree_with_the_packs(plan):
    packs_by_step = all_packs(plan)
    summary = plan.summary(0)
    maxima = means = 0.0
    for step, packs in enumerate(packs_by_step):
        real = [clip for pack in packs for clip in pack.clips if not clip.dummy]
        costs = [pack_cost(clip.tokens for clip in p.clips) for p in packs]
        totals = plan.totals(0, step)
        assert totals.packs == sum(not pack.dummy for pack in packs)
        assert totals.clips == len(real)
        assert totals.tokens == totals.loss_tokens == sum(clip.tokens for clip in real)
        assert totals.text_tokens == sum(clip.text_tokens for clip in real)
        views = [clip.view for clip in real]
        assert totals.pixels == sum(v.num_frames * v.height * v.width for v in views)
        assert totals.averaged_over("video_tokens") == totals.loss_tokens
        assert totals.averaged_over("text_tokens") == totals.text_tokens
        assert totals.averaged_over("pixels") == totals.pixels
        assert totals.cost == sum(costs)
        assert costs[: totals.packs] == sorted(costs[: totals.packs], reverse=True)
        maxima, means = maxima + max(costs), means + sum(costs) / 8
    with pytest.raises(ValueError, match="'frames' must be one of video_tokens, text_tokens, pix"):
        totals.averaged_over("frames")
    assert summary.imbalance == pytest.approx(maxima / means, rel=1e-12)  # float64 sums
    assert summary.clips + sum(summary.refused.values()) == summary.offered == 300
    assert f"{summary.clips:,} of 300 used" in str(summary)
    assert f"fill       {summary.fill:.3f}" in str(summary)


def test_cost_sorting_balances_steps(plan):
    assert plan.summary(0).imbalance < 1.3
    tokens = np.array([clip.tokens for clip in real_clips(plan)])
    packs = np.array_split(np.random.default_rng(0).permutation(len(tokens)), 96)

    def imbalance(steps):
        costs = np.array([[pack_cost(tokens[p]) for p in s] for s in steps])
        return costs.max(axis=1).sum() / costs.mean(axis=1).sum()

    recipe = replace(RECIPE, window_steps=12)
    in_order = [packs[i : i + 8] for i in range(0, 96, 8)]
    costs = np.array([RECIPE.cost.clip_costs(tokens[pack]).sum() for pack in packs])
    dealt = [[packs[i] for i in step] for step in deal_steps(costs, recipe, 0, 0)]
    assert sorted(i for s in dealt for p in s for i in p) == list(range(len(tokens)))
    assert imbalance(dealt) - 1 < (imbalance(in_order) - 1) / 3
    # The steps themselves are shuffled: their costs neither rise nor fall.
    sums = [sum(pack_cost(tokens[p]) for p in s) for s in dealt]
    assert sums != sorted(sums)
    assert sums != sorted(sums, reverse=True)


def test_fill_on_thousands_of_clips(tmp_path):
    # The mixture of the design's measurement, thinned out to 3,000 clips.
    clips = log_normal_clips(3000, (240, 352, 480, 720), seed=1)
    sizes = [(a, a * w // h // 16 * 16) for a in (240, 352, 480, 720) for w, h in ASPECTS]
    recipe = replace(
        RECIPE,
        views=ViewConfig(frames=tuple(range(17, 482, 16)), sizes=tuple(sizes), fps=24.0),
        geometry=Geometry(4, 8, True, (1, 2, 2)),
        cost=CostModel(linear=6 * 3072),
        max_tokens=131_072,
        max_text_tokens=4096,
        max_clips=64,
        window_steps=16,
    )
    summary = make(Store(tmp_path), clips, recipe).summary(0)
    assert summary.clips == 3000
    assert summary.fill >= 0.98
    assert summary.imbalance < 1.1


def test_clips_that_cannot_be_used_are_named(tmp_path):
    rows = CLIPS.table.slice(0, 6).to_pylist()
    rows[0] |= {"height": 32}
    rows[1] |= {"num_frames": 5}
    rows[2] |= {"captions": ["y" * 300]}
    rows[3] |= {"captions": []}
    recipe = replace(RECIPE, drop_caption=0.0)
    plan = make(Store(tmp_path), Clips(pa.Table.from_pylist(rows, CLIPS.table.schema)), recipe)
    assert dict(plan.refused(0)) == {
        "clip0": "too_small",
        "clip1": "too_short",
        "clip2": "too_much_text",
    }
    assert plan.summary(0).refused == {"too_small": 1, "too_short": 1, "too_much_text": 1}
    assert {c.key: c.caption for c in real_clips(plan)}["clip3"] == ""
    assert "refused: 1 too_much_text, 1 too_short, 1 too_small" in str(plan.summary(0))


def test_captions_are_drawn_anew_each_epoch(tmp_path):
    store, recipe = Store(tmp_path), replace(RECIPE, drop_caption=0.5)
    plan = make(store, recipe=recipe, epoch=0)
    make(store, recipe=recipe, epoch=1)
    seen = [{c.key: c.caption for c in real_clips(plan, epoch)} for epoch in (0, 1)]
    kinds = Counter(caption[:1] for caption in seen[0].values())
    assert 100 < kinds[""] < 190  # half of some 290, five standard deviations
    assert min(kinds["c"], kinds["x"]) > 40
    assert seen[0] != seen[1]


def test_a_split_has_a_plan_of_its_own(tmp_path):
    at = CLIPS.table.schema.get_field_index("split")
    split = pa.array(["heldout" if i % 10 == 0 else "train" for i in range(300)])
    clips = Clips(CLIPS.table.set_column(at, "split", split))
    train = make_epoch(clips, RECIPE, Store(tmp_path), 0, num_text_tokens, "bytes")
    heldout = make_epoch(clips, RECIPE, Store(tmp_path), 0, num_text_tokens, "bytes", "heldout")
    assert train.digest != heldout.digest
    assert heldout.sources == train.sources  # though all clips held out are of one source
    tens = {f"clip{i}" for i in range(0, 300, 10)}
    assert {clip.key for clip in real_clips(heldout)} <= tens
    assert not tens & {clip.key for clip in real_clips(train)}


def test_mistakes_are_answered(plan, tmp_path):
    with pytest.raises(ValueError, match=r"dp_size=9 must lie between 1 and global_batch_packs=8"):
        plan.packs(0, 0, 0, 9)
    with pytest.raises(ValueError, match="dp_rank=2"):
        plan.packs(0, 0, 2, 2)
    with pytest.raises(ValueError, match="step=10000"):
        plan.packs(0, 10_000, 0, 1)
    with pytest.raises(ValueError, match=r"epoch 7 of plan .* is not made yet"):
        plan.num_steps(7)
    with pytest.raises(ValueError, match="is not made yet"):
        plan.locate(10_000)
    with pytest.raises(ValueError, match="no plan abc"):
        Plan(Store(tmp_path), "abc")
    small = CLIPS.table.set_column(
        CLIPS.table.schema.get_field_index("fps"), "fps", pa.array([900.0] * 300, pa.float32())
    )
    with pytest.raises(
        ValueError,
        match="none of 300 clips of split 'train' can be used: 300 shorter than the shortest of",
    ):
        make(Store(tmp_path), Clips(small))
    with pytest.raises(ValueError, match="no clip of split 'test'"):
        make_epoch(CLIPS, RECIPE, Store(tmp_path), 0, num_text_tokens, "bytes", "test")
    recipe = replace(RECIPE, max_text_tokens=1)
    with pytest.raises(ValueError, match="max_text_tokens=1 must hold the empty caption's 2"):
        make_epoch(CLIPS, recipe, Store(tmp_path), 0, lambda text: 2, "bytes")
    assert Store(tmp_path).list() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "best"}, "policy='best'"),
        ({"global_batch_packs": 0}, "global_batch_packs=0 must be at least 1"),
        ({"drop_caption": 1.5}, "drop_caption=1.5"),
        ({"sources": {"web": 0.0}}, "sources.web=0.0"),
        ({"max_tokens": 15}, "max_tokens=15 must hold the smallest view.*try 16"),
        ({"geometry": Geometry(4, 16, False, (1, 2, 2))}, "height must be divisible by 32"),
    ],
)
def test_a_recipe_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


def test_what_a_user_says_is_checked_before_the_geometry_is_known():
    said = {f.name: getattr(RECIPE, f.name) for f in fields(RecipeConfig)}
    with pytest.raises(ValueError, match="policy='best'"):
        RecipeConfig(**said | {"policy": "best"})
    config = RecipeConfig(**said)
    assert Recipe.of(config, geometry=RECIPE.geometry, cost=RECIPE.cost, seed=3) == RECIPE
    follows = {f.name for f in fields(Recipe)} - said.keys()
    assert follows == {"geometry", "cost", "encoded", "seed"}


@pytest.mark.parametrize("changes", [{"linear": -1}, {"linear": 0, "quadratic": 0}])
def test_a_cost_that_cannot_be(changes):
    with pytest.raises(ValueError, match="linear"):
        CostModel(**changes)


def test_cost_by_hand():
    costs = CostModel(linear=10, quadratic=2).clip_costs(np.array([3, 1, 10**6], np.int32))
    assert costs.tolist() == [10 * 3 + 2 * 9, 10 + 2, 10**7 + 2 * 10**12]


def test_parts_give_every_clip_once_and_a_plan_of_their_own(tmp_path):
    clips = replace(CLIPS, num_parts=4, fingerprint="in four parts")
    plan = make(Store(tmp_path), clips)
    planned = [clip.key for clip in real_clips(plan)] + [key for key, _ in plan.refused(0)]
    assert sorted(planned) == sorted(CLIPS.table["key"].to_pylist())
    assert plan.summary(0).offered == 300
    # One pack at most is part-filled for each source of disorder: parts do not show in the fill.
    assert plan.summary(0).fill > make(Store(tmp_path / "one")).summary(0).fill - 0.02


def test_sources_come_by_weight_over_epochs(tmp_path):
    weights = {"web": 3.0, "film": 1.0}
    recipe = replace(RECIPE, sources=weights, lookahead=4)
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"epoch 0 of .* is not made yet"):
        make(store, recipe=recipe, epoch=1)
    plan = make(store, recipe=recipe)
    make(store, recipe=recipe, epoch=1)
    seen = Counter()
    for epoch in (0, 1):
        clips = real_clips(plan, epoch)
        assert len(clips) == 300  # as many as there are
        share = Counter(clip.source for clip in clips)
        assert abs(share["web"] - 225) <= 1
        seen.update((clip.source, clip.epoch, clip.key) for clip in clips)
    assert max(seen.values()) == 1  # never twice in a pass
    usable = len(real_clips(make(store)))
    first = [clip for clip in seen if clip[:2] == ("web", 0)]
    assert usable / 2 * 0.9 < len(first) <= 150  # a whole pass of the 150 clips of the web


def test_where_leaves_clips_out_and_says_so(tmp_path):
    plan = make(Store(tmp_path), recipe=replace(RECIPE, where="source == 'web' and height >= 96"))
    assert {clip.source for clip in real_clips(plan)} == {"web"}
    summary = plan.summary(0)
    assert summary.filtered + summary.offered == 300
    assert f"left out by data.where: {summary.filtered}" in str(summary)
    recipe = replace(RECIPE, where="height > 1000")
    with pytest.raises(ValueError, match="none of 300 clips of split 'train' passes where="):
        make(Store(tmp_path), recipe=recipe)
    with pytest.raises(ValueError, match="no column 'hieght'; did you mean height"):
        make(Store(tmp_path), recipe=replace(RECIPE, where="hieght > 1"))
    with pytest.raises(ValueError, match="sources names 'wep'; the manifest has film, web"):
        make(Store(tmp_path), recipe=replace(RECIPE, sources={"wep": 1.0}))


def test_a_reader_waits_for_an_epoch_in_the_making(tmp_path):
    plan = make(Store(tmp_path))
    beyond = plan.num_steps(0)
    plan.wait_for(beyond - 1)
    waits = threading.Event()
    waiter = threading.Thread(target=plan.wait_for, args=(beyond, 0.01, waits.set), daemon=True)
    waiter.start()
    assert waits.wait(60)
    assert waiter.is_alive()
    make(Store(tmp_path), epoch=1)
    waiter.join(60)
    assert not waiter.is_alive()
    assert plan.locate(beyond) == (1, 0)


def test_masked_training_keeps_a_share_of_each_clips_tokens_in_phases(tmp_path):
    store = Store(tmp_path)
    roomy = replace(RECIPE, max_clips=64, max_text_tokens=4000)
    recipe = replace(roomy, keep=((0, 0.5), (2, 1.0)))
    whole = make(Store(tmp_path / "whole"), recipe=roomy)
    full = {clip.clip_id: clip for clip in real_clips(whole, 0)}
    plans = [make(store, recipe=recipe, epoch=epoch) for epoch in range(3)]
    for epoch, rate in ((0, 0.5), (1, 0.5), (2, 1.0)):
        for clip in real_clips(plans[epoch], epoch):
            tokens = math.prod(clip.grid)
            assert clip.tokens == max(1, math.ceil(rate * tokens))
    # What is saved becomes throughput: packs are as full as before, and fewer.
    half, all_of_it = (plans[2].summary(epoch) for epoch in (0, 2))
    assert half.steps < 0.7 * all_of_it.steps
    assert half.fill > 0.9 * all_of_it.fill
    assert all_of_it.tokens == whole.summary(0).tokens
    # Half the tokens leave room for longer views; none is refused that was not.
    assert half.clips >= len(full)


def test_which_tokens_are_kept_is_drawn_anew_each_epoch():
    first, again = (kept_tokens(3, 0, 77, 100, 40) for _ in range(2))
    assert first.tolist() == again.tolist() == sorted(set(first.tolist()))
    others = [kept_tokens(*key, 100, 40).tolist() for key in ((3, 1, 77), (3, 0, 78), (4, 0, 77))]
    assert first.tolist() not in others
    assert kept_tokens(3, 0, 77, 100, 100).tolist() == list(range(100))
    share = np.mean([np.isin(np.arange(100), kept_tokens(0, 0, i, 100, 40)) for i in range(500)], 0)
    assert share.min() > 0.3  # 0.4 +- 0.022, four sigma
    assert share.max() < 0.5


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ((), "must begin at epoch 0"),
        (((1, 0.5),), "must begin at epoch 0"),
        (((0, 0.5), (0, 1.0)), "must rise"),
        (((0, 0.0),), r"must lie in \(0, 1\]"),
        (((0, 1.5),), r"must lie in \(0, 1\]"),
    ],
)
def test_impossible_phases_are_refused(keep, words):
    with pytest.raises(ValueError, match=words):
        replace(RECIPE, keep=keep)
