import dataclasses
import functools
import io
import json
import math
import random
import re
import struct
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from framework.data.config import IndexConfig
from framework.data.index import job as index_module
from framework.data.index.job import index, write_index
from framework.data.index.listing import Unit, list_units
from framework.data.index.shard import ShardIndex, index_files, index_shard, made_of
from framework.data.manifest.table import SCHEMA, checksum, clip_id, read_manifest
from framework.data.shards.tar import write_shards
from framework.printable import printable_page
from framework.storage import Store
from framework.video import encode

CONFIG = IndexConfig(heldout_fraction=0.3)


def video_bytes(num_frames=4, height=32, width=48, fps=8.0, seed=0):
    rng = np.random.default_rng(seed)
    return encode(rng.integers(0, 255, (num_frames, height, width, 3), np.uint8), fps)


def still_bytes(height=20, width=30):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


VIDEO = video_bytes()


def repr_cut(value):
    return repr(value)[:20]


def write_tar(store, name, members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, payload in members:
            info = tarfile.TarInfo(path)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    store.write(name, buffer.getvalue())


def clean_shards(store, num_shards, clips=3, first=0):
    samples = (
        {
            "__key__": f"clip-{i:04d}",
            "mp4": VIDEO,
            "json": {"caption": f"caption {i}", "video": f"film-{i // 2}", "score": i / 7},
        }
        for i in range(first * clips, (first + num_shards) * clips)
    )
    return write_shards(store, samples, clips, first_shard=first)


def index_here(store, config=CONFIG, names=None):
    names = names or [name for name in store.list() if name.endswith(".tar")]
    return {name: index_shard(store.url, name, config) for name in names}


def one_row(store, json_value=None, config=CONFIG, **parts):
    sample = {"__key__": "a", "mp4": VIDEO} | parts
    if json_value is not None:
        sample["json"] = json_value
    (name,) = write_shards(store, [sample], 1)
    found = index_shard(store.url, name, config)
    return found.table.to_pylist()[0] if found.table.num_rows else found.problems[0]


def test_a_row_says_where_the_clip_is_and_what_it_is(tmp_path):
    store = Store(tmp_path)
    meta = {
        "caption": "Žlutý kůň 🐎",
        "source": "films",
        "video": "film-7",
        "aesthetic": 5,
        "motion": 0.25,
        "ok": True,
        "height": 9999,
        "spec": {"radius": 8},
        "odd": float("nan"),
        "huge": 10**400,
    }
    row = one_row(store, meta)
    data = store.read_range("shard-000000.tar", row["offset"], row["size_bytes"])
    assert data == VIDEO
    assert row.pop("offset") % 512 == 0
    assert row == {
        "clip_id": clip_id("shard-000000.tar", "a"),
        "key": "a",
        "shard": "shard-000000.tar",
        "member": "a.mp4",
        "size_bytes": len(VIDEO),
        "checksum": checksum(VIDEO),
        "checked_bytes": len(VIDEO),
        "first_frame": 0,
        "num_frames": 4,
        "fps": 8.0,
        "height": 32,
        "width": 48,
        "captions": ["Žlutý kůň 🐎"],
        "source": "films",
        "video": "film-7",
        "aesthetic": 5.0,
        "motion": 0.25,
    }


def test_a_clip_without_any_text_is_kept(tmp_path):
    row = one_row(Store(tmp_path))
    assert row["captions"] == [""]
    assert (row["source"], row["video"]) == ("default", "shard-000000.tar/a")


@pytest.mark.parametrize(
    ("parts", "captions"),
    [
        (
            {"json_value": {"captions": [" one", "two", "one"]}, "txt": "three\n"},
            ["one", "two", "three"],
        ),
        ({"json_value": {"caption": ["one"], "captions": "two"}}, ["one", "two"]),
        ({"json_value": {"caption": None}, "txt": "one"}, ["one"]),
        ({"json_value": {"caption": "  "}}, [""]),
        ({"txt": b"\xef\xbb\xbfone"}, ["one"]),
        ({"json_value": b'\xef\xbb\xbf{"caption": "one"}'}, ["one"]),
    ],
)
def test_captions(tmp_path, parts, captions):
    assert one_row(Store(tmp_path), **parts)["captions"] == captions


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ({"json_value": b"{"}, "unreadable metadata"),
        ({"json_value": b"[1]"}, "unreadable metadata"),
        ({"json_value": b"[" * 100_000}, "unreadable metadata"),
        ({"json_value": b"\xff"}, "unreadable metadata"),
        ({"json_value": b'{"caption": "\\ud800"}'}, "unreadable metadata"),
        ({"json_value": {"caption": 7}}, "unreadable metadata"),
        ({"json_value": {"source": ["x"]}}, "unreadable metadata"),
        ({"json_value": {"video": {}}}, "unreadable metadata"),
        ({"txt": b"\xff\xfe"}, "unreadable metadata"),
        ({"mp4": b"no video at all"}, "unreadable video"),
        ({"mp4": VIDEO[: len(VIDEO) // 2]}, "unreadable video"),
    ],
)
def test_a_bad_sample_is_quarantined_by_its_key(tmp_path, parts, cause):
    problem = one_row(Store(tmp_path), **parts)
    assert (problem.cause, problem.name, problem.shard) == (cause, "a", "shard-000000.tar")
    assert problem.reason


def test_frame_rate_of_the_json_counts_for_videos_alone(tmp_path):
    assert one_row(Store(tmp_path), {"fps": 12})["fps"] == 12
    assert one_row(Store(tmp_path), {"fps": 0})["fps"] == 8
    write_shards(Store(tmp_path), [{"__key__": "s", "png": still_bytes(), "json": {"fps": 12}}], 1)
    (row,) = index_here(Store(tmp_path))["shard-000000.tar"].table.to_pylist()
    assert (row["num_frames"], row["fps"], row["height"], row["width"]) == (1, 1.0, 20, 30)


NONSENSE = (1e-60, 1e-4, -1, -1e-60, 1e300, 2000, 10**400, math.nan, math.inf, -math.inf, True)


@pytest.mark.parametrize("fps", [*NONSENSE, "24", [24], {"a": 1}, "x" * 100_000], ids=repr_cut)
def test_a_nonsensical_rate_is_reported_and_the_clip_keeps_its_own(tmp_path, fps):
    store = Store(tmp_path / "shards")
    still = {"__key__": "s", "png": still_bytes(), "json": {"fps": fps}}
    samples = [{"__key__": "a", "mp4": VIDEO, "json": {"fps": fps, "score": 2}}, still]
    write_shards(store, [*samples, {"__key__": "b", "mp4": VIDEO, "json": {"fps": 12}}], 3)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    rows = read_manifest(str(tmp_path / "manifest")).table.to_pylist()
    assert {row["key"]: row["fps"] for row in rows} == {"a": 8, "s": 1, "b": 12}
    assert report.failures == {"unusable fps": 1}
    (problem,) = report.problems
    assert (problem.name, problem.shard) == ("a", "shard-000000.tar")
    assert problem.reason.startswith("fps=")
    assert problem.reason.endswith(
        "is not a number from 0.001 to 1000; the clip keeps its own rate, 8"
    )
    assert len(problem.reason) < 500
    assert "1 x unusable fps" in str(report)


@pytest.mark.parametrize("value", [*NONSENSE, 0, -0.0, 1, 2**31, 2**63, 2**64, 1e39, "7"])
def test_no_number_in_a_json_stops_an_index(tmp_path, value):
    """Every field that a manifest has, and scores; clips beside it are indexed."""
    store = Store(tmp_path / "shards")
    names = [*SCHEMA.names, "score", "caption", "-"]
    samples = [{"__key__": f"k-{n}", "mp4": VIDEO, "json": {n: value}} for n in names]
    write_shards(store, [*samples, {"__key__": "beside", "mp4": VIDEO}], len(names) + 1)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    table = read_manifest(str(tmp_path / "manifest")).table
    left = {problem.name for problem in report.problems}
    assert {"beside", "k-score", "k-height"} <= set(table["key"].to_pylist())
    assert left <= {"k-caption", "k-captions", "k-source", "k-fps", "k-video"}
    assert len(table) >= len(names) + 1 - len(left)


def odd_video(ticks_per_s=None, pixel=None):
    """Four frames in slots of 2048 ticks; `pixel` is the shape of one, width and height."""
    frames, sink = io.BytesIO(VIDEO), io.BytesIO()
    with av.open(frames) as old, av.open(sink, "w", format="mp4") as new:
        stream = new.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for frame in old.decode(video=0):
            new.mux(stream.encode(frame))
        new.mux(stream.encode())
    data = sink.getvalue()
    if ticks_per_s:
        at = data.index(b"mdhd") + 16
        data = data[:at] + struct.pack(">I", ticks_per_s) + data[at + 4 :]
    if pixel:
        at = data.index(b"pasp") + 4
        data = data[:at] + struct.pack(">II", *pixel) + data[at + 8 :]
    return data


@pytest.mark.parametrize(
    ("odd", "fact"),
    [
        ({"ticks_per_s": 2**31 - 1}, "fps=1048575"),
        ({"pixel": (60_000, 1)}, "width=2880000"),
        ({"pixel": (2**31 - 1, 1)}, "width=103079215056"),
        ({"pixel": (1, 2**30)}, "height=34359738368"),
    ],
)
def test_a_file_whose_own_numbers_are_no_use_is_quarantined_alone(tmp_path, odd, fact):
    store = Store(tmp_path / "shards")
    samples = [{"__key__": "a", "mp4": odd_video(**odd)}, {"__key__": "b", "mp4": odd_video()}]
    write_shards(store, samples, 2)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    assert read_manifest(str(tmp_path / "manifest")).table["key"].to_pylist() == ["b"]
    (problem,) = report.problems
    assert (problem.cause, problem.name) == ("unusable number", "a")
    assert problem.reason.startswith(fact)
    assert " must be from " in problem.reason


def messy_shards(store):
    """Two shards with one of each mishap."""
    write_tar(
        store,
        "a/messy.tar",
        [
            ("good.mp4", VIDEO),
            ("good.json", b'{"caption": "one", "score": 1}'),
            ("bare.mp4", VIDEO),
            ("good.mp4", VIDEO[:100]),
            ("broken.mp4", b"noise" * 300),
            ("broken.txt", b"a caption"),
            ("still.png", still_bytes()),
            ("lonely.txt", b"no clip"),
            ("vid.v1.mp4", VIDEO),
            ("vid.v2.mp4", VIDEO),
            ("../up.mp4", VIDEO),
            ("empty.mp4", b""),
            ("weights.npy", b"x"),
        ],
    )
    clean_shards(store.child("b"), 1)
    cut = store.read("b/shard-000000.tar")
    members = index_shard(store.url, "b/shard-000000.tar", CONFIG).table["offset"].to_pylist()
    store.write("b/shard-000000.tar", cut[: members[1] + 40])


def test_index_of_messy_shards(tmp_path):
    store, manifest_url = Store(tmp_path / "shards"), str(tmp_path / "manifest")
    messy_shards(store)
    report = write_index(store.url, manifest_url, index_here(store), CONFIG)
    manifest = read_manifest(manifest_url)
    assert sorted(manifest.table["key"].to_pylist()) == [
        "bare",
        "clip-0000",
        "good",
        "still",
        "vid.v1",
        "vid.v2",
    ]
    assert report.failures == {
        "duplicate key": 1,
        "empty file": 1,
        "no video": 2,
        "truncated": 1,
        "unreadable video": 1,
        "unsafe member": 1,
    }
    assert (report.num_clips, report.num_shards, report.num_stills) == (6, 2, 1)
    assert report.num_train + report.num_heldout == 6
    assert report.num_uncaptioned == 4
    assert report.num_ignored == 1
    assert report.duration_s == pytest.approx(5 * 4 / 8)
    assert report.resolutions == {"48x32": 5, "30x20": 1}
    assert report.fingerprint == manifest.fingerprint
    quarantine = json.loads(Store(manifest_url).read("quarantine.json"))
    assert len(quarantine) == 7
    broken = next(entry for entry in quarantine if entry["cause"] == "unreadable video")
    assert (broken["shard"], broken["name"]) == ("a/messy.tar", "broken")
    commit = json.loads(Store(manifest_url).read("manifest.json"))
    assert commit["failures"] == report.failures
    scores = {r["key"]: r["score"] for r in manifest.table.to_pylist()}
    assert scores == {"good": 1.0, "clip-0000": 0.0} | dict.fromkeys(
        ("bare", "still", "vid.v1", "vid.v2")
    )


def test_the_report_is_one_screen(tmp_path):
    store = Store(tmp_path / "shards")
    messy_shards(store)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    text = str(report)
    assert len(text.splitlines()) < 25
    assert "6 clips of 2 shards" in text
    assert "'broken'" in text
    many = dataclasses.replace(report, problems=report.problems * 50)
    assert len(str(many).splitlines()) < 40
    assert "raise data.index.heldout_fraction" in str(dataclasses.replace(report, num_heldout=0))


def test_manifest_does_not_depend_on_the_order_of_tasks(tmp_path):
    store = Store(tmp_path / "shards")
    clean_shards(store, 4)
    messy_shards(store)
    names = [name for name in store.list() if name.endswith(".tar")]
    tables, quarantines = [], []
    for order in (names, names[::-1], random.Random(1).sample(names, len(names))):
        target = Store(tmp_path / "manifest")
        write_index(store.url, target.url, index_here(store, names=order), CONFIG)
        tables.append(read_manifest(target))
        quarantines.append(target.read("quarantine.json"))
    assert len({manifest.fingerprint for manifest in tables}) == 1
    assert len(set(quarantines)) == 1


def test_split_and_ids_stay_when_shards_are_added(tmp_path):
    store = Store(tmp_path / "shards")
    clean_shards(store, 3)
    write_index(store.url, str(tmp_path / "old"), index_here(store), CONFIG)
    clean_shards(store, 3, first=3)
    write_index(store.url, str(tmp_path / "new"), index_here(store), CONFIG)
    old, new = read_manifest(str(tmp_path / "old")), read_manifest(str(tmp_path / "new"))
    assert (len(old), len(new)) == (9, 18)
    is_old = pc.is_in(new.table["clip_id"], old.table["clip_id"].combine_chunks())
    assert new.table.filter(is_old).equals(old.table)
    split_of = {}
    for row in new.table.to_pylist():
        assert split_of.setdefault(row["video"], row["split"]) == row["split"]
    assert set(split_of.values()) == {"train", "heldout"}


def test_scores_beyond_the_limit_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_SCORES", 2)
    store = Store(tmp_path / "shards")
    scores = [{"a": 1, "b": 1}, {"b": 2, "c": 2}, {"b": 3, "c": 3}]
    samples = [{"__key__": f"k{i}", "mp4": VIDEO, "json": s} for i, s in enumerate(scores)]
    write_shards(store, samples, 1)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    assert read_manifest(str(tmp_path / "manifest")).scores == ("b", "c")
    assert report.failures == {"too many scores": 1}
    assert "left out: a" in report.problems[0].reason


def test_no_clip_at_all(tmp_path):
    store = Store(tmp_path / "shards")
    write_tar(store, "x.tar", [("a.mp4", b"noise" * 99)])
    with pytest.raises(ValueError, match=r"1 shards hold no clip, first: .*unreadable video"):
        write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    assert Store(tmp_path / "manifest").list() == []


def test_wrong_folders_and_numbers_name_themselves(tmp_path):
    with pytest.raises(ValueError, match=r"file://.*/none' has no file that ends in \.tar"):
        index(str(tmp_path / "none"), str(tmp_path / "manifest"))
    Store(tmp_path).write("x.tar.gz", b"\x1f\x8b")
    with pytest.raises(ValueError, match="has compressed shards"):
        index(str(tmp_path), str(tmp_path / "manifest"))
    with pytest.raises(ValueError, match="heldout_fraction=1"):
        IndexConfig(heldout_fraction=1)
    with pytest.raises(ValueError, match="must be a name"):
        IndexConfig(source="")


def test_a_shard_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        index_shard(str(tmp_path), "gone.tar", CONFIG)


def test_shards_are_indexed_alike_by_threads(tmp_path):
    store = Store(tmp_path / "shards")
    names = clean_shards(store, 3)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda name: index_shard(store.url, name, CONFIG), names))
    assert all(isinstance(part, ShardIndex) for part in parts)
    assert pa.concat_tables([p.table for p in parts]).equals(
        pa.concat_tables([p.table for p in index_here(store).values()])
    )


