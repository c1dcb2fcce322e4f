import errno
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from framework import storage
from framework.data.config import IndexConfig
from framework.data.index.job import write_index
from framework.data.index.listing import list_units
from framework.data.index.shard import index_shard
from framework.data.manifest.table import read_manifest
from framework.data.shards.tar import read_members, write_shards
from framework.storage import (
    COMMAND,
    TRAINING,
    RetryPolicy,
    Store,
    join_url,
    normalize_url,
    with_retries,
)
from framework.video import encode

SOON = replace(COMMAND, first_delay_s=0.001)


@pytest.fixture
def s3_store(s3_bucket):
    """A store in an empty bucket of a real S3 server."""
    return Store(f"{s3_bucket}/a prefix#1", SOON)


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    if request.param == "file":
        return Store(tmp_path / "a folder#1%20é", SOON)
    return request.getfixturevalue("s3_store")


def test_write_read_list_delete(store):
    assert store.list() == []
    assert not store.exists()
    store.write("b/two.bin", b"0123456789")
    store.write("a.bin", b"old")
    store.write("a.bin", memoryview(b"new"))
    store.write("b/é 漢字+%20#?.txt", b"")
    assert store.list() == ["a.bin", "b/two.bin", "b/é 漢字+%20#?.txt"]
    assert store.list("b") == ["b/two.bin", "b/é 漢字+%20#?.txt"]
    assert store.list("none") == []
    assert store.child("b").list() == ["two.bin", "é 漢字+%20#?.txt"]
    assert store.read("a.bin") == b"new"
    assert store.read_buffer("a.bin").to_pybytes() == b"new"
    assert store.read("b/é 漢字+%20#?.txt") == b""
    assert store.size("b/two.bin") == 10
    assert store.exists("a.bin")
    assert store.exists("b")
    assert not store.exists("b/three")
    with store.open_input("b/two.bin") as file:
        assert file.read_at(3, 4) == b"456"
    store.delete("a.bin")
    store.delete("a.bin")
    assert not store.exists("a.bin")
    store.delete_folder("b")
    store.delete_folder("b")
    assert store.list() == []
    assert not store.exists("b/two.bin")


def test_read_range_to_the_byte(store):
    store.write("x", b"0123456789")
    assert store.read_range("x", 0, 10) == b"0123456789"
    assert store.read_range("x", 3, 4) == b"3456"
    assert store.read_range("x", 10, 0) == b""
    for offset, size_bytes in ((8, 3), (10, 1), (99, 1)):
        with pytest.raises(EOFError, match="ends at 10"):
            store.read_range("x", offset, size_bytes)


def test_what_is_not_there_is_file_not_found(store):
    store.write("folder/x", b"1")
    for read in (store.read, store.size, store.open_input):
        with pytest.raises(FileNotFoundError):
            read("none")
    with pytest.raises(FileNotFoundError):
        store.size("folder")


def test_a_large_object_and_a_stream(store):
    blob = bytes(range(256)) * (12 << 12)  # 12 MiB: several parts on S3
    store.write("large", blob)
    assert store.size("large") == len(blob)
    assert store.read_range("large", 5 << 20, 300) == blob[5 << 20 :][:300]
    with store.open_output("deep/er/stream") as stream:
        stream.write(b"one")
        stream.write(b"two")
    assert store.read("deep/er/stream") == b"onetwo"


