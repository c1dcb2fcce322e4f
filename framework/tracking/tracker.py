"""What a run tells the world: parameters, metrics, artifacts, checkpoints.

Here are the protocols, and the tracker that logs nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Where a run's figures go. No call waits for the network, and none fails for want of it."""

    @property
    def run_id(self) -> str | None:
        """The tracker's id of the run; None while the tracker has not answered yet."""

    @property
    def journal_path(self) -> Path | None:
        """The journal file, to be copied to the run's storage; it is whole after any line."""

    @property
    def problem(self) -> str | None:
        """Why the tracker does not take what is logged; None while it does."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log a flat mapping as strings. The first value of a parameter stays for ever."""

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, checkpoint_step: int | None = None
    ) -> None:
        """Log one point of each metric; what comes before the first `/` of a name is its section.

        `checkpoint_step`: the figures measure that checkpoint, and are shown with it as well.
        """

    def log_artifact(self, local_path: str | Path, folder: str = "") -> None:
        """Keep a copy of a file with the run, below `folder`; the file may go when this returns."""

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` with the run as the file `name` (`folder/file.txt`)."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; the last value of a tag wins."""

    def log_checkpoint(self, url: str, step: int) -> None:
        """Register a committed checkpoint with the run."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was logged is with the tracker; False when time ran out."""

    def close(self, status: Status | None = "FINISHED", timeout_s: float = 30.0) -> None:
        """End the run with `status` (None leaves it open), flush, and stop sending."""


class TrackerConfig(Protocol):
    """What a run wants of the config of a tracker of any kind."""

    def check(self, num_nodes: int) -> None:
        """ValueError where the workers of so many nodes could not reach the tracker."""

    def check_lasting(self, check: Callable[[str, str], None]) -> None:
        """Let `check(key, path)` look at each local file that must outlast the job."""

    def absolute(self, base: Path) -> "TrackerConfig":
        """The same with relative paths taken from `base`, for workers in other folders."""

    def page(self) -> str:
        """Where to watch the run, in words."""

    def build(
        self,
        run_name: str,
        journal_dir: Path,
        run_id: str | None = None,
        run_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        reopen: bool = True,
    ) -> Tracker:
        """Open the run `run_id`, else the one that was made for `run_key`, else make one.

        `reopen` False adds to a run without saying that it is running again.
        """


class NoTracker:
    """Logs nothing."""

    run_id: str | None = None
    journal_path: Path | None = None
    problem: str | None = None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Do nothing."""

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, checkpoint_step: int | None = None
    ) -> None:
        """Do nothing."""

    def log_artifact(self, local_path: str | Path, folder: str = "") -> None:
        """Do nothing."""

    def log_text(self, text: str, name: str) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def log_checkpoint(self, url: str, step: int) -> None:
        """Do nothing."""

    def flush(self, timeout_s: float) -> bool:
        """All of nothing is sent."""
        return True

    def close(self, status: Status | None = "FINISHED", timeout_s: float = 30.0) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class NoTrackerConfig:
    """A run without a tracker."""

    def check(self, num_nodes: int) -> None:
        """Any number of nodes will do."""

    def check_lasting(self, check: Callable[[str, str], None]) -> None:
        """There is no file to look at."""

    def absolute(self, base: Path) -> "NoTrackerConfig":
        """Nothing to resolve."""
        return self

    def page(self) -> str:
        """There is no page."""
        return "no tracker, no page"

    def build(
        self,
        run_name: str,
        journal_dir: Path,
        run_id: str | None = None,
        run_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        reopen: bool = True,
    ) -> Tracker:
        """A tracker that logs nothing."""
        return NoTracker()
