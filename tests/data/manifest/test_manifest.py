import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.manifest.table import (
    SCHEMA,
    assign_split,
    checksum,
    clip_id,
    read_clip_ids,
    read_manifest,
    table_digest,
)
from framework.data.manifest.writer import cut_into_parts, make_manifest, write_manifest
from framework.storage import Store


def clip_row(index, **changes):
    key = f"k{index}"
    row = {
        "clip_id": clip_id("shard-000000.tar", key),
        "key": key,
        "shard": "shard-000000.tar",
        "member": f"{key}.mp4",
        "offset": 512 + 4096 * index,
        "size_bytes": 1000 + index,
        "checksum": checksum(key.encode()),
        "checked_bytes": 1000 + index,
        "first_frame": 0,
        "num_frames": 8 + index,
        "fps": 8.0,
        "height": 32,
        "width": 48,
        "captions": [f"a caption {index}", "naïve 漢字 🎬"],
        "source": "b" if index % 2 else "a",
        "video": f"video-{index // 2}",
        "split": "heldout" if index % 4 == 0 else "train",
    }
    return row | changes


def clip_table(num_clips=6, **changes):
    return pa.Table.from_pylist([clip_row(i, **changes) for i in range(num_clips)], SCHEMA)


def with_scores(table, name="aesthetic", scores=None, kind=None):
    scores = scores or [0.5 * i if i else None for i in range(table.num_rows)]
    return table.append_column(name, pa.array(scores, kind or pa.float64()))


def test_rows_are_sorted_whatever_their_order():
    table = clip_table(20)
    shuffled = table.take(np.random.default_rng(0).permutation(20))
    one, two = make_manifest(table, "/x"), make_manifest(shuffled, "s3://bucket/moved")
    assert one.table.equals(two.table)
    assert one.fingerprint == two.fingerprint  # neither order nor place counts
    assert (np.diff(one.table["clip_id"].to_numpy()) > 0).all()
    assert one.shards_url == "file:///x"
    assert len(one) == 20


def test_score_columns_follow_by_name_and_nan_is_null():
    table = with_scores(with_scores(clip_table(), "z", [1, 2, 3, None, 5, 6], pa.int16()), "motion")
    nan = with_scores(with_scores(clip_table(), "z", [1, 2, 3, float("nan"), 5, 6]), "motion")
    one, two = make_manifest(table, "/x"), make_manifest(nan, "/x")
    assert one.scores == ("motion", "z")
    assert one.table.schema.field("z").type == pa.float64()
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != make_manifest(clip_table(), "/x").fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": ["other"]},
        {"captions": ["a caption 0naïve 漢字 🎬"]},
        {"captions": ["a caption 0", "naïve 漢字 🎬", ""]},
        {"checksum": 1},
        {"fps": 8.001},
        {"num_frames": 80},
        {"split": "train"},
        {"video": "video-9"},
    ],
)
def test_fingerprint_sees_every_value(changes):
    rows = [clip_row(i) for i in range(4)]
    changed = [rows[0] | changes, *rows[1:]]
    tables = [pa.Table.from_pylist(r, SCHEMA) for r in (rows, changed)]
    one, two = (make_manifest(table, "/x").fingerprint for table in tables)
    assert one != two


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=3),
        min_size=1,
        max_size=8,
    ),
    cut=st.integers(0, 8),
)
def test_fingerprint_does_not_see_chunks_or_slices(texts, cut):
    rows = [clip_row(i, captions=captions) for i, captions in enumerate(texts)]
    table = with_scores(pa.Table.from_pylist(rows, SCHEMA))
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    assert table_digest(pieces) == table_digest(table)
    # Text that merely moves from one caption or clip to the next is another content.
    joined = [[*captions[:-1], captions[-1] + "|"] for captions in texts]
    moved = pa.Table.from_pylist([clip_row(i, captions=c) for i, c in enumerate(joined)], SCHEMA)
    assert table_digest(moved) != table_digest(table.select(SCHEMA.names))


def test_fingerprint_is_stable_for_ever():
    """A change here makes every plan and every run that exists refuse to go on."""
    table = with_scores(clip_table(3))
    assert make_manifest(table, "/x").fingerprint == "592f3b4106a807ecaeb95f612463dd53"
    assert clip_id("shard-000000.tar", "k0") == 320137926659870055


