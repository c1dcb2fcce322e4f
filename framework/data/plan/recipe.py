"""The recipe: everything that shapes a plan, as constants that are hashed into its digest."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from framework.data.plan.cost import CostModel
from framework.data.plan.packing import PackLimits
from framework.data.plan.views import Geometry, ViewConfig

FORMAT = 4  # of the plan's files and of the planner's choices: a change must give other digests


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What a user says of how clips become packs and packs steps; G, L, K and B - 1.

    A step is `global_batch_packs` packs, whatever the number of ranks. Packs of `policy` "mixed"
    hold clips of any size; "bucketed" packs hold clips of one token grid each, which a CPU can
    batch.
    """

    views: ViewConfig
    max_tokens: int  # L: video tokens in a pack
    max_text_tokens: int  # K: text tokens in a pack
    max_clips: int  # B - 1: clips in a pack
    global_batch_packs: int  # G: packs in a step
    policy: str = "mixed"
    # Steps in a window, among which packs are sorted by cost. 64 bring the sum of the steps'
    # largest costs to 1.02 of the mean at 8 to 512 ranks, against 1.08 for 16 (simulated).
    window_steps: int = 64
    # Clips that are packed together: 4096 fill as much as all at once (benchmarks/packing.py).
    lookahead: int = 4096
    drop_caption: float = 0.1  # classifier-free guidance, Ho & Salimans 2022, sec. 3.2
    # Source -> its share of the clips, in any unit; those not named are left out. Empty: every
    # clip of every source once an epoch.
    sources: dict[str, float] = field(default_factory=dict)
    # A filter, such as "motion > 0.2 and aesthetic > 4.5", see framework.data.manifest.where;
    # empty: all clips.
    where: str = ""
    # Masked training, in phases: (from this epoch on, share of each clip's tokens that is kept).
    # NaViT (Dehghani et al. 2023), sec. 2.2; MaskDiT (Zheng et al. 2023) without its decoder.
    keep: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def __post_init__(self) -> None:
        counts = (
            "max_tokens",
            "max_text_tokens",
            "max_clips",
            "global_batch_packs",
            "window_steps",
            "lookahead",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.policy not in ("mixed", "bucketed"):
            raise ValueError(f'policy={self.policy!r} must be "mixed" or "bucketed"')
        for source, weight in self.sources.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"sources.{source}={weight} must be above 0; leave out for none")
        starts = [start for start, _ in self.keep]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"keep={self.keep} must begin at epoch 0, and its epochs must rise")
        for start, rate in self.keep:
            if not 0 < rate <= 1:
                raise ValueError(f"keep has {rate} from epoch {start}: it must lie in (0, 1]")
        if not 0.0 <= self.drop_caption <= 1.0:
            raise ValueError(f"drop_caption={self.drop_caption} must lie in [0, 1]; try 0.1")


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeConfig):
    """All that shapes a plan beside the clips: what the user says, and what follows from it."""

    geometry: Geometry
    cost: CostModel
    encoded: bool = False  # the clips are latents of views that were chosen before
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.views.check(self.geometry)
        view = self.views.smallest_view(self.geometry)
        tokens = self.geometry.num_tokens(view.num_frames, view.height, view.width)
        if tokens > self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} must hold the smallest view, {view.num_frames} "
                f"frames of {view.height}x{view.width}; try {tokens} or more"
            )

    @classmethod
    def of(
        cls,
        config: RecipeConfig,
        *,
        geometry: Geometry,
        cost: CostModel,
        encoded: bool = False,
        seed: int = 0,
    ) -> "Recipe":
        """A config, of this class or one below it, made complete."""
        said = {f.name: getattr(config, f.name) for f in fields(RecipeConfig)}
        return cls(**said, geometry=geometry, cost=cost, encoded=encoded, seed=seed)

    @property
    def dummy_cost(self) -> int:
        """Predicted cost of a dummy pack."""
        view = self.views.smallest_view(self.geometry)
        tokens = self.geometry.num_tokens(view.num_frames, view.height, view.width)
        return int(self.cost.clip_costs(np.array(tokens)))

    def keep_rate(self, epoch: int) -> float:
        """The share of each clip's tokens that an epoch of the plan keeps."""
        return [rate for start, rate in self.keep if start <= epoch][-1]

    @property
    def limits(self) -> PackLimits:
        """What one pack may hold."""
        return PackLimits(self.max_tokens, self.max_text_tokens, self.max_clips)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> "Recipe":
        """The reverse of `dataclasses.asdict`, after a way through JSON."""
        views = dict(mapping["views"])
        views["frames"] = tuple(views["frames"])
        views["sizes"] = tuple((height, width) for height, width in views["sizes"])
        keep = tuple((start, rate) for start, rate in mapping["keep"])
        geometry = dict(mapping["geometry"])
        geometry["patch_size"] = tuple(geometry["patch_size"])
        parts = {
            "views": ViewConfig(**views),
            "geometry": Geometry(**geometry),
            "cost": CostModel(**mapping["cost"]),
            "keep": keep,
        }
        return cls(**{**mapping, **parts})


def plan_identity(
    recipe: Recipe, manifest_fingerprint: str, text_fingerprint: str, split: str
) -> dict[str, Any]:
    """All that a plan is a function of but for the epoch, in plain JSON types."""
    return {
        "format": FORMAT,
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "manifest": manifest_fingerprint,
        "text": text_fingerprint,
        "split": split,
    }


def plan_digest(identity: dict[str, Any]) -> str:
    """16 hex digits that name the plan of a `plan_identity`."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()