@pytest.fixture
def two_cpus():
    # A short path, since Ray's sockets lie below it; and never a Ray that happens to run here.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        try:
            yield ray.init(
                "local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 << 20,
                _temp_dir=folder,
                log_to_driver=False,
            )
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_index_on_ray(tmp_path, two_cpus):
    store = Store(tmp_path / "shards")
    clean_shards(store, 4)
    messy_shards(store)
    progress = []
    report = index(store.url, str(tmp_path / "ray"), CONFIG, lambda *at: progress.append(at))
    here = write_index(store.url, str(tmp_path / "here"), index_here(store), CONFIG)
    assert report.fingerprint == here.fingerprint
    assert report.problems == here.problems
    assert progress == [(i + 1, 6) for i in range(6)]
    again = index(store.url, str(tmp_path / "ray"), CONFIG)
    assert again.fingerprint == report.fingerprint
    assert read_manifest(str(tmp_path / "ray")).table.equals(
        read_manifest(str(tmp_path / "here")).table
    )

    with pytest.raises(RuntimeError, match=r"gone\.tar"):
        index_module._index_on_ray(
            store.url, [Unit("gone.tar")], CONFIG, Store(tmp_path / "ray"), lambda *at: None
        )


@functools.cache
def large_video(container="mp4", faststart=False):
    """A clip of megabytes, whose header lies at its end or at its beginning."""
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 255, (40, 200, 300, 3), np.uint8)
    source = io.BytesIO(encode(frames, 10.0, crf=5))
    options = {"movflags": "faststart"} if faststart else {}
    with tempfile.NamedTemporaryFile() as sink:
        with (
            av.open(source) as old,
            av.open(sink.name, "w", format=container, options=options) as new,
        ):
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(old.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        return sink.read()


class Watched:
    """Counts the bytes that are read of a store."""

    def __init__(self, monkeypatch):
        self.size_bytes = 0
        read_range = Store.read_range

        def counted(store, name, offset, size_bytes):
            self.size_bytes += size_bytes
            return read_range(store, name, offset, size_bytes)

        monkeypatch.setattr(Store, "read_range", counted)


@pytest.mark.parametrize("faststart", [False, True])
def test_of_a_large_clip_the_beginning_and_the_header_are_read(tmp_path, monkeypatch, faststart):
    data = large_video(faststart=faststart)
    assert len(data) > 2 << 20
    store = Store(tmp_path)
    write_shards(store, [{"__key__": "a", "mp4": data}, {"__key__": "b", "mp4": VIDEO}], 2)
    watched = Watched(monkeypatch)
    by_range = index_shard(store.url, "shard-000000.tar", CONFIG).table.to_pylist()
    assert watched.size_bytes < 1 << 20
    whole = dataclasses.replace(CONFIG, checksum=True)
    in_full = index_shard(store.url, "shard-000000.tar", whole).table.to_pylist()
    assert watched.size_bytes > len(data)
    assert by_range[1] == in_full[1]
    checked = by_range[0].pop("checked_bytes")
    assert by_range[0].pop("checksum") == checksum(data[:checked])
    assert (in_full[0].pop("checked_bytes"), in_full[0].pop("checksum")) == (
        len(data),
        checksum(data),
    )
    assert by_range[0] == in_full[0]
    assert by_range[0]["num_frames"] == 40


@pytest.mark.parametrize("container", ["mkv", "noise", "cut"])
def test_what_the_header_does_not_say_is_read(tmp_path, container):
    """Matroska counts no frames; and what is wrong is said of the whole clip."""
    data = large_video()
    if container == "noise":
        data = data[: len(data) - 5000] + bytes(5000)
    elif container == "cut":
        data = data[: len(data) * 3 // 4]
    else:
        data = large_video("matroska")
    store = Store(tmp_path)
    write_shards(store, [{"__key__": "a", "mkv" if container == "mkv" else "mp4": data}], 1)
    found = [
        index_shard(store.url, "shard-000000.tar", dataclasses.replace(CONFIG, checksum=full))
        for full in (False, True)
    ]
    assert found[0].problems == found[1].problems
    assert [row["num_frames"] for row in found[0].table.to_pylist()] == [
        row["num_frames"] for row in found[1].table.to_pylist()
    ]
    assert bool(found[0].problems) == (container in ("noise", "cut"))


LINES = [
    {"path": "a/one.mp4", "caption": "one", "source": "films", "video": "film-1", "motion": 0.5},
    {"path": "a/two.mov", "caption": "two", "source": "films", "video": "film-1", "motion": 2},
    {"path": "three.png", "caption": None, "source": None, "video": None, "motion": None},
    {"path": "gone.mp4", "caption": "x", "source": None, "video": None, "motion": None},
    {"path": "empty.mp4", "caption": "x", "source": None, "video": None, "motion": None},
    {"path": "words.txt", "caption": "x", "source": None, "video": None, "motion": None},
]


def write_table(path, rows):
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))


