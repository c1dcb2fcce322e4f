"""Where a run computes: a Ray cluster that stands, or one started here for the run."""

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# What a fresh tensor costs a CPU is mostly its pages, which the kernel clears one by one. So torch
# asks for huge ones (of the tokens of a 640x360 clip of 4 s, three quarters of the time), and glibc
# keeps what was freed, in one heap, where it would give each large tensor back: a quarter of a
# training step of dit_s, plain or ZeRO-3 (benchmarks/results/2026-11-22-2-core-vm.md). Both are
# read when a process starts.
KEEP_MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class ClusterConfig:
    """Workers of a run and the Ray cluster that they run on.

    `address` None takes `$RAY_ADDRESS` (which `ray job submit` sets) and else starts Ray on this
    machine, with `num_cpus` logical CPUs: train workers and decode tasks are counted against them.
    That Ray has a token of its own; one that stands is joined by the user's `RAY_AUTH_…` settings.

    `num_workers`: data-parallel ranks, or [min, max] of them: as many as there is room for, fewer
    when nodes go and more when they come, with the same global batches.
    """

    address: str | None = None
    num_workers: int | tuple[int, int] = 1
    gpus_per_worker: int = 0
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1  # of torch, on CPU
    max_failures: int = 3  # restarts in a row, with no checkpoint between, before giving up
    wait_for_room_s: float = 600.0  # for nodes that the fewest workers need, before giving up
    grow_after_s: float = 60.0  # training goes on for so long before it is stopped for more workers
    num_cpus: int | None = None
    object_store_mb: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"num_workers={self.num_workers} must be at least 1, or [min, max] with min <= max"
            )
        if self.threads_per_worker < 1:
            raise ValueError(f"threads_per_worker={self.threads_per_worker} must be at least 1")
        for name in ("wait_for_room_s", "grow_after_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker}: a rank drives one GPU, or none on CPU"
            )
        if self.max_failures < 0:
            raise ValueError(f"max_failures={self.max_failures} must not be negative")

    @property
    def standing_address(self) -> str | None:
        """Of the cluster to join; None where Ray is started here."""
        return self.address or os.environ.get("RAY_ADDRESS")

    @property
    def min_workers(self) -> int:
        """The fewest ranks that the run trains on."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most ranks that the run trains on."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


def connect(config: ClusterConfig) -> None:
    """Connect this process to Ray, or start it; does nothing where it is connected already.

    A Ray that is started here takes nobody else's commands, whatever `RAY_AUTH_MODE` says.
    """
    # Ray reads these at import; a value that the user set stays.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a death is noticed sooner
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")
    # The driver itself looks for nodes that go, see `leaving_nodes`: an actor less.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    if address := config.standing_address:
        _join(address)
        return
    _lock()
    ray.init(
        address="local",
        _temp_dir=_private_temp_dir(),
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
    )


def _lock() -> None:
    """Give the Ray that is about to start a token of its own.

    Its ports are open to the machine's users and to its network, and whoever may speak to it runs
    code as this user. What Ray starts inherits the token.
    """
    from ray._raylet import (  # type: ignore[attr-defined]  # Cython, without stubs
        AuthenticationTokenLoader,
        Config,
    )

    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    Config.initialize("")  # the mode was read when Ray was imported
    AuthenticationTokenLoader.instance().reset_cache()


def _private_temp_dir() -> str:
    """A folder for Ray's sockets and logs, within one of mode 0700; both go at exit.

    Ray gives its own folder the mode 0777.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR"))

    def remove() -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return f"{folder}/ray"


def _join(address: str) -> None:
    """Connect to a cluster that stands; ValueError, with what to look at, where it does not."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        raise ValueError(
            f"no Ray cluster can be joined at {address} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}). "
            "Is it up (`ray status`), and is this the head's address? A cluster with tokens also "
            "answers like this to a wrong one: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH must be as on the head (RAY_AUTH_MODE is {mode} here)"
        ) from error


def check_lasting(key: str, url: str) -> None:
    """ValueError where a local path lies in the copy of the code that Ray makes for one job.

    `ray job submit --working-dir` starts the driver there, so every relative path points into it,
    and Ray deletes it after the job.
    """
    here = Path.cwd()
    if "://" in url and not url.startswith("file://"):
        return
    path = Path(os.path.abspath(url.removeprefix("file://")))
    if "runtime_resources" in here.parts and path.is_relative_to(here):
        raise ValueError(
            f"{key}={url} lies in the job's own copy of the code, which Ray deletes; give an "
            "absolute path that all nodes share, or an s3:// URL"
        )


def num_nodes() -> int:
    """Live nodes of the connected cluster."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def leaving_nodes() -> frozenset[str]:
    """Ids of nodes of the connected cluster that are being drained, and will go."""
    from ray._private.state import state  # there is no public way to ask

    return frozenset(state.get_draining_nodes())


def room(config: ClusterConfig, without: Collection[str] = ()) -> int:
    """How many workers there is room for, beside one decode task, at most `max_workers`.

    Counts nodes that stand, and not those in `without` (ids).
    """
    import ray

    has = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in without]
    places = 0
    for node in has:
        by_gpu = int(node.get("GPU", 0)) if config.gpus_per_worker else config.max_workers
        by_cpu = (
            int(node.get("CPU", 0) // config.cpus_per_worker) if config.cpus_per_worker else by_gpu
        )
        places += min(by_cpu, by_gpu)
    spare = sum(node.get("CPU", 0) for node in has) - 1  # for the decode task
    by_cpu = int(spare // config.cpus_per_worker) if config.cpus_per_worker else places
    return max(0, min(places, by_cpu, config.max_workers))


def object_store_mb() -> float:
    """Megabytes of the connected cluster's object store, over all nodes."""
    import ray

    return ray.cluster_resources().get("object_store_memory", 0) / (1 << 20)


def check_room(config: ClusterConfig) -> None:
    """ValueError where the cluster has no room for the fewest workers."""
    import ray

    if room(config) >= config.min_workers:
        return
    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
    needed = config.min_workers * config.cpus_per_worker + 1
    if cpus < needed:
        raise ValueError(
            f"{config.min_workers} workers of {config.cpus_per_worker:g} CPUs and one decode task "
            f"need {needed:g} CPUs, the cluster has {cpus:g}; lower cluster.num_workers or raise "
            "cluster.num_cpus"
        )
    raise ValueError(
        f"{config.min_workers} workers need a GPU each, the cluster has {gpus:g}; lower "
        "cluster.num_workers or set cluster.gpus_per_worker=0"
    )
