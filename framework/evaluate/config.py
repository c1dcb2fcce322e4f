"""What to evaluate."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out clips are the yardstick: their loss, and videos made from their captions."""

    checkpoint: str = "latest"  # or "init" (before training), a step, or a URL
    weights: str = "ema"  # or "weights"
    num_prompts: int = 200  # videos to sample; held-out clips of more than one frame
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    validation_packs: int = 16  # at most; each is a pack of the recipe's token budget
    seed: int = 1234
    max_tokens: int = 8192  # of one forward pass when sampling
    # Metrics that the trained model must reach at least; the demo fails where one is missed.
    gates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "validation_packs", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not all(0 < level < 1 for level in self.noise_levels):
            raise ValueError(f"noise_levels={self.noise_levels} must lie between 0 and 1")
        if self.weights not in ("ema", "weights"):
            raise ValueError(f"weights={self.weights!r} must be ema or weights")