def loose_files(folder):
    (folder / "a").mkdir(parents=True)
    (folder / "a/one.mp4").write_bytes(VIDEO)
    (folder / "a/two.mov").write_bytes(video_bytes(6))
    (folder / "three.png").write_bytes(still_bytes())
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "words.txt").write_bytes(b"words")


def index_table(path, manifest_url, config=CONFIG):
    root, units = list_units(str(path), config.anywhere)
    found = {unit.name: unit.index(root, config) for unit in units}
    return write_index(root, str(manifest_url), found, config)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_loose_files_of_a_table(tmp_path, kind):
    files = tmp_path / "files"
    loose_files(files)
    write_table(files / f"clips.{kind}", LINES)
    report = index_table(files / f"clips.{kind}", tmp_path / "manifest")
    rows = {row["key"]: row for row in read_manifest(str(tmp_path / "manifest")).table.to_pylist()}
    assert sorted(rows) == ["a/one.mp4", "a/two.mov", "three.png"]
    one = rows["a/one.mp4"]
    assert (one["captions"], one["source"], one["video"]) == (["one"], "films", "film-1")
    assert (one["motion"], one["offset"], one["num_frames"]) == (0.5, 0, 4)
    assert rows["a/two.mov"]["num_frames"] == 6
    assert rows["three.png"]["captions"] == [""]
    assert report.failures == {"empty file": 1, "missing file": 1, "no video": 1}
    manifest = read_manifest(str(tmp_path / "manifest"))
    assert manifest.shards_url == f"file://{files}"
    where, name = Store(manifest.shards_url).at(one["shard"])
    assert where.read_range(name, one["offset"], one["size_bytes"]) == VIDEO


