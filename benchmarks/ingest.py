"""Clips a second from an S3 server on this machine: ours, three other loaders, and the limit.

    python -m benchmarks.ingest [--folder FOLDER] [--turns 2] [--window 30] [--stride 1]

Clips of 640x360, 4 s and about 0.5 MB; out come packs of two clips, each with every STRIDE-th of
its frames at 256x144 as float32 tokens: pixels themselves, 43 MB a clip with all frames. Every
contender has two processes that decode, and makes tokens with the same functions of ours; the limit
decodes and resizes from memory in two bare PyAV loops, and does nothing else. The server (moto)
runs beside all but the limit; its CPU time is listed apart.

Contenders run in turns, each in processes of its own. A clip counts when its tokens are made,
wherever that is, so that nothing is gained by what lies ready when the window opens. The window
opens at the first pack after the warm-up. The tokens of the first packs are compared with those
made here. FOLDER keeps the clips for another run. megatron-energon is no dependency of ours:
without `pip install -r benchmarks/requirements-ingest.txt` it is left out. The last line is JSON.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image
from torch import Tensor

from framework.cluster import ClusterConfig, connect
from framework.data.config import IndexConfig, StreamConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.data.manifest.table import clip_id, read_manifest
from framework.data.plan.cost import CostModel
from framework.data.plan.planner import make_epoch
from framework.data.plan.recipe import Recipe
from framework.data.plan.store import Plan
from framework.data.plan.views import Geometry, ViewConfig
from framework.data.shards.tar import write_shards
from framework.data.stream.collate import VideoReader
from framework.data.stream.stream import open_stream
from framework.demo.local_s3 import s3_server
from framework.encoders import CaptionEncoder, Encoders, Patchifier, Tokenizer
from framework.storage import Store
from framework.video import decode, encode
from model_zoo.codecs.identity import IdentityConfig
from model_zoo.text.byte import ByteTextConfig

CLIPS, CLIPS_PER_SHARD = 96, 12
FPS, NUM_FRAMES = 24, 97  # 97: strides 1, 2, 3, 4, 6 and 8 see the last frame, so crops are one
WIDTH, HEIGHT = 640, 360
CRF = 22  # gives clips of about 0.5 MB
SEEN_HEIGHT, SEEN_WIDTH = 144, 256
CLIPS_PER_PACK = 2
PROCESSES = 2
EPOCHS = 24  # more than any window takes
STORE_MB = 6144  # of Ray, for either contender that has one
WARMUP_S = 8.0
CHECKED_CLIPS = 8
BUCKET = "bench"
PATCH = (1, 16, 16)
TOKENIZER = Tokenizer(Encoders(IdentityConfig(), ByteTextConfig()), Patchifier(PATCH))
TOKEN_SIZE = 3 * 16 * 16
TEXT = ByteTextConfig()
# Two segments of 24 packs of identity tokens.
STREAM = StreamConfig(max_tasks=PROCESSES, object_store_mb=4096)
Pack = tuple[list[int], Tensor]  # numbers of the clips, and their tokens (L, P)


@dataclass(frozen=True)
class Work:
    """What every contender is given; travels to its process as JSON."""

    folder: str
    shards: list[str]
    digest: str  # of the plan
    stride: int
    window_s: float

    @property
    def made(self) -> Path:
        """A file that has a byte for each clip made."""
        return Path(self.folder) / "made"

    def local_shards(self) -> list[Path]:
        """The shards as they lie on this machine."""
        return [Path(self.folder) / "clips" / name for name in self.shards]

    def tokens(self, data: bytes) -> np.ndarray:
        """The tokens of a clip's file, (n, P) float32."""
        return self.tokenizer(decode(data, self.frames, SEEN_HEIGHT, SEEN_WIDTH))

    @property
    def frames(self) -> range:
        """Which frames are seen."""
        return range(0, NUM_FRAMES, self.stride)

    @property
    def tokenizer(self) -> "CountingTokenizer":
        """Makes tokens and counts them."""
        return CountingTokenizer(TOKENIZER, str(self.made))


