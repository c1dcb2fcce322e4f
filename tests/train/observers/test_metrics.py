"""A window's figures: of each step, by its meters, of all ranks; and a meter of one's own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from framework.batch import ReadStats
from framework.data.plan.cost import CostModel
from framework.tracking.gauges import Gauges
from framework.tracking.tracker import NoTracker
from framework.train.loop import StepOutput
from framework.train.observers.meters.goodput import Goodput
from framework.train.observers.meters.imbalance import Imbalance
from framework.train.observers.meters.lost_clips import LostClips
from framework.train.observers.meters.meter import Meter
from framework.train.observers.meters.speed import Share, Speed
from framework.train.observers.metrics import Metrics, Outputs
from model_zoo.flops import Work
from tests.train.steps import pack, step_output


class Recorded(NoTracker):
    """What was logged, in order."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, checkpoint_step: int | None = None
    ) -> None:
        self.logged.append((step, dict(metrics)))


class Clips(Meter[int]):
    """A new metric, as somebody would add it."""

    def __init__(self) -> None:
        self.seen = 0

    def step(self, output: StepOutput) -> None:
        self.seen += sum(batch.num_segments for batch, _ in output.inputs.packs)

    def measure(self) -> int:
        seen, self.seen = self.seen, 0
        return seen

    def figures(self, by_rank: Sequence[int]) -> dict[str, float]:
        return {"data/clips": float(sum(by_rank))}


def test_a_window_is_logged_once_and_steps_by_themselves() -> None:
    tracker, shown = Recorded(), list[dict[str, Any]]()
    metrics = Metrics([Clips()], Outputs(tracker, Gauges("a", 0), shown.append), 1, num_steps=9)
    metrics.begin()
    metrics.step(step_output(3, pack([1, 2]), loss=2.0))
    metrics.step(step_output(4, loss=math.nan, skipped="not finite"))
    metrics.window()
    metrics.window()  # nothing has happened since
    steps = [(step, figures.get("train/loss")) for step, figures in tracker.logged]
    assert steps == [(3, 2.0), (4, None), (4, None)]
    assert tracker.logged[0][1]["train/skipped"] == 0.0
    assert tracker.logged[1][1]["train/skipped"] == 1.0
    assert tracker.logged[2][1] == {"data/clips": 3.0}
    assert shown == [{"step": 5, "steps": 9, "loss": 2.0, "data/clips": 3.0}]


def test_the_dearest_rank_over_the_mean_of_all() -> None:
    meter = Imbalance(CostModel(1, 0))
    for lengths in ([1, 3], [2, 2]):
        meter.step(step_output(0, pack([1, 2], lengths=lengths)))
    assert meter.measure() == [4.0, 4.0]
    assert meter.figures([[4.0, 4.0], [4.0, 8.0]]) == {
        "speed/imbalance": pytest.approx((1 + 8 / 6) / 2)
    }


def test_too_many_lost_clips_end_the_run_on_every_rank() -> None:
    meter = LostClips(max_lost_share=0.2)
    torn = pack([1, 2, -1], lengths=[3, 1, 1], weights=[0.0, 1.0, 0.0], failed=("a: torn",))
    meter.step(step_output(7, torn, tokens=10))
    other = meter.measure()
    assert (other.lost_tokens, other.failed) == (3, ["a: torn"])
    assert meter.figures([other]) == {"data/lost_share": 0.3, "data/failed_clips": 1.0}
    with pytest.raises(ValueError, match=r"30% of the tokens of steps 7 to 7 .* such as a: torn"):
        meter.check()


class Prefetched:
    """Steps that came as they are told to have come."""

    wait_s, ready = 0.0, 0.0

    def take_wait_s(self) -> float:
        return self.wait_s

    def mean_ready(self) -> float:
        return self.ready


def test_speed_is_that_of_rank_0_and_reads_are_of_all() -> None:
    now, steps = [0.0], Prefetched()
    speed = Speed(steps, Work(1), None, num_devices=2, clock=lambda: now[0])
    now[0] = 50.0
    speed.begin()
    read = ReadStats(clips=4, size_bytes=8_000_000, fetch_s=0.4, decode_s=0.8)
    for step in range(2):
        now[0] += 4.0
        speed.step(step_output(step, pack([1], read=read), tokens=100, num_averaged=100))
    now[0] += 90.0
    speed.stalled(90.0)
    now[0] += 2.0
    speed.step(step_output(2, tokens=100, num_averaged=100, skipped="spike"))
    steps.wait_s, steps.ready = 2.5, 1.5
    mine = speed.measure()
    other = Share({"data/wait_share": 0.75}, 3, 0.5, ReadStats(2, 2_000_000, 0.2, 0.4))
    assert speed.figures([mine, other]) == pytest.approx(
        {
            "speed/tokens_per_s": 30.0,
            "speed/step_s": 10 / 3,
            "data/wait_share": 0.5,
            "data/wait_share_worst": 0.75,
            "data/steps_ready_worst": 0.5,
            "data/clips_per_s": 1.0,
            "data/mb_per_s": 1.8,
            "data/fetch_ms": 100.0,
            "data/decode_ms": 200.0,
        }
    )
    assert speed.state() == {"speed": {"tokens_per_s": 30.0, "wait_share": 0.25}}
    assert speed.productive_s == pytest.approx(2 / 3 * 7.5)  # one of three changed nothing


def test_goodput_goes_on_through_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(Prefetched(), Work(1), None, num_devices=1)
    monkeypatch.setattr("time.time", lambda: 1100.0)
    first = Goodput(speed, session_began=1000.0, restarts=0, kept={})
    speed.productive_s = 60.0
    assert first.figures([None]) == {"run/goodput": 0.6, "run/restarts": 0.0}
    kept = first.state()["clock"]
    speed.productive_s = 30.0
    monkeypatch.setattr("time.time", lambda: 1200.0)
    # The same driver: its wall time has run on. Another: nobody wanted the run in between.
    same = Goodput(speed, session_began=1000.0, restarts=1, kept=kept)
    assert same.figures([None])["run/goodput"] == pytest.approx(90 / 200)
    another = Goodput(speed, session_began=1150.0, restarts=1, kept=kept)
    assert another.figures([None])["run/goodput"] == pytest.approx(90 / 150)