def test_a_table_names_files_elsewhere_by_url(tmp_path):
    loose_files(tmp_path / "files")
    (tmp_path / "list").mkdir()
    paths = [f"file://{tmp_path}/files/a/one.mp4", "../files/a/two.mov"]
    write_table(tmp_path / "list/clips.csv", [{"path": path} for path in paths])
    anywhere = dataclasses.replace(CONFIG, anywhere=True)
    index_table(tmp_path / "list/clips.csv", tmp_path / "manifest", anywhere)
    rows = read_manifest(str(tmp_path / "manifest"), anywhere=True).table.to_pylist()
    assert {row["shard"] for row in rows} == {
        f"file://{tmp_path}/files/a/one.mp4",
        f"file://{tmp_path}/files/a/two.mov",
    }
    where, name = Store(tmp_path / "list", anywhere=True).at(rows[0]["shard"])
    assert len(where.read(name)) == rows[0]["size_bytes"]


@pytest.mark.parametrize(
    "path",
    [
        "{private}/one.png",
        "file://{private}/one.png",
        "../private/one.png",
        "below/../../private/one.png",
        "file://{files}/../private/one.png",
        "file://{files}-too/one.png",
        "s3://bucket/private/one.png",
    ],
)
def test_a_table_reads_nothing_outside_its_folder(tmp_path, path):
    files, private = tmp_path / "files", tmp_path / "private"
    for folder in (files, private, tmp_path / "files-too"):
        folder.mkdir()
        (folder / "one.png").write_bytes(still_bytes())
    strange = path.format(files=files, private=private)
    write_table(files / "clips.csv", [{"path": f"{files}/one.png"}, {"path": strange}])
    with pytest.raises(ValueError, match=r"lies outside .*; data\.index\.anywhere=true"):
        list_units(str(files / "clips.csv"))
    if path.startswith("{private}"):
        return
    # A task looks again at what it is given.
    with pytest.raises(ValueError, match=r"lies outside|leads out of"):
        index_files(f"file://{files}", pa.table({"path": [strange]}), CONFIG)