def test_write_and_read(tmp_path):
    store = Store(tmp_path / "manifest")
    manifest = make_manifest(with_scores(clip_table()), "s3://bucket/shards")
    write_manifest(store, manifest, {"unreadable video": 2})
    back = read_manifest(str(tmp_path / "manifest"))
    assert back.table.equals(manifest.table)
    assert (back.fingerprint, back.shards_url) == (manifest.fingerprint, "s3://bucket/shards")
    assert read_manifest(store, manifest.fingerprint).fingerprint == manifest.fingerprint
    commit = json.loads(store.read("manifest.json"))
    assert commit["counts"] == {"clips": 6, "train": 4, "heldout": 2}
    assert commit["failures"] == {"unreadable video": 2}


def test_an_older_snapshot_stays_readable(tmp_path):
    store = Store(tmp_path)
    old, new = make_manifest(clip_table(3), "/x"), make_manifest(clip_table(5), "/x")
    write_manifest(store, old)
    write_manifest(store, new)
    assert len(read_manifest(store)) == 5
    assert read_manifest(store, old.fingerprint).table.equals(old.table)


def test_what_is_not_committed_is_not_read(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        read_manifest(store)
    write_manifest(store, make_manifest(clip_table(), "/x"))
    store.delete("manifest.json")
    with pytest.raises(ValueError, match="index the shards"):
        read_manifest(store)
    with pytest.raises(ValueError, match="has no manifest 00"):
        read_manifest(store, "00")


@pytest.mark.parametrize(
    "damage", ["other rows", "noise", "no part", "no json", "version", "no url", "other parts"]
)
def test_a_damaged_manifest_is_refused(tmp_path, damage):
    store = Store(tmp_path)
    manifest = make_manifest(clip_table(), "/x")
    write_manifest(store, manifest)
    snapshot_name = f"snapshots/{manifest.fingerprint}.json"
    part = f"parts/{manifest.part_digests[0]}.parquet"
    if damage == "other rows":
        pq.write_table(manifest.table.slice(1), tmp_path / part)
    elif damage == "noise":
        store.write(part, b"noise" * 100)
    elif damage == "no part":
        store.delete(part)
    elif damage == "no json":
        store.write("manifest.json", b"{")
    elif damage == "version":
        store.write("manifest.json", b"[]")
    else:
        snapshot = json.loads(store.read(snapshot_name))
        changed = {"parts": ["00"]} if damage == "other parts" else {"shards_url": None}
        store.write(snapshot_name, json.dumps(snapshot | changed).encode())
    hint = {
        "other rows": "holds other rows",
        "noise": "is not readable",
        "no part": "is not readable",
        "other parts": "is of another manifest",
        "no json": "is not JSON",
        "version": "is not of version",
        "no url": "does not say where",
    }[damage]
    with pytest.raises(ValueError, match=hint):
        read_manifest(store).part(0)


@pytest.mark.parametrize("key", ["fingerprint", "version"])
def test_a_commit_without_a_key_is_a_sentence(tmp_path, key):
    store = Store(tmp_path)
    write_manifest(store, make_manifest(clip_table(), "/x"))
    commit = json.loads(store.read("manifest.json"))
    for changed in ({k: v for k, v in commit.items() if k != key}, commit | {key: [1]}):
        store.write("manifest.json", json.dumps(changed).encode())
        with pytest.raises(
            ValueError, match=r"manifest\.json (has no fingerprint|is not of version)"
        ):
            read_manifest(store)
    store.write("manifest.json", b"[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        read_manifest(store)


@pytest.mark.parametrize(
    "key", ["shards_url", "first_shard", "scores", "sources", "parts", "encoding"]
)
def test_a_snapshot_without_a_key_is_a_sentence(tmp_path, key):
    store = Store(tmp_path)
    manifest = make_manifest(clip_table(), "/x")
    write_manifest(store, manifest)
    name = f"snapshots/{manifest.fingerprint}.json"
    snapshot = json.loads(store.read(name))
    for changed in ({k: v for k, v in snapshot.items() if k != key}, snapshot | {key: 7}, [], 7):
        store.write(name, json.dumps(changed).encode())
        with pytest.raises(ValueError, match="index the shards anew"):
            read_manifest(store)
    store.write(name, b"[" * 100_000)
    with pytest.raises(ValueError, match="is not readable"):
        read_manifest(store)


@pytest.mark.parametrize(
    "shard",
    ["file:///etc/passwd", "../etc/passwd", "a/../../x.png", "s3://b/x.png", "file:///x/../etc/y"],
)
def test_rows_name_nothing_outside_the_shards(tmp_path, shard):
    write_manifest(Store(tmp_path), make_manifest(clip_table(3, shard=shard), "/x"))
    with pytest.raises(ValueError, match=r"lies outside file:///x|leads out of file:///x"):
        read_manifest(str(tmp_path)).part(0)
    if "://" in shard:
        rows = read_manifest(str(tmp_path), anywhere=True).table
        assert rows["shard"].to_pylist() == [shard] * 3
    inside = make_manifest(clip_table(3, shard="file:///x/a..b.png"), "/x")
    write_manifest(Store(tmp_path), inside)
    assert read_manifest(str(tmp_path)).table.equals(inside.table)


def test_a_manifest_has_its_shards_where_the_user_says(tmp_path):
    for folder in ("given", "private", "manifest/own"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "manifest/link").symlink_to(tmp_path / "private")
    store = Store(tmp_path / "manifest")
    given, private = f"file://{tmp_path}/given", f"file://{tmp_path}/private"
    for there in (given, f"{given}/below", f"{store.url}/own", store.url):
        write_manifest(store, make_manifest(clip_table(3), there))
        assert read_manifest(store, shards=given).shards_url == there
    for there in (private, f"{given}-too", f"file://{tmp_path}", f"{store.url}/link", "s3://a/b"):
        write_manifest(store, make_manifest(clip_table(3), there))
        with pytest.raises(ValueError, match=r"neither below data\.shards \(file://.*given\)"):
            read_manifest(store, shards=given)
        assert read_manifest(store, shards=given, anywhere=True).shards_url == there


def test_a_manifest_in_object_storage_names_no_local_file(tmp_path, s3_bucket):
    store, local = Store(f"{s3_bucket}/manifest"), f"file://{tmp_path}"
    write_manifest(store, make_manifest(clip_table(3), local))
    for anywhere in (False, True):
        for shards in (None, f"{local}/other"):
            with pytest.raises(ValueError, match="on this machine; name that folder by"):
                read_manifest(store, shards=shards, anywhere=anywhere)
        assert len(read_manifest(store, shards=local, anywhere=anywhere)) == 3
    write_manifest(store, make_manifest(clip_table(3, shard="file:///etc/passwd"), local))
    with pytest.raises(ValueError, match="lies outside"):
        read_manifest(store, shards=local, anywhere=True).part(0)
    write_manifest(store, make_manifest(clip_table(3, shard="file:///etc/passwd"), store.url))
    with pytest.raises(ValueError, match="is a local file"):
        read_manifest(store, shards=store.url, anywhere=True).part(0)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"num_frames": 0}, "'k0'.*num_frames must be from 1 to 16777216"),
        ({"width": -1}, "width must be from 1 to 65535"),
        ({"height": 65536}, "height must be from 1 to 65535"),
        ({"fps": 0.0}, "fps must be from 0.001 to 1000"),
        ({"fps": 1e-60}, "fps must be from 0.001 to 1000"),
        ({"fps": 1e300}, "fps must be from 0.001 to 1000"),
        ({"fps": float("nan")}, "fps must be from 0.001 to 1000"),
        ({"fps": float("inf")}, "fps must be from 0.001 to 1000"),
        ({"captions": []}, "captions may not be"),
        ({"captions": [None]}, "captions has empty cells"),
        ({"key": None}, "key has empty cells"),
        ({"split": "test"}, "split must be one of train, heldout"),
        ({"size_bytes": 0}, "size_bytes must be at least 1"),
        ({"clip_id": 7}, "clip_id 7 belongs to both .*k0.*k1"),
    ],
)
def test_wrong_rows_are_refused_by_name(changes, hint):
    with pytest.raises(ValueError, match=hint):
        make_manifest(clip_table(2, **changes), "/x")


