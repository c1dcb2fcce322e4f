"""Which clips a run trains on, how they become steps, and what the stream may use."""

from dataclasses import dataclass, field

from framework.data.cost import CostModel
from framework.data.recipe import Recipe
from framework.data.synthetic import SyntheticConfig
from framework.data.views import Geometry, ViewConfig


@dataclass(frozen=True)
class StreamConfig:
    """How much of the cluster one rank's stream may use."""

    max_tasks: int = 2  # decode tasks at once, of one CPU each
    steps_per_task: int = 1  # above ~60 rows/s Ray's executor is the limit: take more
    segment_steps: int = 64  # steps made ahead at once, or fewer, where two segments do not fit
    object_store_mb: int = 512  # of the cluster, for one rank: two segments
    static_shapes: bool = True  # pad packs to the budget, for compilation

    def __post_init__(self) -> None:
        for name in ("max_tasks", "steps_per_task", "segment_steps", "object_store_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Shards, their manifest, and the recipe of the plan.

    `shards` and `manifest` are URLs of folders. The recipe's geometry follows from codec and model;
    so does its cost, where `cost` is None.
    """

    shards: str
    manifest: str
    views: ViewConfig
    max_tokens: int  # L: video tokens in a pack
    max_text_tokens: int  # K
    max_clips: int  # B - 1
    global_batch_packs: int  # G: packs in a step
    policy: str = "mixed"
    window_steps: int = 64
    lookahead: int = 4096  # clips that are packed together
    drop_caption: float = 0.1
    sources: dict[str, float] = field(default_factory=dict)  # source -> share; empty: all, once
    where: str = ""  # such as "motion > 0.2 and aesthetic > 4.5"
    cost: CostModel | None = None
    # A file (URL) of clips to take out of a run that is under way, see
    # framework.data.manifest.read_clip_ids: the plan stays, they leave holes of weight zero.
    exclude: str = ""
    heldout_fraction: float = 0.05  # of the source videos, by hash
    stream: StreamConfig = field(default_factory=StreamConfig)
    synthetic: SyntheticConfig | None = None  # clips that `framework.data.synthetic` makes

    def recipe(self, geometry: Geometry, cost: CostModel, seed: int) -> Recipe:
        """The recipe of the plan; ValueError where its parts do not fit together."""
        return Recipe(
            views=self.views,
            geometry=geometry,
            cost=self.cost or cost,
            max_tokens=self.max_tokens,
            max_text_tokens=self.max_text_tokens,
            max_clips=self.max_clips,
            global_batch_packs=self.global_batch_packs,
            policy=self.policy,
            window_steps=self.window_steps,
            lookahead=self.lookahead,
            drop_caption=self.drop_caption,
            sources=self.sources,
            where=self.where,
            seed=seed,
        )
