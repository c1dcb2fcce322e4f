"""Where a run computes: a Ray cluster that stands, or one started here for the run."""

import os
from dataclasses import dataclass


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
    worker_logs: bool = False  # forward what workers print to the driver's terminal

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
    import ray

    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=config.worker_logs, logging_level="WARNING")
        return
    # A file ~/.ray/auth_token would turn authentication on by itself; say the mode.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=config.worker_logs,
        logging_level="WARNING",
    )


def num_nodes() -> int:
    """Live nodes of the connected cluster."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


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