def test_wrong_columns_are_refused_by_name():
    with pytest.raises(ValueError, match=r"lacks the column.* checksum, fps"):
        make_manifest(clip_table().drop_columns(["checksum", "fps"]), "/x")
    with pytest.raises(ValueError, match="column mood"):
        make_manifest(clip_table().append_column("mood", pa.array(["sad"] * 6)), "/x")


def test_shards_may_move():
    manifest = make_manifest(clip_table(), "/old")
    moved = dataclasses.replace(manifest, shards_url="s3://bucket/new")
    assert moved.fingerprint == manifest.fingerprint
    assert moved.first_shard == "shard-000000.tar"
    assert moved.sources == ("a", "b")


def test_an_empty_table_is_a_manifest():
    manifest = make_manifest(SCHEMA.empty_table(), "/x")
    assert (len(manifest), manifest.first_shard, manifest.num_parts) == (0, "", 1)


def test_parts_are_ranges_of_ids(tmp_path):
    table = with_scores(clip_table(100))
    manifest = make_manifest(table, "/x", part_rows=16)
    assert manifest.num_parts == 8
    parts = [manifest.part(i) for i in range(8)]
    assert sum(part.num_rows for part in parts) == 100
    assert max(part.num_rows for part in parts) < 32  # ids are hashes: a part is a random sample
    whole = make_manifest(table, "/x")
    assert manifest.table.equals(whole.table)
    assert (np.diff(manifest.table["clip_id"].to_numpy()) > 0).all()
    write_manifest(Store(tmp_path), manifest)
    back = read_manifest(Store(tmp_path))
    assert back.fingerprint == manifest.fingerprint
    assert back.part(5).equals(parts[5])
    assert pickle.loads(pickle.dumps(back)).part(5).equals(parts[5])


