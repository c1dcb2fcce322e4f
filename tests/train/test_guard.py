"""The rules for steps that went wrong, on losses written by hand."""

import math

import pytest

from framework.train.guard import MIN_HISTORY, Diverged, Guard, GuardConfig

QUIET = [1.0 + 0.01 * (i % 5) for i in range(40)]


def taught(config: GuardConfig, losses: list[float] = QUIET) -> Guard:
    guard = Guard(config)
    for step, loss in enumerate(losses):
        guard.learn(step, loss, "")
    return guard


@pytest.mark.parametrize("rule", ["train", "skip", "rollback"])
def test_a_spike_gets_what_the_rule_says(rule) -> None:
    guard = taught(GuardConfig(on_spike=rule))
    assert guard.judge(1.05) == "train"
    assert guard.judge(0.1) == "train", "a loss that falls is no spike"
    assert guard.judge(3.0) == rule
    assert guard.judge(math.nan) == "train", "the engine sees to it"


def test_nothing_is_a_spike_in_the_beginning() -> None:
    config = GuardConfig(on_spike="skip")
    assert taught(config, QUIET[: MIN_HISTORY - 1]).judge(100.0) == "train"
    assert taught(config, QUIET[:MIN_HISTORY]).judge(100.0) == "skip"


def test_a_loss_that_stands_still_makes_no_spike_of_a_rounding() -> None:
    guard = taught(GuardConfig(on_spike="skip"), [1.0] * 40)
    assert guard.judge(1.0000001) == "train"
    assert guard.judge(1.5) == "skip"


def test_judged_after_a_resume_as_without() -> None:
    config = GuardConfig(on_spike="skip", window=16)
    guard = taught(config)
    guard.learn(40, math.nan, "not finite")
    again = Guard(config, guard.state())
    for loss in (1.05, 1.1, 1.2, 1.5, 3.0):
        assert again.judge(loss) == guard.judge(loss)
    assert again.state() == guard.state()


@pytest.mark.parametrize("why", ["not finite", "spike", "rolled back"])
def test_too_many_in_a_row_end_the_run(why) -> None:
    guard = taught(GuardConfig(max_skipped=3))
    for round_ in range(5):  # one that is trained on starts the count anew
        for i in range(3):
            guard.learn(10 * round_ + i, 9.0, why)
        guard.learn(10 * round_ + 3, 1.0, "")
    for i in range(3):
        guard.learn(60 + i, 9.0, why)
    with pytest.raises(Diverged, match=rf"4 steps in a row .* step 63: {why}; train.guard"):
        guard.learn(63, 9.0, why)


@pytest.mark.parametrize(
    "wrong", [{"max_skipped": 0}, {"window": 3}, {"spike_deviations": 0.0}, {"rollback_steps": 0}]
)
def test_impossible_rules_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GuardConfig(**wrong)
