"""Where a run computes: a Ray cluster that stands, or one started here for the run."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ClusterConfig:
    """Workers of a run and the Ray cluster that they run on.

    `address` None takes `$RAY_ADDRESS` (which `ray job submit` sets) and else starts Ray on this
    machine, with `num_cpus` logical CPUs: train workers and decode tasks are counted against them.
    """

    address: str | None = None
    num_workers: int = 1  # data-parallel ranks
    gpus_per_worker: int = 0
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1  # of torch, on CPU
    max_failures: int = 3  # restarts of the worker group before the run is given up
    num_cpus: int | None = None
    object_store_mb: int = 1024

    def __post_init__(self) -> None:
        for name in ("num_workers", "threads_per_worker"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker}: a rank drives one GPU, or none on CPU"
            )
        if self.max_failures < 0:
            raise ValueError(f"max_failures={self.max_failures} must not be negative")


def connect(config: ClusterConfig) -> None:
    """Connect this process to Ray, or start it; does nothing where it is connected already."""
    # Ray reads these at import; a value that the user set stays.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # torch reads this when it first allocates. Without huge pages it faults in each large tensor by
    # pages of 4 KiB: of the tokens of a 640x360 clip of 4 s, three quarters of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import ray

    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
        return
    # A file ~/.ray/auth_token would turn authentication on by itself; say the mode.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Nobody takes this machine's only node away with notice: a process less.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
    )


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


def object_store_mb() -> float:
    """Megabytes of the connected cluster's object store, over all nodes."""
    import ray

    return ray.cluster_resources().get("object_store_memory", 0) / (1 << 20)


def check_room(config: ClusterConfig) -> None:
    """ValueError where the connected cluster could never hold the workers and one decode task."""
    import ray

    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
    needed = config.num_workers * config.cpus_per_worker + 1
    if cpus < needed:
        raise ValueError(
            f"{config.num_workers} workers of {config.cpus_per_worker:g} CPUs and one decode task "
            f"need {needed:g} CPUs, the cluster has {cpus:g}; lower cluster.num_workers or raise "
            "cluster.num_cpus"
        )
    if gpus < config.num_workers * config.gpus_per_worker:
        raise ValueError(
            f"{config.num_workers} workers need a GPU each, the cluster has {gpus:g}; lower "
            "cluster.num_workers or set cluster.gpus_per_worker=0"
        )
