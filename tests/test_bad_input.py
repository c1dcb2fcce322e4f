"""Bad input, named in two tables, and what each gives.

CLIPS: what shards may hold. Each is left out by name under a cause that is counted, or is made use
of; the clips beside it train. COMMANDS: what a person may type, and places that are not as they
should be. Each is one sentence, before a worker starts, and exit status 2.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.assembly import Assembly
from framework.config import compose
from framework.data.config import IndexConfig
from framework.data.index.job import index, write_index
from framework.data.index.listing import list_units
from framework.data.index.shard import index_shard
from framework.data.plan.store import Plan
from framework.storage import Store
from framework.tracking.mlflow import first_free_port
from framework.video import encode

Files = list[tuple[str, bytes]]


def video(num_frames: int = 8, seed: int = 0) -> bytes:
    """A clip of 32 x 32 pixels at 8 frames a second, of its own."""
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, 4, 4, 3), np.uint8)
    return encode(frames.repeat(8, axis=1).repeat(8, axis=2), 8.0)


def sample(key: str, data: bytes | None = None, caption: str | None = "a clip") -> Files:
    text = {} if caption is None else {"caption": caption}
    files = [(f"{key}.mp4", video(seed=len(key)) if data is None else data)]
    return [*files, (f"{key}.json", json.dumps(text).encode())]


def tar(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def damaged(data: bytes, start: int, length: int) -> bytes:
    """The same with noise from `start` on."""
    return data[:start] + np.random.default_rng(7).bytes(length) + data[start + length :]


def with_noise_in_its_pictures() -> bytes:
    """Its tables and first pictures are whole."""
    data = video(16)
    tables, pictures = data.rindex(b"moov"), data.rindex(b"mdat")
    assert pictures < tables
    start = pictures + int(0.7 * (tables - pictures))
    return damaged(data, start, 500)


GOOD = sample("good")


@dataclass(frozen=True)
class Left:
    """What a shard of good and bad samples gives: causes counted, and keys that train."""

    causes: dict[str, int]
    trained: set[str]
    failed: int = 0  # clips that turn out broken only when they are decoded: holes of weight zero


CLIPS: dict[str, tuple[bytes, Left]] = {
    "a truncated tar": (
        tar([*GOOD, *sample("cut", video(24))])[: 512 * 12],
        Left({"truncated": 1}, {"good"}),
    ),
    "a corrupt header": (
        tar(GOOD).rstrip(b"\0").ljust(len(tar(GOOD)) - 9216, b"\0") + b"\1" * 512 + tar(GOOD),
        Left({"corrupt header": 1}, {"good"}),
    ),
    "no tar at all": (b"<html>Not found</html>" * 100, Left({"corrupt header": 1}, set())),
    "an empty shard": (b"", Left({"truncated": 1}, set())),
    "noise over an MP4's tables": (
        tar([*GOOD, *sample("noise", damaged(video(), 0, 4000))]),
        Left({"unreadable video": 1}, {"good"}),
    ),
    "noise inside an MP4": (
        tar([*GOOD, *sample("noise", with_noise_in_its_pictures())]),
        Left({}, {"good", "noise"}, failed=1),
    ),
    "a cut MP4": (
        tar([*GOOD, *sample("cut", video()[:2000])]),
        Left({"unreadable video": 1}, {"good"}),
    ),
    "an empty file": (
        tar([*GOOD, *sample("empty", b"")]),
        Left({"empty file": 1, "no video": 1}, {"good"}),
    ),
    "text called MP4": (
        tar([*GOOD, *sample("text", b"not a video " * 100)]),
        Left({"unreadable video": 1}, {"good"}),
    ),
    "a caption without a clip": (
        tar([*GOOD, ("alone.json", b'{"caption": "nothing"}')]),
        Left({"no video": 1}, {"good"}),
    ),
    "JSON that is none": (
        tar([*GOOD, ("json.mp4", video()), ("json.json", b'{"caption": ')]),
        Left({"unreadable metadata": 1}, {"good"}),
    ),
    "a missing caption": (tar([*GOOD, ("mute.mp4", video())]), Left({}, {"good", "mute"})),
    "a caption of any Unicode": (
        tar([*GOOD, *sample("words", caption="é 漢字 🎬 \u202e \x00 \u0301 \n" * 9)]),
        Left({}, {"good", "words"}),
    ),
    "a caption of half a character": (
        tar([*GOOD, *sample("half", caption="\ud800")]),
        Left({"unreadable metadata": 1}, {"good"}),
    ),
    "a caption of a megabyte": (
        tar([*GOOD, *sample("long", caption="word " * 200_000)]),
        Left({}, {"good", "long"}),
    ),
    "two samples of one key": (
        tar([*GOOD, *sample("twin"), ("between.txt", b"words"), *sample("twin", video(12))]),
        Left({"duplicate key": 1, "no video": 1}, {"good", "twin"}),
    ),
    "a clip longer than the budget": (
        tar([*GOOD, *sample("long", video(400))]),
        Left({}, {"good", "long"}),  # its view has the frames that fit
    ),
    "a clip smaller than any size": (
        tar([*GOOD, *sample("tiny", encode(np.zeros((8, 16, 16, 3), np.uint8), 8.0))]),
        Left({}, {"good"}),
    ),
    "names that lead out of the folder": (
        tar([*GOOD, ("../../etc/passwd.mp4", video()), ("/root.mp4", video())]),
        Left({"unsafe member": 2}, {"good"}),
    ),
}


@pytest.mark.parametrize("name", CLIPS)
def test_bad_clips_are_named_and_counted_and_the_others_train(name: str, tmp_path: Path) -> None:
    data, expected = CLIPS[name]
    shards = Store(tmp_path / "clips")
    shards.write("shard-000000.tar", data)
    shards.write("shard-000001.tar", tar(sample("beside")))
    found = {n: index_shard(shards.url, n, IndexConfig(0.0)) for n in shards.list()}
    report = write_index(shards.url, f"{tmp_path}/manifest", found, IndexConfig(0.0))
    assert report.failures == expected.causes, str(report)
    assert all(cause in str(report) for cause in expected.causes)
    quarantine = json.loads((tmp_path / "manifest/quarantine.json").read_text())
    assert len(quarantine) == sum(expected.causes.values())

    line = Assembly.of(compose(overrides(tmp_path)))
    plan = line.planner().make(Store(tmp_path / "runs/bad"), 1, lambda _: None)
    reader = line.reader(shards.url)
    clips = list(clips_of(plan))
    read = list(zip(clips, reader.read(clips), strict=True))
    assert {clip.key for clip, _ in read} == expected.trained | {"beside"}
    assert sum(bool(found.cause) for _, found in read) == expected.failed
    for clip, found in read:
        assert len(found.tokens) == clip.tokens <= line.data.max_tokens
        assert np.isfinite(found.tokens).all()


def overrides(tmp_path: Path, *more: str) -> list[str]:
    return [
        "experiment=demo",
        "run.name=bad",
        f"run.root={tmp_path}/runs",
        f"data.shards={tmp_path}/clips",
        f"data.manifest={tmp_path}/manifest",
        "tracking=none",
        *more,
    ]


def test_files_elsewhere_are_read_where_the_user_says_so(tmp_path: Path) -> None:
    """At indexing, at the reading of the manifest, and at the reading of clips."""
    for folder in ("clips", "elsewhere"):
        (tmp_path / folder).mkdir()
    for number in range(8):
        (tmp_path / f"elsewhere/{number}.mp4").write_bytes(video(seed=number))
    paths = [f"{tmp_path}/elsewhere/{number}.mp4" for number in range(8)]
    (tmp_path / "clips/clips.csv").write_text("\n".join(["path", *paths]))
    line = [*overrides(tmp_path), f"data.shards={tmp_path}/clips/clips.csv"]
    allowed = compose([*line, "data.index.anywhere=true", "data.index.heldout_fraction=0"])
    root, units = list_units(allowed.data.shards, allowed.data.index.anywhere)
    found = {unit.name: unit.index(root, allowed.data.index) for unit in units}
    write_index(root, allowed.data.manifest, found, allowed.data.index)

    free = Assembly.of(allowed)
    plan = free.planner().make(Store(tmp_path / "runs/bad"), 1, lambda _: None)
    reader = free.reader(free.open_manifest().shards_url)
    clips = list(clips_of(plan))
    assert len(clips) == 8
    assert not any(read.cause for read in reader.read(clips))

    bound = Assembly.of(compose(line))
    with pytest.raises(ValueError, match=r"lies outside .*data\.index\.anywhere=true"):
        bound.open_manifest().part(0)
    with pytest.raises(ValueError, match="lies outside"):
        list(bound.reader(root).read(clips))


def clips_of(plan: Plan) -> Iterator[Any]:
    for step in range(plan.num_steps(0)):
        for pack in plan.packs(0, step, 0, 1):
            yield from (clip for clip in pack.clips if not clip.dummy)


# ------------------------------------------------------------------------------------ commands

# What is typed beside a good command, and what is said.
TYPED = {
    "a misspelt key": (
        "optimizer.lrr=1e-3",
        "optimizer.lrr: no such key; did you mean optimizer.lr?",
    ),
    "a misspelt section": ("trian.steps=10", "trian: no such key; did you mean train?"),
    "a wrong type": ("train.steps=many", "train.steps='many': int is needed, not str"),
    "a broken number": ("train.steps=1.5", "train.steps=1.5: int is needed, not float"),
    "a text for a list": ("data.views.frames=8", "data.views.frames=8: a list is needed"),
    "nothing where something is needed": ("run.name=null", "run.name=None: str is needed"),
    "a number out of range": ("train.steps=0", "train: steps=0 must be at least 1"),
    "another program's class": ("model._target_=os.system", "only names under framework."),
    "more ranks than packs": (
        "cluster.num_workers=3",
        "cluster.num_workers=3 is more than data.global_batch_packs=2; raise the latter",
    ),
    "heads that do not divide": ("model.num_heads=7", "must be divisible by num_heads=7; try 4"),
    "captions longer than the model": ("text.max_tokens=128", "raise the latter"),
    "a budget that no clip fits": ("data.max_tokens=8", "max_tokens=8"),
    "an unknown dtype": ("engine.dtype=fp8", "dtype='fp8' must be one of"),
    "a run's name with a folder": ("run.name=a/b", "no folder in it"),
    "an unknown scheme": ("run.root=http://host/x", "scheme 'http' is not supported"),
    "no bucket": ("run.root=s3://", "names no bucket; write s3://bucket/prefix"),
    "a plain file store for MLflow": ("tracking.uri=./mlruns", "must start with one of http"),
    "a password for MLflow": ("tracking.uri=http://me:x@host", "uri holds a password or token"),
    "a callback of Hydra's": ("+hydra.callbacks.x.y=1", "of Hydra's own section an override sets"),
    "a folder of YAML for Hydra": ("--config-dir=/x", "--config-dir=/x: no such option"),
    "a misspelt column": ('data.where="hieght>4"', "did you mean height?"),
    "a filter without quotes": (
        "data.where=height>4",
        "data.where=height>4 cannot be read; quote a value",
    ),
    "an unknown source": ("data.sources.wep=1", "sources names 'wep'"),
    "no list of clips to take out": ("data.exclude=/nowhere/x", "is not a text file of clips"),
    "no manifest": ("data.manifest=/nowhere", "no manifest"),
    "a file in the folder's place": ("run.root={tmp_path}/file", "Not a directory"),
}


@pytest.mark.parametrize("name", TYPED)
def test_a_mistake_is_a_sentence_before_a_worker_starts(name: str, tmp_path: Path) -> None:
    override, words = TYPED[name]
    (tmp_path / "file").write_text("")
    shards = Store(tmp_path / "clips")
    shards.write("shard-000000.tar", tar(GOOD))
    found = {"shard-000000.tar": index_shard(shards.url, "shard-000000.tar", IndexConfig(0.0))}
    write_index(shards.url, f"{tmp_path}/manifest", found, IndexConfig(0.0))
    if "tracking" in override:
        override = f"tracking=mlflow {override}"
    command = overrides(tmp_path, *override.format(tmp_path=tmp_path).split())
    assert words in said_by(command)
    assert not (tmp_path / "runs/bad").exists()  # the name is free still


def said_by(command: list[str]) -> str:
    """The sentence that `python -m framework.train` ends with; `entry` prints just these."""
    from framework.train.__main__ import main

    with pytest.raises((ValueError, OSError)) as caught:
        main(compose(command))
    return str(caught.value)


@pytest.mark.slow
def test_an_unknown_choice_of_a_group_lists_the_known_ones(tmp_path: Path) -> None:
    done = command_line("framework.train", "experiment=demo", "model=dit_xxl")
    assert done.returncode != 0
    assert "dit_xl" in done.stdout
    assert "Traceback" not in done.stdout


def command_line(
    module: str, *arguments: str, before: tuple[str, ...] = (), **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*before, sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_no_control_character_of_an_error_reaches_the_terminal() -> None:
    done = command_line("framework.data.plan", "data.where=\x1b[2J\u202e > (")
    assert done.returncode == 2, done.stdout
    assert r"error: data.where=\x1b[2J\u202e > ( cannot be read" in done.stdout
    assert not set(done.stdout) & set("\x1b\u202e")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/empty", "no file that ends in .tar"),
        ("s3://no-such-bucket/x", "no-such-bucket"),
    ],
)
def test_an_empty_or_absent_bucket_says_so(
    url: str, words: str, s3_bucket: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        index(url, f"{tmp_path}/manifest", IndexConfig())
    assert words in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "wrong"], ids=["missing", "wrong"])
def test_missing_and_wrong_credentials_are_a_sentence(key: str, tmp_path: Path) -> None:
    with denying_server() as server:
        done = command_line(
            "framework.data.index",
            *overrides(tmp_path, "data.shards=s3://bucket/clips"),
            AWS_ENDPOINT_URL=server,
            AWS_ACCESS_KEY_ID=key,
            AWS_SECRET_ACCESS_KEY=key,
            AWS_EC2_METADATA_DISABLED="true",
            AWS_CONFIG_FILE="/nowhere",
            AWS_SHARED_CREDENTIALS_FILE="/nowhere",
        )
    assert done.returncode == 2, done.stdout
    (last,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert last.startswith("error: s3://bucket/clips: access denied")
    assert "AWS_ACCESS_KEY_ID" in last
    assert "Traceback" not in done.stdout


@contextlib.contextmanager
def denying_server() -> Iterator[str]:
    """An S3 server that answers as Amazon's does without credentials; moto has another answer."""

    class Denying(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_GET = do_HEAD = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Denying) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """In a mount namespace of its own, with a disk of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=1m none {disk} && exec "$@"'
    before = ("unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh")
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace")
    line = [*overrides(tmp_path), f"data.shards={disk}/clips", "data.synthetic.num_clips=2000"]
    done = command_line("framework.demo.clips", *line, before=before)
    assert done.returncode == 2, done.stdout
    assert "error: " in done.stdout
    assert "No space left on device" in done.stdout
    assert "Traceback" not in done.stdout.split("error: ")[0]


def test_an_occupied_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < first_free_port(port) < port + 100
