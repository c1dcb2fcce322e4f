"""Clips encoded ahead: the same tokens, once each, and never those of another line."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from framework.assembly import Assembly
from framework.batch import PackedBatch
from framework.config import compose
from framework.data.encode import job as encode_module
from framework.data.encode.job import EncodeReport, encode
from framework.data.encode.latents import dump_clip, load_clip
from framework.data.manifest.table import Manifest, read_manifest
from framework.data.manifest.writer import make_manifest
from framework.data.plan.store import Plan
from framework.data.stream.collate import assemble
from framework.data.stream.stream import open_stream
from framework.storage import Store


@pytest.fixture
def line(small_line: list[str], small_data: list[str], tmp_path: Path) -> list[str]:
    """Overrides of a line whose latents are to lie below tmp_path."""
    return [
        *small_line,
        *small_data,
        f"data.latents={tmp_path}/latents",
        "data.encode.dtype=float32",
        "data.encode.clips_per_shard=20",
    ]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors take seconds to start; what they do is done here, unit by unit."""

    def run(work: Callable[[pa.Table], int], units: Iterable[pa.Table], *_: Any) -> None:
        for unit in units:
            work(unit)

    monkeypatch.setattr(encode_module, "_run", run)


def encoded(line: list[str], manifest: Manifest | None = None, **changes: Any) -> EncodeReport:
    config = compose(line)
    assembly = Assembly.of(config)
    return encode(
        manifest or read_manifest(config.data.manifest),
        config.data.latents,
        assembly.on_videos().recipe(),
        assembly.encoders(),
        assembly.encoding() | changes,
        config.data.encode,
    )


def first_epoch(assembly: Assembly, folder: Path) -> tuple[Plan, Iterator[PackedBatch]]:
    """The plan of epoch 0 and its packs, read here."""
    assembly.check_data()
    run = Store(folder)
    plan = assembly.planner().make(run, 1, lambda _: None)
    reader = assembly.reader(assembly.planner().pinned_manifest(run).shards_url)
    return plan, (
        assemble(pack, reader, plan.recipe, epoch_step=step)
        for step in range(plan.num_steps(0))
        for pack in plan.packs(0, step, 0, 1)
    )


@pytest.mark.usefixtures("without_ray")
def test_the_first_epoch_is_the_same_to_the_bit(line: list[str], tmp_path: Path) -> None:
    report = encoded(line)
    assert report.num_clips == report.num_encoded == 96
    assert "96 clips encoded, 96 of them now" in str(report)
    assembly = Assembly.of(compose(line))
    plan, latents = first_epoch(assembly, tmp_path / "latents-run")
    other, videos = first_epoch(assembly.on_videos(), tmp_path / "videos-run")
    assert plan.digest != other.digest
    count = 0
    for ours, theirs in zip(latents, videos, strict=True):
        for field in dataclasses.fields(PackedBatch):
            one, two = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, two), field.name
        assert ours.failed == theirs.failed == ()
        count += int((ours.clip_ids >= 0).sum())
    assert count == plan.summary(0).clips > 60


