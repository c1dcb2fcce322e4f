"""The configs of one training run, as driver and ranks share them."""

from dataclasses import dataclass
from typing import Protocol

from framework.assembly import Assembly, LineConfig
from framework.cluster import ClusterConfig, check_lasting
from framework.run.identity import Identity, RunSection
from framework.tracking.tracker import TrackerConfig
from framework.train.config import TrainConfig
from framework.train.engine.protocol import EngineConfig, OptimizerConfig


class JobConfig(LineConfig, Protocol):
    """What a training job is made from; a run config is one."""

    @property
    def train(self) -> TrainConfig:
        """How long to train, and what to watch."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """What updates the parameters."""

    @property
    def engine(self) -> EngineConfig:
        """What holds and shards them."""

    @property
    def tracking(self) -> TrackerConfig:
        """Where metrics go."""

    @property
    def cluster(self) -> ClusterConfig:
        """Where the workers run."""

    @property
    def profile(self) -> bool:
        """Whether a rank's time and memory are recorded."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, how, and where; picklable."""

    run: RunSection
    assembly: Assembly
    train: TrainConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    tracking: TrackerConfig
    cluster: ClusterConfig
    profile: bool = False

    @classmethod
    def of(cls, config: JobConfig) -> "Job":
        """The training job of a run config."""
        return cls(
            run=config.run,
            assembly=Assembly.of(config),
            train=config.train,
            optimizer=config.optimizer,
            engine=config.engine,
            tracking=config.tracking,
            cluster=config.cluster,
            profile=config.profile,
        )

    @property
    def identity(self) -> Identity:
        """Of the whole run config."""
        return self.assembly.identity

    def check(self) -> None:
        """ValueError where the configs do not fit together, or name a place that will not last."""
        self.assembly.check()
        if self.cluster.max_workers > (packs := self.assembly.data.global_batch_packs):
            raise ValueError(
                f"cluster.num_workers={self.cluster.num_workers} is more than "
                f"data.global_batch_packs={packs}; raise the latter"
            )
        check_lasting("run.root", self.run.root)
        self.tracking.check_lasting(check_lasting)
