"""How long a run trains, and the hardware that an estimate takes for granted."""

from dataclasses import dataclass, field

from framework.mapping import free
from framework.train.guard import GuardConfig
from framework.train.observers.profile import ProfileConfig
from model_zoo.checkpointing import CheckpointPolicy


@dataclass(frozen=True)
class HardwareConfig:
    """One GPU, for `estimate=true`; the defaults are an H100's of 80 GB in bf16."""

    memory_gib: float = 79.0
    peak_tflops: float = 989.0  # dense
    mfu: float = 0.4  # share of the peak that training reaches
    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.memory_gib <= 0 or self.peak_tflops <= 0:
            raise ValueError(
                f"memory_gib={self.memory_gib} and peak_tflops={self.peak_tflops} must be positive"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} must lie between 0 and 1; try 0.4")


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run and the rhythm of what it writes, in optimizer steps."""

    steps: int = 1000
    checkpoint_every: int = 100
    keep_checkpoints: int = free(3)
    milestone_every: int = free(0)  # checkpoints of steps that it divides are kept; 0 for none
    log_every: int = free(10)
    max_lost_share: float = free(0.2)  # of a window's tokens, in clips that could not be read
    activation_checkpointing: CheckpointPolicy = free(of=CheckpointPolicy)
    deterministic: bool = False  # torch's deterministic algorithms, where they exist
    peak_tflops: float | None = free(None)  # of one device, dense, in the run's dtype: gives MFU
    guard: GuardConfig = field(default_factory=GuardConfig)
    hang_timeout_s: float = free(900.0)  # a rank that ends no step so long is restarted; 0: never
    try_largest_packs: bool = free(True)  # before step 0: what would run out of memory does so then
    profiler: ProfileConfig = free(of=ProfileConfig)  # with profile=true

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("milestone_every", "hang_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.max_lost_share <= 1:
            raise ValueError(f"max_lost_share={self.max_lost_share} must lie between 0 and 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops={self.peak_tflops} must be positive; H100, bf16: 989")
