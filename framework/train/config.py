"""What a run is called and how long it trains."""

import re
from dataclasses import dataclass, field

from model_zoo.layers import CheckpointPolicy


@dataclass(frozen=True)
class RunSection:
    """A run's identity: `name` below `root` (any URL) is where it lives and resumes from."""

    name: str
    root: str = "runs"
    seed: int = 0
    fresh: bool = False  # start over beside an older run of this name

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", self.name):
            raise ValueError(
                f"name={self.name!r}: letters, digits and . _ = , + - only, no folder in it"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run and the rhythm of what it writes, in optimizer steps."""

    steps: int = 1000
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    log_every: int = 10
    activation_checkpointing: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    deterministic: bool = False  # torch's deterministic algorithms, where they exist
    peak_tflops: float | None = None  # of one device, dense, in the run's dtype: gives MFU

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