@dataclass(frozen=True)
class CountingTokenizer:
    """The tokenizer of all contenders, which leaves a byte in a file for each clip."""

    tokenizer: Tokenizer
    made: str

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (T, H, W, 3) -> float32 (n, P)."""
        tokens = self.tokenizer(frames)
        count_one(self.made)
        return tokens


def count_one(path: str) -> None:
    """One more clip; appends are atomic."""
    with open(path, "ab", buffering=0) as file:
        file.write(b".")


# The clips


def render(index: int) -> np.ndarray:
    """Frames of a clip: a texture that moves under two others that move elsewhere, with grain."""
    rng = np.random.default_rng(index)
    layers = []
    for cells in (12, 40):
        small = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        size = (WIDTH + 4 * NUM_FRAMES, HEIGHT + 4 * NUM_FRAMES)
        layers.append(np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)))
    speeds = rng.uniform(0, 4, (len(layers), 2))
    grain = rng.normal(0, 5, (2 * HEIGHT, 2 * WIDTH, 1)).astype(np.int16)
    frames = np.empty((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(NUM_FRAMES):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.int16)
        for layer, speed in zip(layers, speeds, strict=True):
            y, x = (speed * t).astype(int)
            picture += layer[y : y + HEIGHT, x : x + WIDTH] // len(layers)
        y, x = rng.integers(0, (HEIGHT, WIDTH))
        frames[t] = np.clip(picture + grain[y : y + HEIGHT, x : x + WIDTH], 0, 255)
    return frames


def write_shard(folder: str, shard: int) -> None:
    """One shard of clips."""
    numbers = range(shard * CLIPS_PER_SHARD, (shard + 1) * CLIPS_PER_SHARD)
    samples = (
        {
            "__key__": f"clip-{i:06d}",
            "mp4": encode(render(i), FPS, CRF),
            "json": {"caption": f"clip {i}"},
        }
        for i in numbers
    )
    write_shards(Store(folder), samples, CLIPS_PER_SHARD, first_shard=shard)


def make_clips(folder: Path) -> list[str]:
    """All shards below a folder, unless they are there; their names."""
    store, count = Store(folder), CLIPS // CLIPS_PER_SHARD
    if len([name for name in store.list() if name.endswith(".tar")]) < count:
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(write_shard, [str(folder)] * count, range(count)))
    return [name for name in store.list() if name.endswith(".tar")]


def payloads(shards: list[Path]) -> Iterator[tuple[int, bytes]]:
    """Number and file of each clip."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".mp4") and (file := tar.extractfile(member)):
                    yield number_of(member.name.removesuffix(".mp4")), file.read()


def number_of(key: str) -> int:
    """The number in a clip's key."""
    return int(key.rpartition("-")[2])


def prepare(folder: Path, stride: int, window_s: float) -> Work:
    """Clips, manifest, plan."""
    shards = make_clips(folder / "clips")
    store = Store(folder / "clips")
    no_heldout = IndexConfig(heldout_fraction=0.0)
    found = {name: index_shard(store.url, name, no_heldout) for name in shards}
    write_index(store.url, str(folder / "manifest"), found, no_heldout)
    manifest = read_manifest(str(folder / "manifest"))
    seen = len(range(0, NUM_FRAMES, stride))
    geometry = Geometry(1, 1, False, PATCH)
    recipe = Recipe(
        views=ViewConfig(frames=(seen,), sizes=((SEEN_HEIGHT, SEEN_WIDTH),), fps=FPS / stride),
        geometry=geometry,
        cost=CostModel(linear=1),
        max_tokens=CLIPS_PER_PACK * geometry.num_tokens(seen, SEEN_HEIGHT, SEEN_WIDTH),
        max_text_tokens=CLIPS_PER_PACK * TEXT.max_tokens,
        max_clips=CLIPS_PER_PACK,
        global_batch_packs=1,
        drop_caption=0.0,
    )
    for epoch in range(EPOCHS):
        run = Store(folder / "run")
        plan = make_epoch(manifest, recipe, run, epoch, TEXT.num_tokens, TEXT.fingerprint)
    return Work(str(folder), shards, plan.digest, stride, window_s)


# The contenders: generators of packs without end, or nearly


def limit(work: Work) -> Iterator[Pack]:
    """Bare PyAV from memory; makes no packs."""
    context = multiprocessing.get_context("spawn")
    shards = work.local_shards()
    for i in range(PROCESSES):
        mine = (shards[i::PROCESSES], str(work.made), work.stride)
        context.Process(target=decode_without_end, args=mine, daemon=True).start()
    while True:
        time.sleep(0.1)
        if work.made.stat().st_size >= PROCESSES:
            yield [], torch.empty(0)


