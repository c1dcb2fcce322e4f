"""Which clips a run trains on, how they become steps, and what the stream may use."""

from dataclasses import dataclass, field

from framework.data.plan.cost import CostModel
from framework.data.plan.recipe import Recipe, RecipeConfig
from framework.data.plan.views import Geometry
from framework.mapping import free
from framework.storage import normalize_url

TABLES = (".csv", ".parquet", ".jsonl")  # of loose files, in place of a folder of tars


def split_shards_url(url: str) -> tuple[str, str]:
    """The folder that the names of shards count from, and the table's name in it, or ""."""
    if not url.endswith(TABLES):
        return normalize_url(url), ""
    root, _, table = normalize_url(url).rpartition("/")
    return root, table


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
class IndexConfig:
    """How shards become a manifest."""

    heldout_fraction: float = 0.05  # of the source videos, by hash
    source: str = "default"  # for clips that name none
    # A longer video is cut into equal clips that are not, so that all of it is seen in an epoch.
    max_seconds: float | None = None
    # Read every byte and take its checksum; else of large videos the beginning and the headers.
    checksum: bool = False
    # A table or a manifest may name files anywhere, also private ones: by default only below its
    # own folder, or where `DataConfig.shards` says. One in object storage never names local files.
    anywhere: bool = free(False)

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction={self.heldout_fraction} must be at least 0 and less than 1; "
                "try 0.05"
            )
        if not self.source:
            raise ValueError('source="" must be a name; try "default"')
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds={self.max_seconds} must be positive; null cuts nothing")


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EncodeConfig:
    """How clips are encoded ahead, `python -m framework.data.encode`."""

    dtype: str = "bfloat16"  # of latents and of text embeddings, as they are stored
    clips_per_shard: int = 256
    actors: int = 2
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0  # such as 0.25: four share a GPU

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        for name in ("clips_per_shard", "actors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class SyntheticConfig:
    """Clips that `framework.demo.clips` makes: how many, and the shares of their kinds."""

    num_clips: int = 3500
    clips_per_shard: int = 250
    seed: int = 0
    fps: float = 8.0
    crf: int = 20  # quality of H.264, lower is better
    still_share: float = 0.25
    png_share: float = 0.25  # of the stills; the others are videos of one frame
    large_share: float = 0.25  # of all clips; rendered at twice the size

    def __post_init__(self) -> None:
        for name in ("num_clips", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("still_share", "png_share", "large_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig(RecipeConfig):
    """Shards, their manifest, and what a user says of the plan.

    `shards` is the URL of a folder of tars, or of a table of files; `manifest` that of a folder.
    The recipe's geometry follows from codec and model; so does its cost, where `cost` is None.
    """

    shards: str
    manifest: str
    cost: CostModel | None = None
    # A file (URL) of clips to take out of a run that is under way, see
    # framework.data.manifest.table.read_clip_ids: the plan stays, they leave holes of weight zero.
    exclude: str = free("")
    index: IndexConfig = field(default_factory=IndexConfig)
    # URL of clips that `framework.data.encode` has encoded (or shall): training reads these instead
    # of the videos. Empty: videos are encoded in the stream.
    latents: str = ""
    encode: EncodeConfig = free(of=EncodeConfig)
    stream: StreamConfig = free(of=StreamConfig)
    synthetic: SyntheticConfig | None = None

    def recipe(self, geometry: Geometry, cost: CostModel, seed: int) -> Recipe:
        """The recipe of the plan; ValueError where its parts do not fit together."""
        return Recipe.of(
            self,
            geometry=geometry,
            cost=self.cost or cost,
            encoded=bool(self.latents),
            seed=seed,
        )