def test_a_table_in_object_storage_names_no_local_file(tmp_path, s3_bucket):
    (tmp_path / "one.png").write_bytes(still_bytes())
    store = Store(f"{s3_bucket}/clips")
    for path in (f"{tmp_path}/one.png", f"file://{tmp_path}/one.png"):
        store.write("clips.csv", f"path\n{path}\n".encode())
        for anywhere in (False, True):
            with pytest.raises(ValueError, match="is a local file; data in s3://"):
                list_units(f"{store.url}/clips.csv", anywhere)
    store.write("clips.csv", b"path\ns3://other/one.png\n")
    assert len(list_units(f"{store.url}/clips.csv", True)[1]) == 1


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("x.csv", None, "is not a table of files"),
        ("x.parquet", b"noise", "is not a table of files"),
        ("x.jsonl", b'{"path": ', "is not a table of files"),
        ("x.csv", b"file,caption\na.mp4,one\n", "lacks the column path; it has file, caption"),
        ("x.csv", b"path,caption\na.mp4,one\na.mp4,two\n", "lists a.mp4 twice"),
        ("x.csv", b"path,caption\n,one\n", "has an empty path"),
        ("x.csv", b"path,caption\n", "lists no file"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tmp_path, name, rows, words):
    if rows is not None:
        (tmp_path / name).write_bytes(rows)
    with pytest.raises(ValueError, match=words):
        list_units(str(tmp_path / name))


