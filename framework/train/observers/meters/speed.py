"""How fast the run trains, and how its data comes."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from framework.batch import ReadStats
from framework.train.loop import StepInput, StepOutput
from framework.train.observers.meters.meter import Meter
from framework.train.observers.meters.throughput import Throughput
from model_zoo.flops import Work, training_flops_per_token


class Prefetched(Protocol):
    """What is asked of the prefetched steps."""

    def take_wait_s(self) -> float:
        """Seconds that training waited for steps, since the last call."""

    def mean_ready(self) -> float:
        """How many steps lay ready when one was asked for, since the last call."""


@dataclass(frozen=True)
class Share:
    """One rank's part of a window."""

    window: dict[str, float]  # of `Throughput.window`
    num_steps: int
    steps_ready: float
    read: ReadStats


class Speed(Meter[Share]):
    """Throughput of the whole run, and reads of all ranks; sums of the session for its state."""

    def __init__(
        self,
        steps: Prefetched,
        work: Work,
        peak_tflops: float | None,
        num_devices: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`peak_tflops`: of one device, for MFU; see `Throughput`."""
        self._steps, self._work, self._peak_tflops = steps, work, peak_tflops
        self._throughput = Throughput(clock, peak_tflops, num_devices)
        self._num_steps = self._num_updates = 0  # of the window
        self._read = ReadStats()
        self._seconds = self._tokens = self._wait_s = 0.0  # of all windows
        self.productive_s = 0.0  # of steps that changed the weights, without waiting for data

    def begin(self) -> None:
        """Time counts from here."""
        self._throughput.skip()

    def step(self, output: StepOutput) -> None:
        """Count it."""
        inputs = output.inputs
        flops = step_flops(inputs, self._work) if self._peak_tflops else 0.0
        self._throughput.step(inputs.tokens, flops)
        self._num_steps += 1
        self._num_updates += not output.skipped
        self._read = sum((batch.read for batch, _ in inputs.packs), self._read)

    def stalled(self, seconds: float) -> None:
        """Leave it out."""
        self._throughput.skip()

    def measure(self) -> Share:
        """This rank's window; the next begins."""
        window = self._throughput.window(self._steps.take_wait_s())
        share = Share(window, self._num_steps, self._steps.mean_ready(), self._read)
        if window:
            seconds = window["speed/step_s"] * self._num_steps
            waited = window["data/wait_share"] * seconds
            self._seconds += seconds
            self._tokens += window["speed/tokens_per_s"] * seconds
            self._wait_s += waited
            self.productive_s += self._num_updates / self._num_steps * (seconds - waited)
        self._num_steps = self._num_updates = 0
        self._read = ReadStats()
        return share

    def figures(self, by_rank: Sequence[Share]) -> dict[str, float]:
        """Rank 0's throughput; sums of reads over ranks a second, means a clip, the worst rank."""
        first = by_rank[0]
        figures = dict(first.window)
        read = sum((share.read for share in by_rank), ReadStats())
        if not figures or not read.clips:
            return figures
        seconds = figures["speed/step_s"] * first.num_steps
        waits = [share.window.get("data/wait_share", 0.0) for share in by_rank]
        return figures | {
            "data/clips_per_s": read.clips / seconds,
            "data/mb_per_s": read.size_bytes / seconds / 1e6,
            "data/fetch_ms": 1e3 * read.fetch_s / read.clips,
            "data/decode_ms": 1e3 * read.decode_s / read.clips,
            "data/wait_share": statistics.fmean(waits),
            "data/wait_share_worst": max(waits),
            "data/steps_ready_worst": min(share.steps_ready for share in by_rank),
        }

    def state(self) -> dict[str, Any]:
        """Means over all steps of this session, checkpoints left out."""
        seconds = self._seconds or float("inf")
        return {
            "speed": {
                "tokens_per_s": self._tokens / seconds,
                "wait_share": self._wait_s / seconds,
            }
        }


def step_flops(inputs: StepInput, work: Work) -> float:
    """Model FLOPs of a step over all ranks, taking this rank's clips for the mixture of all."""
    grids = []
    for batch, _ in inputs.packs:
        lengths = batch.cu_seqlens.diff().tolist()
        for b in (batch.clip_ids >= 0).nonzero().flatten().tolist():
            f, h, w = batch.grid[b].tolist()
            is_whole = f * h * w == lengths[b]  # no token of it is dropped
            grids.append((f, h, w) if is_whole else (lengths[b], 1, 1))
    return training_flops_per_token(work, grids) * inputs.tokens
