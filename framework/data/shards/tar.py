"""Tar shards: write them, and read their headers to byte offsets.

A shard is a webdataset tar: the files of one sample lie side by side and share a key. The key of
a member is its path without the last extension, where that extension is a known one (EXTENSIONS);
any other file is its own key and has no extension. So `vid.v1.mp4` and `vid.v2.mp4` are two
samples, where a split at the first dot, as in webdataset itself, would make them one.

Shards come from anywhere, so nothing is extracted and no name is trusted: a member that is not a
plain file with a sane relative path is refused by name. Invariant: what is not returned is
reported; a broken shard gives what could be read before the break, and the place of the break.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any, cast

from framework.data.shards.ranged_file import RangedFile
from framework.printable import printable
from framework.storage import Store, with_retries

VIDEO_EXTENSIONS = ("mp4", "mov", "webm", "mkv")
STILL_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TEXT_EXTENSIONS = ("json", "txt")
LATENTS_EXTENSION = "safetensors"
EXTENSIONS = (*VIDEO_EXTENSIONS, *STILL_EXTENSIONS, *TEXT_EXTENSIONS, LATENTS_EXTENSION)

# Chosen by hand. A clip is decoded in memory; a caption or a JSON of megabytes is not one.
MAX_CLIP_BYTES = 2 << 30
MAX_TEXT_BYTES = 4 << 20
MAX_HEADER_BYTES = 1 << 20  # long names and pax records; a real one has a few hundred bytes
# Tars end in zeros, filled up to a "record", by default of 10 KiB.
MAX_PADDING_BYTES = 1 << 20


@dataclass(frozen=True, order=True)
class Member:
    """A file in a shard: its payload is `size_bytes` bytes from `offset`."""

    name: str
    key: str
    ext: str  # lower case, one of EXTENSIONS, or ""
    offset: int
    size_bytes: int


@dataclass(frozen=True, order=True)
class ShardProblem:
    """Something in a shard that was left out, or could not be read."""

    shard: str
    offset: int  # in bytes, where in the shard
    cause: str  # a kind, to count by: "truncated", "unsafe member", …
    name: str = ""  # the member or the key, where one is known
    reason: str = ""

    def shown(self, max_chars: int) -> str:
        """Where, what and why, for people."""
        return printable(f"{self.shard} {self.name!r} {self.reason}", max_chars)

    def __str__(self) -> str:
        return f"{self.cause}: {self.shown(500)}"


def split_name(name: str) -> tuple[str, str]:
    """Split a member's path into key and extension; ("a/b.v1", "mp4") for "./a/b.v1.MP4"."""
    while name.startswith("./"):
        name = name[2:]
    stem, dot, ext = name.rpartition(".")
    if dot and ext.lower() in EXTENSIONS and stem and not stem.endswith("/"):
        return stem, ext.lower()
    return name, ""