def test_long_videos_are_cut_into_equal_clips(tmp_path):
    store = Store(tmp_path / "shards")
    lengths = {"short": 8, "exact": 16, "long": 17, "longer": 50}
    samples = [
        {"__key__": key, "mp4": video_bytes(frames), "json": {"motion": frames}}
        for key, frames in lengths.items()
    ]
    write_shards(store, samples, 4)
    plain = write_index(store.url, str(tmp_path / "plain"), index_here(store), CONFIG)
    assert plain.num_clips == 4
    config = dataclasses.replace(CONFIG, max_seconds=2.0)  # of 8 frames
    report = write_index(store.url, str(tmp_path / "cut"), index_here(store), config)
    rows = read_manifest(str(tmp_path / "cut")).table.to_pylist()
    stretches = {
        key: sorted((r["first_frame"], r["num_frames"]) for r in rows if r["key"] == key)
        for key in lengths
    }
    assert stretches == {
        "short": [(0, 8)],
        "exact": [(0, 16)],
        "long": [(0, 8), (8, 9)],
        "longer": [(0, 12), (12, 13), (25, 12), (37, 13)],
    }
    assert report.num_clips == len({row["clip_id"] for row in rows}) == 8
    for key in lengths:  # one video, one split
        assert len({(r["split"], r["video"]) for r in rows if r["key"] == key}) == 1
    uncut = {
        r["key"]: r["clip_id"] for r in read_manifest(str(tmp_path / "plain")).table.to_pylist()
    }
    assert {r["clip_id"] for r in rows} & set(uncut.values()) == {uncut["short"], uncut["exact"]}


def test_what_was_found_in_a_shard_is_kept_to_the_byte(tmp_path):
    store = Store(tmp_path / "shards")
    messy_shards(store)
    found = index_shard(store.url, "a/messy.tar", CONFIG)
    kept = found.to_parquet("this shard")
    assert made_of(kept) == "this shard"
    back = ShardIndex.from_parquet(kept)
    assert back.table.equals(found.table)
    assert (back.problems, back.num_ignored) == (found.problems, found.num_ignored)


