"""A user's mistakes end a run at once, in their own words; a bad clip costs what the rule says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.storage import Store
from framework.train.fence import read_attempt
from framework.train.report import read_ledger
from tests.faults.conftest import UserCode, clips_of, losses_of, skipped_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 30


@pytest.fixture
def line(small_line: list[str], small_data: list[str]) -> list[str]:
    without_tracking = [override for override in small_line if "tracking" not in override]
    return [
        *without_tracking,
        *small_data,
        "tracking=none",
        f"train.steps={STEPS}",
        "train.checkpoint_every=5",
        "train.log_every=5",
        "train.deterministic=true",
        "train.try_worst_packs=false",
    ]


def test_steps_that_went_wrong_are_left_out_and_nothing_else(
    user_code: UserCode, line: list[str], finish: Callable[..., str], tmp_path: Path
) -> None:
    finish("framework.train", *line)
    expected = read_ledger(Store(tmp_path / "runs/small"))
    nan_step, spike_step = 7, 23
    nan, spike = expected[nan_step]["clips"][0], expected[spike_step]["clips"][0]
    assert len(expected) == STEPS

    process = user_code.train(
        *line,
        "model=faulty",
        "run.name=faulty",
        f"model.faults={{nan: {nan}, spike: {spike}}}",
        "train.guard.on_spike=rollback",
    )
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output[-6000:]
    assert f"step {spike_step} has a loss spike" in output
    assert f"back to step 20, and on without step {spike_step}" in output

    run = Store(tmp_path / "runs/faulty")
    assert json.loads(run.read("left-out-steps.json")) == [spike_step]
    # A pass has 16 steps, so each of the two clips may come once more.
    bad = {step for step, row in expected.items() if {nan, spike} & set(row["clips"])}
    skipped = skipped_in(run)
    assert {nan_step: skipped[nan_step], spike_step: skipped[spike_step]} == {
        nan_step: "not finite",
        spike_step: "rolled back",
    }
    assert set(skipped) <= bad
    found = read_ledger(run)
    assert clips_of(found) == clips_of(expected)
    before = {step: loss for step, loss in losses_of(expected).items() if step < min(bad)}
    assert {step: losses_of(found)[step] for step in before} == before
    assert found[nan_step]["loss"] is None
    assert read_attempt(run)["number"] == 1, "no restart was needed"


@pytest.mark.parametrize(
    ("fault", "options", "words"),
    [
        ("bug", [], "IndexError"),
        ("memory", ["train.try_worst_packs=true"], "memory runs out on a pack that the recipe"),
    ],
)
def test_a_mistake_of_the_users_own_ends_the_run_at_once(
    user_code: UserCode,
    line: list[str],
    tmp_path: Path,
    fault: str,
    options: list[str],
    words: str,
) -> None:
    process = user_code.train(*line, "model=faulty", f"model.faults={{{fault}: 1}}", *options)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 2, output[-6000:]
    assert "error: " in output
    assert words in output.split("error: ")[1]
    assert "faulty.py" in output or fault == "memory"
    assert read_attempt(Store(tmp_path / "runs/small"))["number"] == 1, "it was tried again"