def decode_without_end(shards: list[Path], made: str, stride: int) -> None:
    """Decode and resize clips from memory, over and over."""
    clips = [data for _, data in payloads(shards)]
    while True:
        for data in clips:
            bare_decode(data, stride)
            count_one(made)


def bare_decode(data: bytes, stride: int) -> np.ndarray:
    """The same pixels as `framework.video.decode` gives, for these files only."""
    exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    scaler = VideoReformatter()
    seen = len(range(0, NUM_FRAMES, stride))
    frames = np.empty((seen, SEEN_HEIGHT, SEEN_WIDTH, 3), np.uint8)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        for i, frame in enumerate(container.decode(stream)):
            if i % stride:
                continue
            frames[i // stride] = scaler.reformat(
                frame,
                width=SEEN_WIDTH,
                height=SEEN_HEIGHT,
                format="rgb24",
                interpolation=Interpolation.BILINEAR | exact,
                threads=1,
            ).to_ndarray()
    return frames


def ours(work: Work) -> Iterator[Pack]:
    """The stream of one rank."""
    connect(ClusterConfig(num_cpus=PROCESSES, object_store_mb=STORE_MB))
    plan = Plan(Store(Path(work.folder) / "run"), work.digest)
    reader = VideoReader(
        shards=s3_shards(),
        token_size=TOKEN_SIZE,
        exclude=frozenset(),
        tokenize=work.tokenizer,
        encode_text=CaptionEncoder(TOKENIZER.encoders),
    )
    keys = {clip_id(s, f"clip-{i:06d}"): i for i, s in clips_of(work)}
    stop = EPOCHS * CLIPS // CLIPS_PER_PACK
    with open_stream(plan, reader, STREAM, 0, stop, 0, 1) as steps:
        for (batch,) in steps:
            assert not batch.failed, batch.failed
            ids = batch.clip_ids[:CLIPS_PER_PACK].tolist()
            yield [keys[i] for i in ids], batch.tokens


