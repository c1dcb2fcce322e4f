"""What must be right before a run starts, looked at before it starts.

`check_driver` runs once where the command was given, `check_workers` on every rank as soon as the
process group stands. A check that fails names its cure, and no step is trained; a note is
something to know about. All of it fits on one screen.
"""

import hashlib
import importlib
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed

import framework
import model_zoo
from framework.storage import Store
from framework.tracking.tracker import Tracker

PACKAGES = ("torch", "ray", "deepspeed", "numpy", "pyarrow", "av")
ALL_REDUCE_BYTES = 16 << 20  # chosen by hand: large enough for bandwidth, small enough for gloo
ALL_REDUCE_ROUNDS = 5
ALL_REDUCE_TIMEOUT_S = 120.0
SHARED_MEMORY = Path("/dev/shm")
# NCCL keeps its buffers between the GPUs of a node there; Docker gives a container 64 MiB.
MIN_SHARED_BYTES = 512 << 20


@dataclass(frozen=True)
class Check:
    """What one look found; `cure` is set where it failed, and says what to do."""

    name: str
    detail: str
    cure: str = ""
    is_note: bool = False

    @property
    def failed(self) -> bool:
        """Whether the run must not start."""
        return bool(self.cure)

    def __str__(self) -> str:
        word = "FAIL" if self.failed else "note" if self.is_note else "ok"
        cure = f"\n       {'':14} cure: {self.cure}" if self.cure else ""
        return f"{word:6} {self.name:14} {self.detail}{cure}"


def refusal(checks: Sequence[Check]) -> str | None:
    """One sentence for each check that failed; None where none did."""
    failed = [f"{c.name}: {c.detail}; {c.cure}" for c in checks if c.failed]
    return "preflight failed. " + " ".join(failed) if failed else None


def check_driver(
    run: Store,
    shards_url: str,
    shard: str,
    tracker: Tracker,
    *,
    checkpoint_bytes: int,
    streams_mb: int,
    object_store_mb: float,
) -> list[Check]:
    """Storage, shards, MLflow and Ray's memory, seen from the driver.

    `streams_mb`: what all ranks' streams may take of Ray's object store, which has
    `object_store_mb`.
    """
    return [
        check_storage(run, checkpoint_bytes),
        check_shards(Store(shards_url, run.retry, anywhere=True), shard),  # by a manifest's leave
        _check_tracker(tracker),
        _check_object_store(streams_mb, object_store_mb),
    ]


def check_storage(run: Store, checkpoint_bytes: int = 0) -> Check:
    """Write an object to the run's folder, read it and delete it; see whether checkpoints fit.

    One is written before an older one is deleted, so there must be room for two.
    """
    name, payload = f"preflight/{uuid.uuid4().hex}", uuid.uuid4().bytes
    began = time.perf_counter()
    try:
        run.write(name, payload)
        found = run.read(name)
        run.delete(name)
    except OSError as error:
        return Check(
            "storage", f"{run.url}: {error}", "make run.root writable, or name another place"
        )
    if found != payload:
        return Check(
            "storage",
            f"{run.url} gave back other bytes than were written",
            "see whether a proxy or a time-limited cache stands before it",
        )
    if run.is_local and checkpoint_bytes:
        free = shutil.disk_usage(run.local_path()).free
        if free < 2 * checkpoint_bytes:
            return Check(
                "storage",
                f"{run.url} has {free / 1e6:,.0f} MB free, two checkpoints take "
                f"{2 * checkpoint_bytes / 1e6:,.0f} MB",
                "delete what is old there, or name another run.root",
            )
    took_ms = 1000 * (time.perf_counter() - began)
    return Check("storage", f"{run.url} written, read and deleted in {took_ms:.0f} ms")


def check_shards(shards: Store, shard: str) -> Check:
    """Read the first byte of one shard."""
    try:
        store, name = shards.at(shard)
        store.read_range(name, 0, 1)
    except (OSError, EOFError) as error:
        return Check(
            "shards",
            f"{shards.url}: {error}",
            "put the shards back, give credentials for them, or index again",
        )
    return Check("shards", f"{shard} in {shards.url} can be read")


def _check_tracker(tracker: Tracker) -> Check:
    if tracker.journal_path is None:
        return Check("tracking", "none, by choice (tracking=none)", is_note=True)
    if tracker.problem is None:
        return Check("tracking", f"MLflow answers; run {tracker.run_id}")
    return Check(
        "tracking",
        f"MLflow does not answer: {_first_line(tracker.problem)}; training goes on, figures wait "
        f"in {tracker.journal_path.parent} and follow when it does",
        is_note=True,
    )


def _check_object_store(needed_mb: int, has_mb: float) -> Check:
    detail = f"streams may take {needed_mb:,} MB of Ray's object store of {has_mb:,.0f} MB"
    if needed_mb > has_mb * 1.01:
        return Check(
            "object store",
            detail,
            "raise cluster.object_store_mb (or --object-store-memory of `ray start`), or lower "
            "data.stream.object_store_mb",
        )
    return Check("object store", detail)