@pytest.mark.slow
def test_an_index_goes_on_where_it_was(tmp_path, two_cpus):
    """Shards that are as they were are not read again; others are, and added ones."""
    store, kept = Store(tmp_path / "shards"), Store(tmp_path / "manifest")
    clean_shards(store, 3)
    index(store.url, kept.url, CONFIG)
    names = [name for name in kept.list() if name.startswith("shards/")]
    assert len(names) == 3
    for name in names:  # make what is kept recognisable
        data = kept.read_buffer(name)
        marked = dataclasses.replace(ShardIndex.from_parquet(data), num_ignored=100)
        kept.write(name, marked.to_parquet(made_of(data)))
    kept.delete(names[0])  # as if it had been interrupted before this one
    kept.delete("manifest.json")
    assert index(store.url, kept.url, CONFIG).num_ignored == 200
    first = read_manifest(kept)

    clean_shards(store, 1, first=3)
    samples = [{"__key__": "new", "mp4": video_bytes(7), "json": {"caption": "another"}}]
    write_shards(store, samples, 1, first_shard=0)
    report = index(store.url, kept.url, CONFIG)
    assert report.num_clips == 1 + 3 + 3 + 3
    assert report.num_ignored in (100, 200)  # what was replaced may be the one read just now
    second = read_manifest(kept)
    same = [row for row in first.table.to_pylist() if row["shard"] != "shard-000000.tar"]
    assert all(row in second.table.to_pylist() for row in same)
    in_full = index(store.url, kept.url, dataclasses.replace(CONFIG, checksum=True))
    assert in_full.num_ignored == 0


EVIL = "\x1b[2J\r\n\x9bforged line\u202e"


def test_no_text_of_data_reaches_a_terminal_or_an_error_as_it_is(tmp_path):
    """Sources, keys and names of columns are shown escaped and cut; files keep the true text."""
    store = Store(tmp_path / "shards")
    key = "k\u202e\x9b"
    good = {"__key__": "a", "mp4": VIDEO, "json": {"source": EVIL, EVIL: 1}}
    bad = [{"__key__": f"{key}{i}", "mp4": b"noise" * 99} for i in range(2)]
    write_shards(store, [good, *bad, {"__key__": "d", "mp4": VIDEO, "json": {"fps": EVIL}}], 4)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    shown = printable_page(report)
    assert not set(shown) & set("\x1b\r\x9b\u202e")
    assert not [line for line in shown.splitlines() if line.startswith(("forged", "\\x9bforged"))]
    assert r"\x1b[2J\r\n\x9bforged line\u202e 1" in shown
    manifest = read_manifest(str(tmp_path / "manifest"))
    assert EVIL in manifest.sources
    assert manifest.scores == (EVIL,)
    quarantine = json.loads(Store(tmp_path / "manifest").read("quarantine.json"))
    assert {f"{key}0", f"{key}1"} < {entry["name"] for entry in quarantine}

    write_tar(store, "shard-000000.tar", [(f"{key}.mp4", b"noise" * 99)])
    with pytest.raises(ValueError, match="hold no clip") as caught:
        write_index(store.url, str(tmp_path / "other"), index_here(store), CONFIG)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "table",
    [f'"{EVIL}",b\n1,2\n', f'path\n"a{EVIL}.mp4"\n"a{EVIL}.mp4"\n', f'path,b\n"{EVIL}"\n'],
    ids=["column", "twice", "parser"],
)
def test_no_text_of_a_table_reaches_an_error_as_it_is(tmp_path, table):
    Store(tmp_path).write("clips.csv", table.encode())
    with pytest.raises(ValueError, match=r"\\x1b\[2J") as caught:
        list_units(f"{tmp_path}/clips.csv")
    assert str(caught.value).isprintable()


def bomb(columns):
    """A Parquet of some kB."""
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd", store_schema=False)
    assert len(sink.getvalue()) < 100_000
    return sink.getvalue()


def many(value, count):
    """A value so many times, kept once."""
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [value])


