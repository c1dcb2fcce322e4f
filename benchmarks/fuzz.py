"""Damage done to shards at random: no crash, no hang, no silent loss.

    python -m benchmarks.fuzz [CASES] [SEED]

Each case damages a tar of four clips (or one clip's file before it is put into the tar), indexes
it, and decodes what the index admits. A case is wrong where anything but a row, a named problem or
a counted stranger comes of a clip, or where something other than VideoError is raised. The last
line is JSON: how many cases came to which end.
"""

import io
import json
import sys
import tarfile
import tempfile
from collections import Counter

import numpy as np
from PIL import Image

from framework.data.config import IndexConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.data.shards.tar import read_members
from framework.storage import Store
from framework.video import VideoError, decode, encode

SHARD = "shard-000000.tar"
DAMAGES = ("flip", "noise", "zeros", "cut", "delete", "repeat", "swap", "digits")


def clips() -> dict[str, bytes]:
    """The files of four samples: three videos and a still, each with its JSON."""
    rng = np.random.default_rng(0)
    files = {}
    for i in range(3):
        frames = rng.integers(0, 255, (6 + i, 32, 32, 3), np.uint8)
        files[f"clip-{i}.mp4"] = encode(frames, 8.0, crf=40)
        files[f"clip-{i}.json"] = json.dumps({"caption": f"clip {i}", "score": i}).encode()
    still = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(still, "JPEG")
    return files | {"still.jpg": still.getvalue(), "still.json": b'{"caption": "a still"}'}


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The same bytes with one to three damages."""
    for _ in range(rng.integers(1, 4)):
        data = _damage(bytearray(data), str(rng.choice(DAMAGES)), rng)
    return data


def _damage(data: bytearray, kind: str, rng: np.random.Generator) -> bytes:
    if not data:
        return b""
    # Sizes of all magnitudes, so that single fields are hit as well as whole files.
    length = min(len(data), int(2 ** rng.uniform(0, 14)))
    start = int(rng.integers(0, len(data) - length + 1))
    piece = bytes(data[start : start + length])
    if kind == "flip":
        data[start] ^= 1 << int(rng.integers(8))
    elif kind == "noise":
        data[start : start + length] = rng.bytes(length)
    elif kind == "zeros":
        data[start : start + length] = bytes(length)
    elif kind == "cut":
        del data[start:]
    elif kind == "delete":
        del data[start : start + length]
    elif kind == "repeat":
        data[start:start] = piece
    elif kind == "swap":
        other = int(rng.integers(0, len(data) - length + 1))
        data[start : start + length], data[other : other + length] = (
            data[other : other + length],
            piece,
        )
    else:  # "digits": what a tar's header has numbers in
        data[start : start + length] = rng.integers(48, 56, length, np.uint8).tobytes()
    return bytes(data)


def check(files: dict[str, bytes], rng: np.random.Generator, store: Store) -> str:
    """Damage, index and decode once; how it ended. AssertionError where a clip is lost silently."""
    if rng.random() < 0.5:
        name = str(rng.choice(list(files)))
        shard = tar_of(files | {name: damaged(files[name], rng)})
    else:
        shard = damaged(tar_of(files), rng)
    store.write(SHARD, shard)
    found = index_shard(store.url, SHARD, IndexConfig(heldout_fraction=0.0))
    rows = found.table.to_pylist()
    if len(rows) < 4 and not found.problems and not found.num_ignored:
        members, _ = read_members(store, SHARD)
        rest = max((m.offset + m.size_bytes for m in members), default=0)
        # Zeros from the next block to the end are a shorter tar, and nobody can tell.
        assert not any(shard[-(-rest // 512) * 512 :]), "a clip is gone without a word"
        return "a shorter tar"
    assert all(problem.cause for problem in found.problems)
    if not rows:
        return "nothing left"
    write_index(store.url, store.child("manifest").url, {SHARD: found}, IndexConfig(0.0))
    failed = 0
    for row in rows:
        data = store.read_range(SHARD, row["offset"], row["size_bytes"])
        try:
            frames = decode(data, range(min(4, row["num_frames"])), 16, 16)
        except VideoError:
            failed += 1
        else:
            assert frames.shape[1:] == (16, 16, 3)
    if failed:
        return "a clip fails in decoding"
    return "all clips" if len(rows) == 4 else "some clips"


def run(cases: int, seed: int) -> Counter[str]:
    """So many cases; ends by what came of them."""
    files, ends = clips(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            try:
                ends[check(files, np.random.default_rng([seed, case]), Store(folder))] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}, case {case}")
                raise
    return ends


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    print(json.dumps(dict(run(*[*numbers, *[1000, 0][len(numbers) :]]))))
