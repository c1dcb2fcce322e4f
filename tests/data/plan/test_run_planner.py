"""A run's plan is of the clips that it began with; the held-out plan is of those of now."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from framework.data.manifest.table import SCHEMA, Manifest, clip_id, read_manifest
from framework.data.manifest.writer import make_manifest, write_manifest
from framework.data.plan.cost import CostModel
from framework.data.plan.recipe import Recipe
from framework.data.plan.run_planner import RunPlanner
from framework.data.plan.store import Plan
from framework.data.plan.views import Geometry, ViewConfig
from framework.storage import Store

RECIPE = Recipe(
    views=ViewConfig(frames=(4, 8), sizes=((16, 16), (16, 32))),
    geometry=Geometry(4, 8, False, (1, 1, 1)),
    cost=CostModel(1),
    max_tokens=64,
    max_text_tokens=100,
    max_clips=4,
    global_batch_packs=2,
    window_steps=2,
    drop_caption=0.5,
    keep=((0, 0.5),),
)


def index(folder: Path, count: int) -> Manifest:
    """A manifest of so many clips, every fourth of them held out."""
    rows = [
        {
            "clip_id": clip_id("a.tar", f"clip-{i}"),
            "key": f"clip-{i}",
            "shard": "a.tar",
            "member": f"clip-{i}.mp4",
            "offset": 512 * i,
            "size_bytes": 100,
            "checksum": i,
            "checked_bytes": 100,
            "first_frame": 0,
            "num_frames": (4, 9, 12)[i % 3],
            "fps": 8.0,
            "height": 16,
            "width": (16, 32)[i % 2],
            "captions": [f"caption {i}"],
            "source": "web",
            "video": f"video-{i}",
            "split": "heldout" if i % 4 == 0 else "train",
        }
        for i in range(count)
    ]
    manifest = make_manifest(pa.Table.from_pylist(rows, SCHEMA), "shards")
    write_manifest(Store(folder), manifest)
    return manifest


def planner(folder: Path, **changes: object) -> RunPlanner:
    parts = {
        "open_manifest": partial(read_manifest, str(folder)),
        "recipe": RECIPE,
        "num_text_tokens": lambda caption: len(caption) + 1,
        "text_fingerprint": "bytes",
    }
    return RunPlanner(**parts | changes)


def keys(plan: Plan, epoch: int = 0) -> list[str]:
    return [
        clip.key
        for epoch_step in range(plan.num_steps(epoch))
        for pack in plan.packs(epoch, epoch_step, 0, 1)
        for clip in pack.clips
        if not clip.dummy
    ]


def test_a_run_keeps_to_the_clips_that_it_began_with(tmp_path: Path) -> None:
    first, run = index(tmp_path / "manifest", 40), Store(tmp_path / "run")
    planning = planner(tmp_path / "manifest")
    assert planning.pinned_manifest(run).fingerprint == first.fingerprint
    plan = planning.make(run, 1, lambda _: None)
    grown = index(tmp_path / "manifest", 60)
    assert planning.pinned_manifest(run).fingerprint == first.fingerprint != grown.fingerprint
    again = planning.make(run, 1, lambda _: None)
    assert again.digest == plan.digest
    assert sorted(keys(plan)) == sorted(f"clip-{i}" for i in range(40) if i % 4)
    other = planning.make(Store(tmp_path / "other"), 1, lambda _: None)
    assert sorted(keys(other)) == sorted(f"clip-{i}" for i in range(60) if i % 4)


@pytest.mark.parametrize("pin", [b"{}", b"[]", b"7", b"{", b"[" * 100_000])
def test_a_pin_without_a_fingerprint_is_a_sentence(tmp_path: Path, pin: bytes) -> None:
    index(tmp_path / "manifest", 4)
    run = Store(tmp_path / "run")
    run.write("manifest.json", pin)
    with pytest.raises(ValueError, match="names no fingerprint"):
        planner(tmp_path / "manifest").pinned_manifest(run)


def test_as_many_epochs_as_the_steps_need_and_one_summary(tmp_path: Path) -> None:
    index(tmp_path / "manifest", 40)
    run, said = Store(tmp_path / "run"), list[str]()
    planning = planner(tmp_path / "manifest")
    plan = planning.make(run, 1, said.append)
    per_epoch = plan.num_steps(0)
    assert not plan.has_epoch(1)
    plan = planning.make(run, 2 * per_epoch + 1, said.append)
    assert [plan.has_epoch(epoch) for epoch in range(4)] == [True, True, True, False]
    assert said == [str(plan.summary(0))] * 2
    assert plan.locate(2 * per_epoch) == (2, 0)


def test_the_heldout_plan_drops_nothing_and_sees_new_clips(tmp_path: Path) -> None:
    index(tmp_path / "manifest", 40)
    planning, run = planner(tmp_path / "manifest"), Store(tmp_path / "run")
    planning.make(run, 1, lambda _: None)
    plan = planning.heldout(run)
    assert (plan.split, plan.recipe.drop_caption, plan.recipe.keep) == ("heldout", 0.0, ((0, 1.0),))
    assert sorted(keys(plan)) == sorted(f"clip-{i}" for i in range(0, 40, 4))
    clips = [clip for pack in plan.packs(0, 0, 0, 1) for clip in pack.clips if not clip.dummy]
    assert all(clip.caption for clip in clips)
    assert all(clip.tokens == clip.grid[0] * clip.grid[1] * clip.grid[2] for clip in clips)
    index(tmp_path / "manifest", 60)
    assert sorted(keys(planning.heldout(run))) == sorted(f"clip-{i}" for i in range(0, 60, 4))


def test_what_the_manifest_lacks_is_found_before_planning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest"):
        planner(tmp_path / "manifest").check()
    index(tmp_path / "manifest", 8)
    planner(tmp_path / "manifest").check()
    for changes, message in (
        ({"sources": {"wep": 1.0}}, "sources names 'wep'; the manifest has web"),
        ({"where": "hieght > 1"}, "no column 'hieght'"),
    ):
        recipe = replace(RECIPE, **changes)
        with pytest.raises(ValueError, match=message):
            planner(tmp_path / "manifest", recipe=recipe).check()