def test_parts_do_not_depend_on_how_rows_arrive():
    table = with_scores(clip_table(100))
    rows = np.random.default_rng(0).permutation(100)
    crumbs = [table.take(rows[start : start + 7]) for start in range(0, 100, 7)]
    parts = list(cut_into_parts(crumbs, 100, 16))
    whole = make_manifest(table, "/x", part_rows=16)
    assert [table_digest(part) for part in parts] == list(whole.part_digests)


def test_twins_are_found_in_whatever_tables_they_come():
    with pytest.raises(ValueError, match="rename one key"):
        list(cut_into_parts([clip_table(40), clip_table(3)], 43, 16))


def test_clip_ids_fit_int64_and_differ():
    ids = {clip_id(f"s{i % 7}", f"k{i}") for i in range(2000)}
    assert len(ids) == 2000
    assert all(0 <= i < 2**63 for i in ids)
    assert clip_id("a", "b/c") != clip_id("a/b", "c")


def test_split_stays_when_data_grows_and_has_the_share_asked_for():
    videos = [f"video-{i}" for i in range(4000)]
    split = assign_split(videos, 0.05)
    assert assign_split(videos[::-1], 0.05) == split[::-1]
    assert assign_split(videos[:10], 0.05) == split[:10]
    # Binomial: 200 +- 14; five sigma.
    assert abs(split.count("heldout") - 200) < 70
    # A larger share only adds to what is held out.
    wider = assign_split(videos, 0.1)
    assert all(w == "heldout" for s, w in zip(split, wider, strict=True) if s == "heldout")
    assert set(assign_split(videos, 0.0)) == {"train"}


def test_clips_to_take_out_are_read_from_a_file(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("# shown twice\n123\n\nshard-000000.tar k0\na.tar a key of words \n")
    wanted = {123, clip_id("shard-000000.tar", "k0"), clip_id("a.tar", "a key of words")}
    assert read_clip_ids(str(path)) == wanted
    path.write_text("123\nshard-only\n")
    with pytest.raises(ValueError, match="line 2: 'shard-only' is neither"):
        read_clip_ids(str(path))
    with pytest.raises(ValueError, match="is not a text file of clips"):
        read_clip_ids(str(tmp_path / "none.txt"))