@pytest.mark.usefixtures("without_ray")
def test_rows_keep_what_is_the_clips_own(line: list[str]) -> None:
    encoded(line)
    config = compose(line)
    videos = {r["clip_id"]: r for r in read_manifest(config.data.manifest).table.to_pylist()}
    manifest = read_manifest(config.data.latents)
    rows = manifest.table.to_pylist()
    assert {row["clip_id"] for row in rows} == set(videos)
    for row in rows:
        video = videos[row["clip_id"]]
        for name in ("key", "captions", "source", "video", "split"):
            assert row[name] == video[name]
        data = Store(manifest.shards_url).read_range(row["shard"], row["offset"], row["size_bytes"])
        latents, text = load_clip(data, video["captions"][0])
        frames = -(-row["num_frames"] // 4)
        assert latents.shape[1:] == (frames, row["height"] // 8, row["width"] // 8)
        assert len(text) >= 16
        assert len(load_clip(data, "")[1]) == 16


@pytest.mark.usefixtures("without_ray")
def test_half_the_bytes_are_nearly_the_same_tokens(line: list[str], tmp_path: Path) -> None:
    line = [*line, "data.encode.dtype=bfloat16"]
    encoded(line)
    assembly = Assembly.of(compose(line))
    _, latents = first_epoch(assembly, tmp_path / "latents-run")
    _, videos = first_epoch(assembly.on_videos(), tmp_path / "videos-run")
    ours, theirs = next(latents).tokens, next(videos).tokens
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).abs().max() <= 2**-8 * theirs.abs().max()


@pytest.mark.usefixtures("without_ray")
def test_frames_of_latents_are_those_of_the_codec(line: list[str], tmp_path: Path) -> None:
    encoded(line)
    assembly = Assembly.of(compose(line))
    plan, _ = first_epoch(assembly, tmp_path / "latents-run")
    other, _ = first_epoch(assembly.on_videos(), tmp_path / "videos-run")
    clips = [p.packs(0, 0, 0, 1)[0].clips[0] for p in (plan, other)]
    config = assembly.data
    ours = assembly.reader(config.latents).frames(clips[0])
    theirs = assembly.on_videos().reader(config.shards).frames(clips[1])
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).mean() < 8  # the codec drops the finest detail


@pytest.mark.usefixtures("without_ray")
def test_interrupted_it_goes_on_without_redoing_or_doubling(
    line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Store.write

    def counted(store: Store, name: str, data: Any) -> None:
        if name.startswith("rows/") and len(written) == 2:
            raise KeyboardInterrupt  # after its shard, before its commit
        if name.startswith("rows/"):
            written.append(name)
        write(store, name, data)

    monkeypatch.setattr(Store, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        encoded(line)
    monkeypatch.setattr(Store, "write", write)
    report = encoded(line)
    assert (report.num_clips, report.num_encoded) == (96, 56)
    assert len(set(read_manifest(compose(line).data.latents).table["clip_id"].to_pylist())) == 96
    again = encoded(line)
    assert (again.num_clips, again.num_encoded) == (96, 0)
    assert again.fingerprint == report.fingerprint


@pytest.mark.usefixtures("without_ray")
def test_a_manifest_that_grows_or_changes_costs_only_what_is_new(line: list[str]) -> None:
    config = compose(line)
    table = read_manifest(config.data.manifest).table

    def made(rows: pa.Table) -> Manifest:
        return make_manifest(rows, config.data.shards)

    first = encoded(line, made(table.slice(0, 50)))
    assert (first.num_clips, first.num_encoded) == (50, 50)
    grown = encoded(line, made(table))
    assert (grown.num_clips, grown.num_encoded) == (96, 46)

    rows = table.to_pylist()
    rows[3]["captions"] = ["other words"]
    rows[4]["source"] = "another"
    changed = encoded(line, made(pa.Table.from_pylist(rows, table.schema)))
    assert (changed.num_clips, changed.num_encoded) == (96, 1)
    found = read_manifest(config.data.latents).table.to_pylist()
    assert [row["captions"] for row in found] == [row["captions"] for row in rows]
    assert found[4]["source"] == "another"
    data = Store(config.data.latents).read_range(
        found[3]["shard"], found[3]["offset"], found[3]["size_bytes"]
    )
    load_clip(data, "other words")
    with pytest.raises(ValueError, match="no tensor"):
        load_clip(data, table["captions"][3].as_py()[0])

    fewer = encoded(line, made(table.slice(0, 10)))
    assert (fewer.num_clips, fewer.num_encoded) == (10, 0)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("data.views.fps=4.0", "views"),
        ("text.max_tokens=48", "text"),
        ("codec=identity data.max_tokens=2048", "codec"),
        ("data.encode.dtype=float16", "dtype"),
        ("data.max_tokens=100", "max_tokens"),
        ("run.seed=5", "seed"),
    ],
)
def test_a_cache_of_another_line_is_refused(line: list[str], override: str, word: str) -> None:
    encoded(line)
    other = [*line, *override.split()]
    with pytest.raises(ValueError, match=rf"was encoded otherwise:\n(.*\n)*  {word}: "):
        encoded(other)
    with pytest.raises(ValueError, match=rf"was encoded otherwise:\n(.*\n)*  {word}: "):
        Assembly.of(compose(other)).check_data()


