"""What to sample."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleConfig:
    """Videos that `python -m framework.sample` makes, one for each prompt."""

    prompts: tuple[str, ...] = ()
    num_frames: int = 24
    height: int = 32
    width: int = 32
    fps: float = 8.0
    seed: int = 0
    weights: str = "ema"  # or "weights"
    checkpoint: str = "latest"  # or a step, or the URL of a committed checkpoint
    out: str | None = None  # a folder; None: samples/ in the run's folder
    max_tokens: int = 8192  # of one forward pass

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be positive")
        if self.weights not in ("ema", "weights"):
            raise ValueError(f"weights={self.weights!r} must be ema or weights")