def write_shards(
    store: Store, samples: Iterable[dict[str, Any]], clips_per_shard: int, first_shard: int = 0
) -> list[str]:
    """Write samples as `shard-000000.tar`, …; the names written.

    A sample has its key under "__key__", and under each extension bytes, a str, or for "json" any
    JSON value. The same samples give the same bytes. Each shard is made in memory and written
    atomically. ValueError for a key that `read_members` would not give back.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard={clips_per_shard} must be at least 1")
    names: list[str] = []
    shard: list[dict[str, Any]] = []

    def flush() -> None:
        names.append(f"shard-{first_shard + len(names):06d}.tar")
        store.write(names[-1], tar_bytes(shard).getbuffer())
        shard.clear()

    for sample in samples:
        shard.append(sample)
        if len(shard) == clips_per_shard:
            flush()
    if shard:
        flush()
    return names


def read_members(store: Store, name: str) -> tuple[list[Member], list[ShardProblem]]:
    """The members of a shard in order, and what was refused; reads headers, not payloads."""
    members: list[Member] = []
    problems: list[ShardProblem] = []
    with store.open_input(name) as file:

        def read_at(offset: int, size_bytes: int) -> bytes:
            return with_retries(lambda: file.read_at(size_bytes, offset), store.retry)

        for found in _walk(_HeaderFile(read_at, file.size()), name):
            if isinstance(found, ShardProblem):
                problems.append(found)
            elif refusal := _refusal(found):
                cause, reason = refusal
                where = _as_utf8(found.name)
                problems.append(ShardProblem(name, found.offset, cause, where, reason))
            elif found.isreg():
                key, ext = split_name(found.name)
                members.append(Member(found.name, key, ext, found.offset_data, found.size))
    return members, problems


def group_samples(
    shard: str, members: list[Member]
) -> tuple[dict[str, dict[str, Member]], list[ShardProblem], int]:
    """Members by key, and in a key by slot: "clip", "json", "txt"; refusals; how many were ignored.

    A run of members with one key is a group. The files of a key may lie apart (a tar made of all
    videos first, then of all captions); but a later group that brings what the key already has is
    another clip of the same name: all of it is refused, lest a clip get another one's caption.
    """
    groups: list[tuple[str, dict[str, Member]]] = []
    num_ignored = 0
    for member in members:
        if member.ext in ("", LATENTS_EXTENSION):
            num_ignored += 1
            continue
        slot = _slot(member.ext)
        if not groups or groups[-1][0] != member.key or slot in groups[-1][1]:
            groups.append((member.key, {}))
        groups[-1][1][slot] = member

    samples: dict[str, dict[str, Member]] = {}
    problems = []
    for key, group in groups:
        parts = samples.setdefault(key, {})
        if parts.keys() & group.keys():
            first = next(iter(group.values()))
            reason = "an earlier clip of this shard has this key"
            problems.append(ShardProblem(shard, first.offset, "duplicate key", key, reason))
        else:
            parts.update(group)
    for key, parts in list(samples.items()):
        still = parts.pop("still", None)
        if "clip" not in parts and still:  # beside a video it is a thumbnail
            parts["clip"] = still
        if "clip" not in parts:
            first = next(iter(parts.values()))
            reason = f"{first.name} has no video or still beside it"
            problems.append(ShardProblem(shard, first.offset, "no video", key, reason))
            del samples[key]
    return samples, problems, num_ignored


def tar_bytes(samples: list[dict[str, Any]]) -> BytesIO:
    """One shard of `write_shards`."""
    import webdataset  # here: it imports torch, seconds that those who only read need not wait

    buffer, keys = BytesIO(), set()
    # A fixed owner, mode and time make the bytes a function of the samples; pax allows any name.
    with webdataset.TarWriter(
        buffer, user="longtake", group="longtake", mtime=0, encoder=False, format="PAX_FORMAT"
    ) as tar:
        for sample in samples:
            key = sample["__key__"]
            if key in keys:
                raise ValueError(f"key={key!r} comes twice in a shard; keys must differ")
            keys.add(key)
            encoded = {ext: _encode(value) for ext, value in sample.items() if ext != "__key__"}
            for ext, data in encoded.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                if refusal := _refusal(info):
                    raise ValueError(f"key={key!r}, {ext!r}: {refusal[1]}")
                if split_name(info.name) != (key, ext):
                    raise ValueError(
                        f"key={key!r}, {ext!r} would be read back as {split_name(info.name)}; "
                        f"use an extension of {', '.join(EXTENSIONS)}, and no key that starts ./"
                    )
            tar.write({"__key__": key, **encoded})
    return buffer


def _encode(value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


class _HeaderFile(RangedFile):
    """A tar as `tarfile` may read it: a crafted header asks for any number of bytes."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _walk(reader: _HeaderFile, shard: str) -> Iterator[tarfile.TarInfo | ShardProblem]:
    """Every header of a tar. `tarfile` by itself takes a corrupt one for the end of the tar."""
    tar = None
    start = 0
    while True:
        reader.seek(start)
        block = reader.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            yield ShardProblem(shard, start, "truncated", reason="no end-of-archive mark")
            return
        if not any(block):
            break
        try:
            # Opening reads the first header as well; set back, since `fromtarfile` reads it again.
            tar = tar or tarfile.TarFile(fileobj=cast(IO[bytes], reader), errors="surrogateescape")
            tar.offset = start
            reader.seek(start)
            info = tarfile.TarInfo.fromtarfile(tar)
            if tar.offset <= start:  # a crafted size would send us round in circles
                raise tarfile.ReadError("it points backwards")
        except (tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
            yield ShardProblem(shard, start, "corrupt header", reason=str(error))
            return
        if not 0 <= info.size <= reader.size_bytes - info.offset_data:
            reason = f"{info.size} bytes at {info.offset_data} of a file of {reader.size_bytes}"
            yield ShardProblem(shard, info.offset, "truncated", _as_utf8(info.name), reason)
            return
        yield info
        start = tar.offset
    # A hole of zeros in the midst of a shard also reads as its end.
    reader.seek(start)
    left = reader.size_bytes - start
    if left > MAX_PADDING_BYTES or any(reader.read(left)):
        reason = f"{left} bytes lie beyond the end-of-archive mark"
        yield ShardProblem(shard, start, "truncated", reason=reason)


def _as_utf8(name: str) -> str:
    """A name from a tar as text that can be stored and shown, whatever bytes it had."""
    return name.encode("utf-8", "backslashreplace").decode()


def _slot(ext: str) -> str:
    if ext in TEXT_EXTENSIONS:
        return ext
    return "still" if ext in STILL_EXTENSIONS else "clip"


def _refusal(info: tarfile.TarInfo) -> tuple[str, str] | None:
    """Cause and reason to leave a member out, or None."""
    name = info.name
    if not info.isreg() and not info.isdir():
        return "unsafe member", "not a plain file: a link or a device"
    if info.issparse():
        return "unsafe member", "a sparse file: its bytes do not lie in one piece"
    if not name or name.startswith("/") or ".." in name.split("/"):
        return "unsafe member", "not a relative path inside the shard"
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in name):
        return "unsafe member", "the name has control characters or is not UTF-8"
    limit = MAX_TEXT_BYTES if split_name(name)[1] in TEXT_EXTENSIONS else MAX_CLIP_BYTES
    if info.size > limit:
        return "too large", f"{info.size} bytes, the limit is {limit}"
    if info.size == 0 and info.isreg():
        return "empty file", "no bytes"
    return None
