"""What to export."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportConfig:
    """The checkpoint that `python -m framework.export` writes for others, and where to."""

    checkpoint: str = "latest"  # or a step, or the URL of a committed checkpoint
    weights: str = "ema"  # or "weights"
    to: str | None = None  # an empty folder; None: export/step-… in the run's folder
    max_shard_gb: float = 10.0  # 10^9 bytes of one file; diffusers' default in save_pretrained
    licence: str = "unknown, ask who trained it"

    def __post_init__(self) -> None:
        if self.weights not in ("ema", "weights"):
            raise ValueError(f"weights={self.weights!r} must be ema or weights")
        if not self.max_shard_gb > 0:
            raise ValueError(f"max_shard_gb={self.max_shard_gb} must be positive; diffusers: 10")