@pytest.mark.usefixtures("without_ray")
def test_latents_are_not_taken_for_videos_nor_videos_for_latents(line: list[str]) -> None:
    encoded(line)
    config = compose(line)
    swapped = [*line, "data.latents=''", f"data.manifest={config.data.latents}"]
    with pytest.raises(ValueError, match=r"is of latents; set data\.latents"):
        Assembly.of(compose(swapped)).check_data()
    swapped = [*line, f"data.latents={config.data.manifest}"]
    with pytest.raises(ValueError, match="was encoded otherwise"):
        Assembly.of(compose(swapped)).check_data()


@pytest.mark.usefixtures("without_ray")
def test_what_cannot_be_read_is_named_and_not_tried_again(line: list[str], tmp_path: Path) -> None:
    config = compose(line)
    row = read_manifest(config.data.manifest).table.slice(7, 1).to_pylist()[0]
    shards = Store(config.data.shards)
    data = bytearray(shards.read(row["shard"]))
    data[row["offset"] + 40 : row["offset"] + 400] = bytes(360)
    shards.write(row["shard"], bytes(data))
    report = encoded(line)
    assert report.num_clips == 95
    (problem,) = report.problems
    assert (problem.name, problem.shard) == (row["key"], row["shard"])
    (named,) = json.loads(Store(config.data.latents).read("quarantine.json"))
    assert named["name"] == row["key"]
    assert encoded(line).num_encoded == 0


@pytest.mark.usefixtures("without_ray")
def test_damaged_latents_are_a_named_hole(line: list[str], tmp_path: Path) -> None:
    encoded(line)
    assembly = Assembly.of(compose(line))
    plan, batches = first_epoch(assembly, tmp_path / "run")
    clip = plan.packs(0, 0, 0, 1)[0].clips[0]
    store = Store(assembly.data.latents)
    data = bytearray(store.read(clip.shard))
    data[clip.offset + clip.size_bytes - 1] ^= 1
    store.write(clip.shard, bytes(data))
    batch = next(batches)
    assert batch.failed == (
        f"{clip.key}: its latents have changed since the manifest was made (checksum)",
    )
    assert batch.clip_weights[0] == 0
    assert batch.tokens[: clip.tokens].abs().sum() == 0
    assert int(batch.cu_text[1]) == clip.text_tokens


def test_a_file_of_latents_says_what_it_lacks() -> None:
    data = dump_clip(torch.ones(2, 1, 1, 1), {"one": torch.arange(3)}, torch.bfloat16)
    latents, text = load_clip(data, "one")
    assert latents.dtype == torch.float32
    assert text.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="of caption 'two'"):
        load_clip(data, "two")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_clip(b"noise" * 10, "one")


@pytest.mark.slow
def test_actors_and_stream_do_the_same(line: list[str], tmp_path: Path) -> None:
    import ray

    ray.init(num_cpus=4, include_dashboard=False, address="local", log_to_driver=False)
    try:
        report = encoded(line)
        assert (report.num_clips, report.num_encoded) == (96, 96)
        assembly = Assembly.of(compose(line))
        plan, batches = first_epoch(assembly, tmp_path / "run")
        reader, count = assembly.reader(assembly.data.latents), plan.num_steps(0)
        with open_stream(plan, reader, assembly.data.stream, 0, count, 0, 1) as steps:
            streamed = [batch for packs in steps for batch in packs]
        for ours, theirs in zip(streamed, batches, strict=True):
            used = int(theirs.cu_seqlens[len(theirs.clip_ids) - 1])
            assert torch.equal(ours.tokens[:used], theirs.tokens[:used])
            assert torch.equal(ours.clip_ids, theirs.clip_ids)
    finally:
        ray.shutdown()