TABLES = {
    "deep.jsonl": (
        lambda: b'{"path": "a.mp4", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        "nested 20,001 deep, the limit is 64; flatten it",
    ),
    "lines.jsonl": (lambda: b'{"path": "a.mp4", "x":\n' + b"[\n" * 20_000, "nested 20,001 deep"),
    "closed.jsonl": (
        lambda: b"]" * 30_000 + b'\n{"x": "a\n' + b'{"x":' * 20_000 + b"\n",
        "nested 20,001 deep",
    ),
    "names.jsonl": (
        lambda: b"".join(b'{"path": "%d", "x%d": 1}\n' % (i, i) for i in range(3000)),
        "more than 1000 names; leave some out",
    ),
    "twice.jsonl": (lambda: b'{"path": "a", "x": 1, "x": 2}\n', "twice"),
    "twice.csv": (lambda: b"path,x,x\na,1,2\n", "the column x comes twice; rename one"),
    "paths.csv": (lambda: b"path,path\na,b\n", "the column path comes twice"),
    "wide.csv": (
        lambda: b"path" + b",x" * 200_000 + b"\na" + b",1" * 200_000 + b"\n",
        "200,001 columns, the limit is 1000; leave some out",
    ),
    "text.parquet": (
        lambda: bomb({"path": many("b" * 100_000, 30_000)}),
        "3,000,.* bytes unpacked, the limit is 2,147,483,648; split it",
    ),
    "list.parquet": (
        lambda: bomb(
            {
                "path": many("a", 300),
                "captions": pa.ListArray.from_arrays(
                    np.arange(0, 30_100, 100, np.int32), many("b" * 100_000, 30_000)
                ),
            }
        ),
        "3,000,.* bytes unpacked",
    ),
    "rows.parquet": (
        lambda: bomb({"path": pa.nulls(30_000_000, pa.null())}),
        "30,000,000 rows, the limit is 20,000,000; split it",
    ),
    "list_path.jsonl": (lambda: b'{"path": ["a"]}\n', "is not a table of files"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_too_much_is_refused_before_it_is_built(tmp_path, name):
    data, words = TABLES[name]
    Store(tmp_path).write(name, data())
    with pytest.raises(ValueError, match=words) as caught:
        list_units(f"{tmp_path}/{name}")
    assert f"{tmp_path}/{name} " in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_brackets_and_quotes_in_a_text_are_no_nesting(tmp_path):
    rows = [{"path": f"{i}.mp4", "caption": "[{\\" * 50 + '\\"' + "[" * 99} for i in range(300)]
    Store(tmp_path).write("c.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    _, (unit,) = list_units(f"{tmp_path}/c.jsonl")
    assert unit.files.to_pylist() == rows


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({f"n{i}": i for i in range(20_000)}, "20000 numbers, .* keep 256 at most"),
        ({"x" * 1001: 1}, "a number's name has 1001 characters"),
        ({"source": "x" * 1001}, "source has 1001 characters; give it 1000 at most"),
        ({"video": "x" * 4_000_000}, "video has 4000000 characters"),
    ],
)
def test_one_clip_that_has_too_much_is_quarantined_alone(tmp_path, meta, words):
    store = Store(tmp_path / "shards")
    beside = {"score": 1.5, "source": "x" * 1000}
    samples = [{"__key__": k, "mp4": VIDEO, "json": v} for k, v in {"a": meta, "b": beside}.items()]
    write_shards(store, samples, 2)
    report = write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    manifest = read_manifest(str(tmp_path / "manifest"))
    assert (manifest.table["key"].to_pylist(), manifest.scores) == (["b"], ("score",))
    (problem,) = report.problems
    assert (problem.cause, problem.name) == ("unreadable metadata", "a")
    assert re.search(words, problem.reason)


def test_many_different_numbers_of_a_shard_are_cut_by_how_many_clips_have_them(tmp_path):
    store = Store(tmp_path / "shards")
    samples = [
        {"__key__": f"{i}", "mp4": VIDEO, "json": {"all": i, **{f"{i}-{n}": n for n in range(250)}}}
        for i in range(6)
    ]
    write_shards(store, samples, 6)
    found = index_here(store)
    report = write_index(store.url, str(tmp_path / "manifest"), found, CONFIG)
    assert found["shard-000000.tar"].table.num_columns == len(SCHEMA) - 1 + 1024
    assert "all" in read_manifest(str(tmp_path / "manifest")).scores
    assert report.failures == {"too many scores": 2}
    assert "1501 different numbers, 1024 are kept; left out: 4-119, " in report.problems[1].reason


def test_too_many_sources_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_SOURCES", 3)
    store = Store(tmp_path / "shards")
    samples = [{"__key__": f"{i}", "mp4": VIDEO, "json": {"source": f"s{i}"}} for i in range(4)]
    write_shards(store, samples, 2)
    with pytest.raises(ValueError, match=r"more than 3 sources, such as 's0'; .*`video` a film"):
        write_index(store.url, str(tmp_path / "manifest"), index_here(store), CONFIG)
    assert Store(tmp_path / "manifest").list() == []


def test_a_path_that_no_file_can_have_is_a_missing_file(tmp_path):
    paths = ["a\x00b.mp4", "x" * 5000 + ".mp4", "a/" * 3000 + "b.mp4", "good.mp4"]
    Store(tmp_path).write("good.mp4", VIDEO)
    lines = "".join(json.dumps({"path": path}) + "\n" for path in paths)
    Store(tmp_path).write("clips.jsonl", lines.encode())
    root, (unit,) = list_units(f"{tmp_path}/clips.jsonl")
    assert unit.made_of(root, CONFIG)
    found = unit.index(root, CONFIG)
    assert found.table["key"].to_pylist() == ["good.mp4"]
    assert [problem.cause for problem in found.problems] == ["missing file"] * 3
    assert [problem.name for problem in found.problems] == paths[:3]