def test_a_store_survives_pickling(store):
    store.write("x", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.read("x") == b"1"


def test_what_is_made_of_a_store_keeps_its_policy(store):
    patient = store.with_retry(TRAINING)
    assert (store.retry, patient.retry) == (SOON, TRAINING)
    elsewhere, name = patient.at(f"{store.url}/a/x")
    same, _ = patient.at("x")
    made = [pickle.loads(pickle.dumps(patient)), patient.child("a", "b"), elsewhere, same]
    assert [one.retry for one in made] == [TRAINING] * 4
    assert (elsewhere.url, name) == (store.child("a").url, "x")
    # The store of a folder is kept by `at`, for each policy by itself.
    assert store.at(f"{store.url}/a/x")[0].retry == SOON
    assert Store(store.url).retry == COMMAND


def test_stores_are_equal_where_url_and_policy_are(store):
    other = store.with_retry(TRAINING)
    assert store == Store(store.url, SOON) != other
    assert len({store, Store(store.url, SOON), other, store.child("a")}) == 3
    assert store != store.url


def test_a_store_tries_for_as_long_as_its_policy_says(tmp_path):
    class Away(Store):
        """Its file system answers no call."""

        calls = 0

        @property
        def fs(self):
            self.calls += 1
            raise OSError("AWS Error NETWORK_CONNECTION")

    stores = Away(tmp_path, RetryPolicy(0.0)), Away(tmp_path, RetryPolicy(0.05, 0.001))
    for store in stores:
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            store.exists("x")
    assert stores[0].calls <= 2 < stores[1].calls


def test_shards_on_a_store(store):
    samples = [{"__key__": f"k{i}", "mp4": b"v" * 50_000, "txt": "a caption"} for i in range(3)]
    assert write_shards(store, samples, 2) == ["shard-000000.tar", "shard-000001.tar"]
    members, problems = read_members(store, "shard-000000.tar")
    assert [m.name for m in members] == ["k0.mp4", "k0.txt", "k1.mp4", "k1.txt"]
    assert not problems
    last = members[-1]
    assert store.read_range("shard-000000.tar", last.offset, last.size_bytes) == b"a caption"


def test_an_index_on_a_store(store):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    samples = [
        {"__key__": f"k{i}", "mp4": encode(frames + i, 8.0), "json": {"caption": f"caption {i}"}}
        for i in range(3)
    ]
    write_shards(store.child("shards"), samples, 2)
    url = store.child("shards").url
    found = {name: index_shard(url, name, IndexConfig()) for name in Store(url).list()}
    report = write_index(url, store.child("manifest").url, found, IndexConfig())
    manifest = read_manifest(store.child("manifest"))
    assert (report.num_clips, report.problems) == (3, ())
    assert manifest.fingerprint == report.fingerprint
    for row in manifest.table.to_pylist():
        data = Store(manifest.shards_url).read_range(row["shard"], row["offset"], row["size_bytes"])
        assert data == samples[int(row["key"][1:])]["mp4"]
        assert row["captions"] == [f"caption {row['key'][1:]}"]


def test_a_version_changes_with_the_object_alone(store):
    store.write("x", b"one")
    store.write("y", b"one")
    first = store.version("x")
    assert store.version("x") == first
    store.write("y", b"two")
    assert store.version("x") == first
    store.write("x", b"two")
    assert store.version("x") != first
    with pytest.raises(FileNotFoundError):
        store.version("none")


def test_a_name_may_be_a_url(store, tmp_path):
    store.write("a/x", b"here")
    elsewhere = Store(f"{store.url}-elsewhere")
    elsewhere.write("b/x", b"there")
    free = Store(store.url, SOON, anywhere=True)
    for copy in (free, pickle.loads(pickle.dumps(free)), free.with_retry(TRAINING)):
        for name, content in (("a/x", b"here"), (f"{elsewhere.url}/b/x", b"there")):
            where, inside = copy.at(name)
            assert where.read_range(inside, 0, len(content)) == content
    assert store != free
    with pytest.raises(ValueError, match=r"lies outside .*data\.index\.anywhere=true"):
        store.at(f"{elsewhere.url}/b/x")
    (tmp_path / "private").write_bytes(b"secret")
    if not store.is_local:
        with pytest.raises(ValueError, match="is a local file"):
            free.at(f"file://{tmp_path}/private")


def test_no_name_leads_out_of_a_store(store):
    below = store.child("below")
    store.write("x", b"1")
    below.write("y", b"2")
    for name in ("../x", "a/../../x", "..", f"{below.url}/../x"):
        for action in (below.at, below.read, below.size, below.exists, below.list, below.delete):
            with pytest.raises((ValueError, FileNotFoundError)):
                action(name)
        with pytest.raises((ValueError, FileNotFoundError)):
            below.read_range(name, 0, 1)
        with pytest.raises(ValueError, match="leads out of"):
            below.write(name, b"3")
    assert store.read("x") == b"1"
    assert store.list() == ["below/y", "x"]


def test_loose_files_and_large_clips_of_a_store(store):
    """By table, and by range: the same rows as from whole files."""
    rng = np.random.default_rng(0)
    large = encode(rng.integers(0, 255, (24, 160, 240, 3), np.uint8), 8.0, crf=5)
    assert len(large) > 600 << 10
    store.write("files/large.mp4", large)
    store.write("files/clips.csv", b"path,caption,motion\nlarge.mp4,noise,0.5\n")
    root, units = list_units(store.child("files").url + "/clips.csv")
    rows = []
    for checksum in (False, True):
        config = IndexConfig(checksum=checksum)
        found = {unit.name: unit.index(root, config) for unit in units}
        assert units[0].made_of(root, config) == units[0].made_of(root, config)
        url = store.child(f"manifest-{checksum}").url
        assert write_index(root, url, found, config).problems == ()
        rows += read_manifest(url).table.to_pylist()
    assert rows[0]["checked_bytes"] < rows[1]["checked_bytes"] == len(large)
    same = ("clip_id", "num_frames", "fps", "height", "width", "captions", "motion", "size_bytes")
    assert [rows[0][name] for name in same] == [rows[1][name] for name in same]
    where, name = Store(root).at(rows[0]["shard"])
    assert where.read_range(name, rows[0]["offset"], rows[0]["size_bytes"]) == large


def test_s3_lies_where_the_url_says(s3_store):
    s3_store.write("x", b"1")
    assert Store("s3://bucket").list() == ["a prefix#1/x"]
    assert not s3_store.is_local
    with pytest.raises(ValueError, match="not on this machine"):
        s3_store.local_path()


def test_s3_without_the_bucket_fails_at_once(s3_store):
    missing = Store("s3://no-such-bucket/x", SOON)
    calls = []
    with pytest.raises(OSError, match="no such bucket"):
        with_retries(lambda: (calls.append(1), missing.write("x", b"1")), SOON)
    assert len(calls) == 1
    assert missing.list() == []


def test_write_leaves_no_partial_file(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        store.write("taken", b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_what_a_killed_write_left_is_not_listed(tmp_path):
    store = Store(tmp_path)
    store.write("x.tar", b"1")
    (tmp_path / "x.tar.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"a file of somebody")
    assert store.list() == ["notes.tmp", "x.tar"]


def test_local_path_is_the_path_given(tmp_path):
    store = Store(tmp_path / "a b" / ".." / "c%20")
    store.write("x", b"1")
    assert store.local_path() == tmp_path / "c%20"
    assert (tmp_path / "c%20" / "x").read_bytes() == b"1"
    assert Store("/").path("tmp") == "/tmp"


class Flaky:
    """Fails with the given errors in turn, then gives "done"."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_retries_ride_out_transient_errors():
    action = Flaky(OSError("SLOW_DOWN"), ConnectionResetError(), TimeoutError())
    assert with_retries(action, SOON) == "done"
    assert action.calls == 4


def test_retries_have_an_end():
    action = Flaky(*[OSError("AWS Error NETWORK_CONNECTION")] * 99)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        with_retries(action, RetryPolicy(0.05, 0.001))
    assert 1 < action.calls < 99


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        NotADirectoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation"),
        OSError("Cannot open for reading: path '/x' is a directory"),
        ValueError("not of storage at all"),
    ],
)
def test_permanent_errors_are_raised_at_once(error):
    action = Flaky(error)
    with pytest.raises(type(error)):
        with_retries(action, SOON)
    assert action.calls == 1


def test_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normalize_url("a/b/") == f"file://{tmp_path}/a/b"
    assert normalize_url(Path("a")) == f"file://{tmp_path}/a"
    assert normalize_url("file:///x/") == "file:///x"
    assert normalize_url("file:///") == "file:///"
    assert normalize_url("s3://bucket/x/") == "s3://bucket/x"
    assert normalize_url("s3://bucket/") == "s3://bucket"
    assert join_url("s3://bucket", "a", "b/c") == "s3://bucket/a/b/c"
    assert join_url("s3://bucket", "") == "s3://bucket"
    assert join_url("s3://bucket", "gs://other/x") == "gs://other/x"
    assert join_url("file:///", "tmp") == "file:///tmp"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("ftp://host/x", "scheme 'ftp'"),
        ("file://x/y", "must be absolute"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/x?endpoint_override=y", "AWS_ENDPOINT_URL"),
    ],
)
def test_bad_urls_are_refused(url, hint):
    with pytest.raises(ValueError, match=hint):
        Store(url)


def test_links_back_to_a_folder_end(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.tar").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/y.tar").write_bytes(b"y")
    store = Store(tmp_path / "a")
    for name, target in {"one": ".", "two": ".", "b/up": "..", "b/self": "self"}.items():
        (tmp_path / "a" / name).symlink_to(target)
    (tmp_path / "a/there").symlink_to("../elsewhere")
    (tmp_path / "a/z.tar").symlink_to("b/x.tar")
    assert store.list() == ["b/x.tar", "there/y.tar", "z.tar"]
    assert store.list("there") == ["there/y.tar"]


def test_links_that_make_too_many_folders_are_refused(tmp_path, monkeypatch):
    """Each of 40 folders has two links to the next: 2^40 paths, no circle."""
    monkeypatch.setattr(storage, "MAX_FOLDERS", 1000)
    for i in range(40):
        (tmp_path / f"{i}").mkdir()
        for name in "ab":
            (tmp_path / f"{i}" / name).symlink_to(f"../{i + 1}")
    with pytest.raises(ValueError, match=r"more than 1,000 folders .* name a folder of fewer"):
        Store(tmp_path / "0").list()
