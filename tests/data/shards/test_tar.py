import io
import os
import random
import tarfile

import pytest

from framework.data.shards import tar as shards
from framework.data.shards.ranged_file import FIRST_READ_BYTES
from framework.data.shards.tar import group_samples, read_members, split_name, write_shards
from framework.storage import Store


def samples(count, size_bytes=900):
    rng = random.Random(0)
    return [
        {
            "__key__": f"clip-{i:03d}",
            "mp4": rng.randbytes(size_bytes),
            "json": {"caption": f"ein Bär {i}", "aesthetic": 0.5},
            "txt": f"漢字 {i}",
        }
        for i in range(count)
    ]


def write_tar(store, members, name="x.tar", form=tarfile.PAX_FORMAT):
    """members: names or TarInfo, each with its payload (None: a header alone)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
        for info, payload in members:
            info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
            if payload is not None:
                info.size = len(payload)
            tar.addfile(info, None if payload is None else io.BytesIO(payload))
    store.write(name, buffer.getvalue())


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


class CountingFile:
    """A file that counts the requests it serves and their bytes."""

    def __init__(self, file):
        self.file = file
        self.requests = self.bytes = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def size(self):
        return self.file.size()

    def read_at(self, size_bytes, offset):
        self.requests += 1
        self.bytes += size_bytes
        return self.file.read_at(size_bytes, offset)


class CountingStore(Store):
    """A store whose last opened file counts."""

    def open_input(self, name):
        self.opened = CountingFile(super().open_input(name))
        return self.opened


def test_what_is_written_is_read_back(tmp_path):
    store = Store(tmp_path)
    written = samples(7)
    names = write_shards(store, iter(written), 3, first_shard=5)
    assert names == ["shard-000005.tar", "shard-000006.tar", "shard-000007.tar"]
    assert store.list() == names
    found = {}
    for name in names:
        members, problems = read_members(store, name)
        assert problems == []
        for member in members:
            payload = store.read_range(name, member.offset, member.size_bytes)
            found[member.key, member.ext] = payload
    assert len(found) == 21
    assert all(found[s["__key__"], "mp4"] == s["mp4"] for s in written)
    assert found["clip-006", "txt"].decode() == "漢字 6"
    assert found["clip-006", "json"].decode() == '{"aesthetic": 0.5, "caption": "ein Bär 6"}'


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        write_shards(Store(tmp_path / folder), samples(3), 2)
    for name in Store(tmp_path / "one").list():
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_nothing_to_write(tmp_path):
    assert write_shards(Store(tmp_path), [], 2) == []
    with pytest.raises(ValueError, match="clips_per_shard=0"):
        write_shards(Store(tmp_path), [], 0)


def test_webdataset_reads_our_shards(tmp_path):
    import webdataset

    (name,) = write_shards(Store(tmp_path), samples(4), 10)
    read = list(webdataset.WebDataset(str(tmp_path / name), shardshuffle=False))
    assert [s["__key__"] for s in read] == [s["__key__"] for s in samples(4)]
    assert [s["mp4"] for s in read] == [s["mp4"] for s in samples(4)]


@pytest.mark.parametrize(
    ("sample", "hint"),
    [
        ({"__key__": "a", "npy": b"x"}, "would be read back"),
        ({"__key__": "./a", "mp4": b"x"}, "would be read back"),
        ({"__key__": "../a", "mp4": b"x"}, "not a relative path"),
        ({"__key__": "/a", "mp4": b"x"}, "not a relative path"),
        ({"__key__": "a\n", "mp4": b"x"}, "control characters"),
        ({"__key__": "a", "mp4": b""}, "no bytes"),
        ({"__key__": "ok", "mp4": b"x"}, "comes twice"),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_refused(tmp_path, sample, hint):
    with pytest.raises(ValueError, match=hint):
        write_shards(Store(tmp_path), [{"__key__": "ok", "mp4": b"x"}, sample], 5)
    assert Store(tmp_path).list() == []


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.mp4", ("a", "mp4")),
        ("./a/b.v1.MP4", ("a/b.v1", "mp4")),
        ("vid.v2.mp4", ("vid.v2", "mp4")),
        ("a.b/c", ("a.b/c", "")),
        ("a.npy", ("a.npy", "")),
        (".mp4", (".mp4", "")),
        ("a/.mp4", ("a/.mp4", "")),
    ],
)
def test_split_name(name, split):
    assert split_name(name) == split


def test_dotted_names_are_two_samples(tmp_path):
    store = Store(tmp_path)
    write_tar(store, [("vid.v1.mp4", b"1"), ("vid.v2.mp4", b"2")])
    parts, problems, _ = group_samples("x.tar", read_members(store, "x.tar")[0])
    assert list(parts) == ["vid.v1", "vid.v2"]
    assert problems == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats(tmp_path, form):
    store = Store(tmp_path)
    names = ["a.mp4", "ü/漢.mp4", f"{'d' * 90}/{'e' * 80}.mp4"]
    if form != tarfile.USTAR_FORMAT:
        names.append("f" * 300 + "é.mp4")
    write_tar(
        store, [(n, n.encode()) for n in names] + [(special("d", tarfile.DIRTYPE), None)], form=form
    )
    members, problems = read_members(store, "x.tar")
    assert problems == []
    assert [m.name for m in members] == names
    for member in members:
        data = store.read_range("x.tar", member.offset, member.size_bytes)
        assert data == member.name.encode()


def test_only_headers_are_read(tmp_path):
    store = CountingStore(tmp_path)
    (name,) = write_shards(store, samples(5, size_bytes=1 << 20), 5)
    members, problems = read_members(store, name)
    assert (len(members), problems) == (15, [])
    # One request for each clip: what follows its video is the next one's JSON and video header.
    assert store.opened.requests <= 6
    assert store.opened.bytes <= 6 * FIRST_READ_BYTES
    assert store.size(name) > 5 << 20


def test_hostile_members_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_CLIP_BYTES", 1000)
    monkeypatch.setattr(shards, "MAX_TEXT_BYTES", 100)
    store = Store(tmp_path / "store")
    sparse = special("sparse.mp4", tarfile.GNUTYPE_SPARSE)
    refused = [
        (special("link.mp4", tarfile.SYMTYPE, "/etc/passwd"), None, "unsafe member"),
        (special("hard.mp4", tarfile.LNKTYPE, "ok.mp4"), None, "unsafe member"),
        (special("device.mp4", tarfile.CHRTYPE), None, "unsafe member"),
        (special("fifo.mp4", tarfile.FIFOTYPE), None, "unsafe member"),
        (sparse, b"x", "unsafe member"),
        ("/abs.mp4", b"x", "unsafe member"),
        ("a/../../up.mp4", b"x", "unsafe member"),
        ("esc\x1b[31m.mp4", b"x", "unsafe member"),
        ("bytes\udcff.mp4", b"x", "unsafe member"),
        ("large.mp4", b"x" * 1001, "too large"),
        ("large.txt", b"x" * 101, "too large"),
        ("empty.mp4", b"", "empty file"),
    ]
    write_tar(
        store,
        [("ok.mp4", b"x"), *[r[:2] for r in refused], ("end.txt", b"x")],
        form=tarfile.GNU_FORMAT,
    )
    members, problems = read_members(store, "x.tar")
    assert [m.name for m in members] == ["ok.mp4", "end.txt"]
    assert [p.cause for p in problems] == [r[2] for r in refused]
    assert [p.name for p in problems][:4] == ["link.mp4", "hard.mp4", "device.mp4", "fifo.mp4"]
    assert problems[8].name == "bytes\\udcff.mp4"
    assert all(p.shard == "x.tar" and p.reason for p in problems)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_truncated_shard_gives_what_is_before_the_cut(tmp_path):
    store = Store(tmp_path)
    (name,) = write_shards(store, samples(4), 4)
    whole = store.read(name)
    members, _ = read_members(store, name)
    end = members[-1].offset + 512
    for cut in range(0, end, 256):
        store.write("cut.tar", whole[:cut])
        kept, problems = read_members(store, "cut.tar")
        assert kept == [m for m in members if m.offset + m.size_bytes <= cut]
        assert [p.cause for p in problems] == ["truncated"]
        assert problems[0].offset <= cut + 512  # the next header, beyond the padding


def test_a_corrupt_header_gives_what_is_before_it(tmp_path):
    store = Store(tmp_path)
    (name,) = write_shards(store, samples(4), 4)
    members, _ = read_members(store, name)
    for i, member in enumerate(members):
        data = bytearray(store.read(name))
        data[member.offset - 512 + 10] ^= 1
        store.write("bad.tar", bytes(data))
        kept, problems = read_members(store, "bad.tar")
        assert kept == members[:i]
        assert [(p.cause, p.offset) for p in problems] == [("corrupt header", member.offset - 512)]


def test_a_hole_of_zeros_is_not_the_end(tmp_path):
    store = Store(tmp_path)
    (name,) = write_shards(store, samples(4), 4)
    members, _ = read_members(store, name)
    data = bytearray(store.read(name))
    start = members[5].offset - 512
    data[start : start + 1024] = bytes(1024)
    store.write("hole.tar", bytes(data))
    kept, problems = read_members(store, "hole.tar")
    assert kept == members[:5]
    assert [(p.cause, p.offset) for p in problems] == [("truncated", start)]
    assert "beyond the end-of-archive mark" in problems[0].reason


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "truncated"),
        (b"\x1f\x8b" + b"gzip" * 500, "corrupt header"),
        (bytes(1 << 21), "truncated"),
    ],
)
def test_what_is_no_tar(tmp_path, data, cause):
    store = Store(tmp_path)
    store.write("x.tar", data)
    members, problems = read_members(store, "x.tar")
    assert (members, [p.cause for p in problems]) == ([], [cause])


def test_an_empty_tar_is_no_problem(tmp_path):
    store = Store(tmp_path)
    write_tar(store, [])
    assert read_members(store, "x.tar") == ([], [])


def crafted(name, size_field, kind=tarfile.REGTYPE):
    header = bytearray(tarfile.TarInfo(name).tobuf())
    header[124:136] = size_field
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "header",
    [
        crafted("a.mp4", b"\xff" * 10 + b"\xfc\x00"),  # -1024 bytes: the header before
        crafted("a.mp4", b"\x80" + b"\x7f" * 11),
        crafted("a", b"77777777777\0", tarfile.GNUTYPE_LONGNAME),
        crafted("a", b"77777777777\0", tarfile.XHDTYPE),
        crafted("a", b"00000000000\0", tarfile.XHDTYPE) * 3000,
    ],
)
def test_crafted_headers_end_the_walk(tmp_path, header):
    store = Store(tmp_path)
    write_tar(store, [("ok.mp4", b"x" * 512)])
    store.write("bad.tar", store.read("x.tar")[:1024] + header + bytes(4096))
    members, problems = read_members(store, "bad.tar")
    assert [m.name for m in members] == ["ok.mp4"]
    assert [p.offset for p in problems] == [1024]


def test_noise_never_escapes_as_an_exception(tmp_path):
    store = Store(tmp_path)
    (name,) = write_shards(
        store, [{**s, "__key__": s["__key__"] + "é" * 80} for s in samples(3)], 3
    )
    whole = store.read(name)
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        start = 512 * rng.randrange(len(data) // 512)
        for _ in range(rng.randrange(1, 6)):
            data[start + rng.choice([rng.randrange(500), 124, 135, 156])] = rng.choice(
                [0, 48, 128, 255, *b"xgLKS1"]
            )
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        store.write("noise.tar", bytes(data))
        members, problems = read_members(store, "noise.tar")
        for member in members:
            member.name.encode()
            assert 0 < member.size_bytes <= len(data) - member.offset
        for problem in problems:
            (problem.name + problem.reason).encode()


def group(store, *names):
    write_tar(store, [(name, os.urandom(3)) for name in names])
    found, problems, num_ignored = group_samples("x.tar", read_members(store, "x.tar")[0])
    return {k: sorted(m.name for m in v.values()) for k, v in found.items()}, problems, num_ignored


def test_files_of_a_key_may_lie_apart(tmp_path):
    found, problems, num_ignored = group(
        Store(tmp_path), "a.mp4", "b.mp4", "a.json", "b.txt", "c.npy"
    )
    assert found == {"a": ["a.json", "a.mp4"], "b": ["b.mp4", "b.txt"]}
    assert (problems, num_ignored) == ([], 1)


@pytest.mark.parametrize(
    "names",
    [
        ("a.mp4", "a.json", "b.mp4", "a.mp4", "a.txt"),
        ("a.mp4", "a.json", "a.mp4", "a.txt", "b.mp4"),
        ("a.mp4", "a.json", "a.webm", "a.txt", "b.mp4"),
        ("a.mp4", "a.json", "./a.mp4", "a.txt", "b.mp4"),
    ],
)
def test_a_second_clip_of_the_same_key_is_refused_whole(tmp_path, names):
    found, problems, _ = group(Store(tmp_path), *names)
    assert found == {"a": ["a.json", "a.mp4"], "b": ["b.mp4"]}
    assert [(p.cause, p.name) for p in problems] == [("duplicate key", "a")]


def test_a_still_beside_a_video_is_a_thumbnail(tmp_path):
    found, problems, _ = group(Store(tmp_path), "a.jpg", "a.mp4", "b.png", "b.txt", "c.txt")
    assert found == {"a": ["a.mp4"], "b": ["b.png", "b.txt"]}
    assert [(p.cause, p.name) for p in problems] == [("no video", "c")]
