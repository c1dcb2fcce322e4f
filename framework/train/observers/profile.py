"""A profile of a few steps on demand, by torch.profiler: what the CPU and the GPU did, and when.

Two files come of it: a trace for chrome://tracing or ui.perfetto.dev, and a table of the operators
that took most. Switched off, it is one comparison a step.
"""

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from framework.storage import Store
from framework.tracking.tracker import Tracker
from framework.train.loop import StepOutput
from framework.train.observers.observer import Observer

_LOG = logging.getLogger(__name__)
_WARMUP_STEPS = 1  # the tracer's own start takes time, which must not be in the profile
_TABLE_ROWS = 40  # operators; chosen by hand


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to profile, counted from the start of the process: a resume counts anew."""

    enabled: bool = False
    first_step: int = 10  # after allocators, compilation and prefetch have settled
    num_steps: int = 3
    all_ranks: bool = False  # else rank 0 alone

    def __post_init__(self) -> None:
        if self.first_step < _WARMUP_STEPS:
            raise ValueError(
                f"first_step={self.first_step} must be at least {_WARMUP_STEPS}: the profiler "
                "warms up in the step before; try 10"
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1; try 3")


class Profile:
    """A context around the training loop; call `step` after each step.

    `files` are written into `folder` as soon as the steps are over: the trace, then the table. A
    run that ends earlier leaves what there is of them; one that fails leaves none.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self.files: list[Path] = []
        self._config, self._folder, self._rank = config, folder, rank
        self._start = config.first_step - _WARMUP_STEPS
        self._profiler: profile | None = None
        self._done = 0  # steps of this process
        self._is_on = config.enabled and (config.all_ranks or rank == 0)

    def __enter__(self) -> "Profile":
        self._begin_when_due()
        return self

    def step(self) -> None:
        """A step is over."""
        if not self._is_on:
            return
        self._done += 1
        if self._profiler is not None:
            self._profiler.step()  # calls _export after the last
            if self._done == self._config.first_step + self._config.num_steps:
                self._end()
        self._begin_when_due()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._profiler is not None:
            if kind is not None or self._done <= self._config.first_step:
                self._profiler.on_trace_ready = None
            self._end()

    def _begin_when_due(self) -> None:
        if not self._is_on or self._done != self._start:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(
                wait=0, warmup=_WARMUP_STEPS, active=self._config.num_steps, repeat=1
            ),
            on_trace_ready=self._export,
        )
        self._profiler.start()

    def _end(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._profiler, self._is_on = None, False

    def _export(self, profiler: profile) -> None:
        first = self._config.first_step
        last = min(self._done, first + self._config.num_steps) - 1
        name = f"rank-{self._rank:05d}-steps-{first}-{last}"
        has_gpu = ProfilerActivity.CUDA in profiler.activities
        order = "self_device_time_total" if has_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
        trace, operators = self._folder / f"{name}.json.gz", self._folder / f"{name}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            operators.write_text(table)
        except OSError as error:  # a full disk is no reason to stop training
            _LOG.warning("the profile could not be written: %s", error)
            return
        self.files += [trace, operators]


class ProfileKeeper(Observer):
    """Profiles a session, and keeps what comes of it with the run and with the tracker."""

    def __init__(
        self, config: ProfileConfig, enabled: bool, dp_rank: int, run: Store, tracker: Tracker
    ) -> None:
        self._run, self._tracker = run, tracker
        self._scratch = tempfile.TemporaryDirectory()
        config = replace(config, enabled=enabled)
        self._profile = Profile(config, Path(self._scratch.name), dp_rank)

    def begin(self) -> None:
        """Begin when it is due."""
        self._profile.__enter__()

    def step(self, output: StepOutput) -> None:
        """Count it."""
        self._profile.step()

    def end(self, error: BaseException | None) -> None:
        """Keep the files."""
        self._profile.__exit__(None if error is None else type(error), error, None)
        for path in self._profile.files:
            self._run.write(f"profiles/{path.name}", path.read_bytes())
            self._tracker.log_artifact(path, "profiles")
        self._scratch.cleanup()