def clips_of(work: Work) -> Iterator[tuple[int, str]]:
    """Number and shard of each clip."""
    for i in range(CLIPS):
        yield i, work.shards[i // CLIPS_PER_SHARD]


def s3_shards() -> Store:
    """The shards on the server."""
    return Store(f"s3://{BUCKET}/clips")


def webdataset(work: Work) -> Iterator[Pack]:
    """Webdataset in the workers of a torch DataLoader; curl fetches whole shards."""
    import webdataset as wds

    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    curl = f"pipe:curl -sf --aws-sigv4 aws:amz:us-east-1:s3 --user {key}:{secret}"
    base = f"{curl} {os.environ['AWS_ENDPOINT_URL']}/{BUCKET}/clips"
    urls = [f"{base}/{name}" for name in work.shards] * EPOCHS
    samples = wds.WebDataset(urls, shardshuffle=False).map(
        lambda sample: (number_of(sample["__key__"]), work.tokens(sample["mp4"]))
    )
    packs = samples.batched(CLIPS_PER_PACK, collation_fn=collate, partial=False)
    yield from torch.utils.data.DataLoader(packs, batch_size=None, num_workers=PROCESSES)


def collate(clips: list[tuple[int, np.ndarray]]) -> Pack:
    """Clips of equal length end to end; torch puts them into shared memory at once."""
    tokens = torch.utils.data.default_collate([torch.from_numpy(tokens) for _, tokens in clips])
    return [i for i, _ in clips], tokens.flatten(0, 1)


def energon(work: Work) -> Iterator[Pack]:
    """Megatron-energon, crude samples, through its Multi-Storage Client."""
    from megatron import energon as me  # type: ignore[import-not-found]

    profile = {
        "storage_provider": {
            "type": "s3",
            "options": {
                "base_path": BUCKET,
                "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
                "region_name": os.environ["AWS_DEFAULT_REGION"],
            },
        },
        "credentials_provider": {
            "type": "S3Credentials",
            "options": {
                "access_key": os.environ["AWS_ACCESS_KEY_ID"],
                "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            },
        },
    }
    config = Path(work.folder) / "msc.json"
    config.write_text(json.dumps({"profiles": {"local": profile}}))
    os.environ["MSC_CONFIG"] = str(config)

    @me.edataclass
    class Clip(me.Sample):
        number: int
        tokens: np.ndarray

    @me.stateless
    def cook(sample: dict[str, Any]) -> Clip:
        number, tokens = number_of(sample["__key__"]), work.tokens(sample["mp4"])
        return Clip(**me.basic_sample_keys(sample), number=number, tokens=tokens)

    class Encoder(me.DefaultTaskEncoder):
        decoder = None
        cookers = (me.Cooker(cook),)

        def batch(self, samples: list[Clip]) -> Pack:
            return collate([(clip.number, clip.tokens) for clip in samples])

    dataset = me.get_train_dataset(
        "msc://local/clips",
        worker_config=me.WorkerConfig(rank=0, world_size=1, num_workers=PROCESSES),
        batch_size=CLIPS_PER_PACK,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    yield from me.get_loader(dataset)


def prepare_energon(clips: Path, shards: list[str]) -> bool:
    """Write the index that it wants beside the shards; False where it is not installed."""
    if find_spec("megatron") is None:
        return False
    from megatron.energon.epathlib import EPath  # type: ignore[import-not-found]
    from megatron.energon.flavors import BaseWebdatasetFactory  # type: ignore[import-not-found]

    if not (clips / ".nv-meta" / "dataset.yaml").exists():
        BaseWebdatasetFactory.prepare_dataset(
            EPath(str(clips)),
            shards,
            split_parts_ratio=[("train", 1.0), ("val", 0.0), ("test", 0.0)],
            tar_index_only=False,
            shuffle_seed=None,
            workers=1,
        )
        kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (clips / ".nv-meta" / "dataset.yaml").write_text(kind)
    return True


def read_webdataset(work: Work) -> Iterator[Pack]:
    """Ray Data's own reader of webdatasets, and a map over its rows."""
    connect(ClusterConfig(num_cpus=PROCESSES, object_store_mb=STORE_MB))
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [f"s3://{BUCKET}/clips/{name}" for name in work.shards] * EPOCHS
    clips = ray.data.read_webdataset(paths, suffixes=["mp4"], override_num_blocks=len(paths)).map(
        lambda row: {"clip": number_of(row["__key__"]), "tokens": work.tokens(row["mp4"])}
    )
    for batch in clips.iter_torch_batches(batch_size=CLIPS_PER_PACK, drop_last=True):
        yield batch["clip"].tolist(), batch["tokens"].flatten(0, 1)


CONTENDERS: dict[str, Callable[[Work], Iterator[Pack]]] = {
    "limit": limit,
    "ours": ours,
    "webdataset": webdataset,
    "energon": energon,
    "read_webdataset": read_webdataset,
}


# Measuring


@dataclass(frozen=True)
class Mark:
    """Where things stand at a moment."""

    at: float
    clips: int
    cpu_s: float
    server_cpu_s: float

    @classmethod
    def now(cls, work: Work, server: int) -> "Mark":
        """This process with all below it, and the server."""
        return cls(time.perf_counter(), work.made.stat().st_size, cpu_s(os.getpid()), cpu_s(server))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, of those below it, and of those that they have waited for."""
    root, total = psutil.Process(pid), 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and both of the children
        except psutil.NoSuchProcess:
            continue
    return total


def measure(name: str, work: Work, server: int) -> dict[str, Any]:
    """One run of a contender, by the process that this is called in."""
    seen: dict[int, int] = {}
    work.made.write_bytes(b"")
    packs = CONTENDERS[name](work)
    numbers, tokens = next(packs)
    startup_s = time.time() - psutil.Process().create_time()
    warm_at = time.perf_counter() + WARMUP_S
    while time.perf_counter() < warm_at:
        if len(seen) < CHECKED_CLIPS:
            seen |= checksums(numbers, tokens)
        numbers, tokens = next(packs)
    start = Mark.now(work, server)
    while time.perf_counter() < start.at + work.window_s:
        next(packs)
    end = Mark.now(work, server)
    clips = end.clips - start.clips
    return {
        "clips_per_s": clips / (end.at - start.at),
        "cpu_ms": 1000 * (end.cpu_s - start.cpu_s) / (clips * NUM_FRAMES),
        "server_cpu_ms": 1000 * (end.server_cpu_s - start.server_cpu_s) / (clips * NUM_FRAMES),
        "startup_s": startup_s,
        "seen": seen,
    }


def checksums(numbers: list[int], tokens: Tensor) -> dict[int, int]:
    """Checksum of the tokens of each clip of a pack."""
    parts = tokens.numpy().reshape(max(1, len(numbers)), -1)
    return {i: zlib.crc32(part.data) for i, part in zip(numbers, parts, strict=False)}


def run(name: str, work: Work, server: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--one", name]
    done = subprocess.run(
        [*command, json.dumps(asdict(work)), str(server)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def check(results: dict[str, list[dict[str, Any]]], work: Work) -> int:
    """How many clips were compared; AssertionError where their tokens are not those made here."""
    right = {}
    for i, data in payloads(work.local_shards()):
        frames = decode(data, work.frames, SEEN_HEIGHT, SEEN_WIDTH)
        if i == 0:
            assert np.array_equal(frames, bare_decode(data, work.stride))
        right[str(i)] = zlib.crc32(TOKENIZER(frames).tobytes())
    runs = [(name, run) for name, runs in results.items() for run in runs]
    for name, found in runs:
        wrong = [i for i, checksum in found["seen"].items() if checksum != right[i]]
        assert not wrong, (name, wrong)
    return sum(len(found["seen"]) for _, found in runs)


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, then one JSON line."""
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "seen"}
        for name, runs in results.items()
    }
    print(
        f"{'':18}{'clips/s':>9}{'of limit':>10}{'CPU ms/frame':>14}{'server':>8}"
        f"{'first pack s':>14}"
    )
    for name, found in median.items():
        rates = ", ".join(f"{run['clips_per_s']:.2f}" for run in results[name])
        share = found["clips_per_s"] / median["limit"]["clips_per_s"]
        print(
            f"{name:18}{found['clips_per_s']:>9.2f}{share:>10.3f}{found['cpu_ms']:>14.3f}"
            f"{found['server_cpu_ms']:>8.3f}{found['startup_s']:>14.1f}   {rates}"
        )
    mine = median["ours"]["clips_per_s"]
    ratios = {
        f"over_{name}": round(mine / median[name]["clips_per_s"], 3) if name in median else None
        for name in CONTENDERS
        if name != "ours"
    }
    print(json.dumps(ratios))


def main(folder: Path, turns: int, window_s: float, stride: int, names: list[str]) -> None:
    """Prepare, run in turns, compare, report."""
    work = prepare(folder, stride, window_s)
    if "energon" in names and not prepare_energon(folder / "clips", work.shards):
        print("no megatron-energon: pip install -r benchmarks/requirements-ingest.txt")
        names.remove("energon")
    sizes = [len(data) for _, data in payloads(work.local_shards())]
    print(f"{len(sizes)} clips of {statistics.mean(sizes) / 1e6:.2f} MB, stride {stride}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with s3_server(BUCKET, folder / "s3-server.log") as environment:
        os.environ.update(environment)
        (server,) = [p.pid for p in psutil.Process().children() if "moto.server" in p.cmdline()]
        local = Store(folder / "clips")
        for name in local.list():
            s3_shards().write(name, local.read(name))
        for turn in range(turns):
            for name in names:
                results[name].append(run(name, work, server))
                rate = results[name][-1]["clips_per_s"]
                print(f"turn {turn + 1} {name}: {rate:.2f} clips/s", flush=True)
    print(f"{check(results, work)} clips compared: tokens are the same")
    report(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        # Ray's workers want this module under its own name.
        from benchmarks import ingest

        _, _, contender, text, pid = sys.argv
        measured = ingest.measure(contender, ingest.Work(**json.loads(text)), int(pid))
        print(json.dumps(measured), flush=True)
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os._exit(0)  # what is still in the making is not waited for
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--window", type=float, default=30.0)
    parser.add_argument("--stride", type=int, choices=(1, 2, 3, 4, 6, 8), default=1)
    parser.add_argument("--only", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    given = parser.parse_args()
    if not {"limit", "ours"} <= set(given.only):
        parser.error("--only must name limit and ours, which all are compared with")
    with tempfile.TemporaryDirectory() as temporary:
        place = given.folder or Path(temporary)
        main(place, given.turns, given.window, given.stride, given.only)
