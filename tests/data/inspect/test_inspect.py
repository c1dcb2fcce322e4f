"""The page on a plan: its facts are the plan's, and its pictures are pictures."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framework.assembly import Assembly
from framework.config import compose
from framework.data.config import IndexConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.data.inspect.page import inspect
from framework.data.manifest.table import read_manifest
from framework.data.shards.tar import write_shards
from framework.storage import Store
from framework.video import encode


@pytest.fixture
def line(tmp_path: Path, small_shards: Store) -> Assembly:
    names = [name for name in small_shards.list() if name.endswith(".tar")]
    chosen = IndexConfig(heldout_fraction=0.2)
    found = {n: index_shard(small_shards.url, n, chosen) for n in names}
    write_index(small_shards.url, f"{tmp_path}/manifest", found, chosen)
    shards = small_shards.local_path()
    overrides = [f"data.shards={shards}", f"data.manifest={tmp_path}/manifest"]
    return Assembly.of(compose(["experiment=demo", "data.max_tokens=256", *overrides]))


def test_the_page_says_what_the_plan_says(line: Assembly, tmp_path: Path) -> None:
    manifest = read_manifest(line.data.manifest)
    plan = line.planner().make(Store(tmp_path / "run"), 1, lambda text: None)
    out = Store(tmp_path / "out")
    facts = inspect(plan, manifest, line.reader(manifest.shards_url), 2, out)
    summary = plan.summary(0)
    assert facts["clips used"].startswith(f"{summary.clips:,} of {summary.offered:,}")
    assert facts["fill"].startswith(f"{summary.fill:.3f}")

    clips = [
        clip
        for step in range(summary.steps)
        for pack in plan.packs(0, step, 0, 1)
        for clip in pack.clips
        if not clip.dummy
    ]
    frames = {row["clip_id"]: row["num_frames"] for row in manifest.table.to_pylist()}
    used = [((c.view.num_frames - 1) * c.view.stride + 1) / frames[c.clip_id] for c in clips]
    assert facts["frames used"].startswith(f"{np.mean(used):.1%}")

    for name in ("report.png", "pack-0.png", "pack-1.png"):
        image = np.asarray(Image.open(io.BytesIO(out.read(name))).convert("L"))
        assert image.std() > 5  # something is drawn
    page = out.read("report.html").decode()
    assert page.count("<img") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # it needs nothing from elsewhere
    assert facts["plan"] in page


def test_a_clip_that_cannot_be_read_is_said(line: Assembly, tmp_path: Path) -> None:
    manifest = read_manifest(line.data.manifest)
    plan = line.planner().make(Store(tmp_path / "run"), 1, lambda text: None)
    reader = line.reader(f"{tmp_path}/moved-away")
    facts = inspect(plan, manifest, reader, 1, Store(tmp_path / "out"))
    assert (tmp_path / "out/report.html").exists()
    assert facts["clips used"]


def test_names_of_sources_are_text_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    name = "<script>x</script>\x1b[2J\n\u202e" + "x" * 900
    clips = Store(tmp_path / "clips")
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    write_shards(
        clips,
        [{"__key__": f"{i}", "mp4": encode(frames, 8.0), "json": {"source": name}} for i in "ab"],
        2,
    )
    chosen = IndexConfig(heldout_fraction=0.0)
    found = {n: index_shard(clips.url, n, chosen) for n in clips.list()}
    write_index(clips.url, f"{tmp_path}/manifest", found, chosen)
    overrides = [f"data.shards={clips.url}", f"data.manifest={tmp_path}/manifest"]
    line = Assembly.of(compose(["experiment=demo", "data.max_tokens=256", *overrides]))
    manifest = read_manifest(line.data.manifest)
    plan = line.planner().make(Store(tmp_path / "run"), 1, lambda text: None)
    facts = inspect(plan, manifest, line.reader(clips.url), 1, Store(tmp_path / "out"))
    assert facts["sources"].startswith(r"<script>x</script>\x1b[2J\n\u202exxx")
    assert facts["sources"].isprintable()
    assert len(facts["sources"]) < 200
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>" not in page
    assert r"&lt;script&gt;x&lt;/script&gt;\x1b[2J\n\u202e" in page