def check_workers(
    run: Store, shards_url: str, shard: str, device: torch.device, packages: Sequence[str] = ()
) -> list[Check]:
    """Every rank calls it; all get the checks of all ranks, alike ones once.

    packages: of a team's own, whose code must be equal as well.

    Storage and shards from each rank, versions and code equal on all, shared memory, and an
    all-reduce over all ranks. The last comes only where nothing else failed.
    """
    shards = Store(shards_url, run.retry, anywhere=True)  # `read_manifest` has looked at the name
    own = [check_storage(run), check_shards(shards, shard), *_check_shared_memory(device)]
    mine = (platform.node(), versions(packages), own)
    everyone: list[tuple[str, dict[str, str], list[Check]]] = [mine]
    dp_size = distributed.get_world_size() if distributed.is_initialized() else 1
    if dp_size > 1:
        everyone = [mine] * dp_size
        distributed.all_gather_object(everyone, mine)
    checks = _merged([(host, found) for host, _, found in everyone])
    checks.append(_check_versions([(host, found) for host, found, _ in everyone]))
    if dp_size > 1 and not any(check.failed for check in checks):
        checks.append(check_all_reduce(device))
    return checks


def _merged(everyone: list[tuple[str, list[Check]]]) -> list[Check]:
    """What all ranks found, by check: the first failure with its host, else rank 0's words."""
    merged = []
    for checks in zip(*(found for _, found in everyone), strict=True):
        first = checks[0]
        for (host, _), check in zip(everyone, checks, strict=True):
            if check.failed:
                first = Check(check.name, f"on {host}: {check.detail}", check.cure)
                break
        else:
            ranks = "rank 0" if len(everyone) == 1 else f"each of {len(everyone)} ranks"
            first = Check(first.name, f"{first.detail} ({ranks})", is_note=first.is_note)
        merged.append(first)
    return merged


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Of Python, of libraries that must agree, and of the source of Longtake and `packages`."""
    code = code_fingerprint(framework, model_zoo)
    found = {"python": platform.python_version(), "longtake": f"{framework.__version__}/{code}"}
    for name in packages:
        found[name] = code_fingerprint(importlib.import_module(name))
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def code_fingerprint(*packages: ModuleType) -> str:
    """A hash of the packages' Python files, as this process imports them."""
    digest = hashlib.blake2b(digest_size=4)
    for root in (Path(folder).resolve() for package in packages for folder in package.__path__):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _check_versions(everyone: list[tuple[str, dict[str, str]]]) -> Check:
    host, first = everyone[0]
    for other, found in everyone[1:]:
        for name in first:
            if found[name] != first[name]:
                return Check(
                    "versions",
                    f"{name} is {first[name]} on {host} and {found[name]} on {other}",
                    "use one image for all nodes, and send the code with `ray job submit "
                    "--working-dir .`",
                )
    words = ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "ray", "deepspeed"))
    num_hosts = len({host for host, _ in everyone})
    return Check("versions", f"{words}, code {first['longtake']}, alike on {num_hosts} host(s)")


def _check_shared_memory(device: torch.device) -> list[Check]:
    if not SHARED_MEMORY.is_dir():
        return []
    usage = shutil.disk_usage(SHARED_MEMORY)
    detail = f"{SHARED_MEMORY} has {usage.free >> 20:,} of {usage.total >> 20:,} MiB free"
    if device.type == "cuda" and usage.total < MIN_SHARED_BYTES:
        cure = "docker run --shm-size=8g, or in Kubernetes an emptyDir of medium Memory at /dev/shm"
        return [Check("shared memory", detail, cure)]
    return [Check("shared memory", detail)]


def check_all_reduce(device: torch.device) -> Check:
    """Sum a tensor over all ranks: whether it works, whether it is right, and how fast.

    The bandwidth is the bus bandwidth of NCCL's tests, 2 (W - 1) / W * bytes / time, by which
    algorithms and numbers of ranks can be compared.
    """
    dp_size = distributed.get_world_size()
    tensor = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
    try:
        _all_reduce(tensor)
        is_right = bool((tensor == dp_size).all())
        began = time.perf_counter()
        for _ in range(ALL_REDUCE_ROUNDS):
            tensor.fill_(1.0)
            _all_reduce(tensor)
        seconds = (time.perf_counter() - began) / ALL_REDUCE_ROUNDS
    except RuntimeError as error:
        return Check(
            "all-reduce",
            f"over {dp_size} ranks: {_first_line(str(error))}",
            "open all ports between the nodes; set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to "
            "their network interface; NCCL_DEBUG=INFO says more",
        )
    if not is_right:
        return Check("all-reduce", "gave a wrong sum", "take the newest driver and NCCL; report it")
    speed = 2 * (dp_size - 1) / dp_size * ALL_REDUCE_BYTES / seconds / 1e9
    backend = distributed.get_backend_config().lower() if device.type == "cuda" else "gloo"
    return Check("all-reduce", f"{dp_size} ranks, {backend}, 16 MiB: {speed:.2f} GB/s")


def _all_reduce(tensor: torch.Tensor) -> None:
    work = distributed.all_reduce(tensor, async_op=True)
    assert work is not None
    work.wait(timedelta(seconds=ALL_REDUCE_TIMEOUT_S))
    if tensor.is_cuda:
        torch.cuda.synchronize()


def show_checks(checks: Sequence[Check], where: str, say: Callable[[str], Any]) -> None:
    """A line for each check, two for one that failed."""
    say(f"preflight, {where}")
    for check in checks:
        say(f"  {check}")


def _first_line(text: str, limit: int = 160) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return line if len(line) <= limit else line[: limit - 1] + "…"
