"""The parts of the loss add up to the whole, on any number of ranks."""

import re
from typing import Any

import pytest
import torch

from framework.batch import PackedBatch
from framework.train.observers.meters.losses import LossParts, source_metrics
from tests.train.steps import pack, step_output

# Clips of 3, 2, 4 and 1 tokens; the second failed.
SUMS = torch.tensor([6.0, 0.0, 1.5, 8.0])


def batch(source: tuple[int, ...] = (0, 0, 1, 0)) -> PackedBatch:
    ids, lengths = [5, 6, 7, 8], [3, 2, 4, 1]
    return pack(ids, lengths=lengths, weights=[1.0, 0.0, 1.0, 1.0], source=source)


def add(meter: LossParts, one: PackedBatch, by_clip: torch.Tensor, **sums: Any) -> None:
    meter.step(step_output(0, one, by_clip=[by_clip], sums=sums))


def test_each_token_counts_once_in_its_source() -> None:
    meter = LossParts(["films", "drones", "unseen"])
    add(meter, batch(), SUMS)
    measured = meter.measure()
    assert meter.figures([measured]) == {
        "loss_by_source/films": 14.0 / 4,
        "loss_by_source/drones": 1.5 / 4,
    }
    assert meter.figures([meter.measure()]) == {}


def test_parts_weighted_by_tokens_are_the_whole_over_steps_and_ranks() -> None:
    ranks = [LossParts(["a", "b"]) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    loss = tokens = 0.0
    for step in range(4):
        for meter in ranks:
            sums = torch.rand(4, generator=generator) * (batch().clip_weights > 0)
            add(meter, batch((step % 2, 1, 0, 1)), sums)
            loss, tokens = loss + sums.double().sum().item(), tokens + 8.0
    measured = [meter.measure() for meter in ranks]
    found = [sum(m[name][i] for m in measured for name in m) for i in (0, 1)]
    # Sums of a few dozen float64 terms in another order.
    assert found == pytest.approx([loss, tokens], rel=1e-12)


def test_an_objectives_own_sums_are_added_up_by_name() -> None:
    one, other = LossParts([]), LossParts([])
    first, second = torch.tensor([3.0, 2.0]), torch.tensor([5.0, 2.0])
    add(one, batch(), SUMS, kl=first.double(), gan=torch.zeros(2).double())
    add(one, batch(), SUMS, kl=second.double())
    add(other, batch(), SUMS, pixels=first.double())
    assert one.figures([one.measure(), other.measure()]) == {"kl": 2.0, "pixels": 1.5}


def test_a_loss_that_is_not_a_number_stays_in_its_place() -> None:
    meter = LossParts(["a", "b"])
    add(meter, batch(), torch.tensor([6.0, 0.0, torch.nan, 8.0]))
    figures = meter.figures([meter.measure()])
    assert [n for n, value in figures.items() if value != value] == ["loss_by_source/b"]


def test_names_are_what_a_tracker_takes_and_all_different() -> None:
    sources = ["a/b", "a_b", "a%b", "", "..", "films 2:1", "äöü", "default"]
    names = source_metrics(sources)
    assert len(set(names)) == len(sources)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_\-.: ]+/[A-Za-z0-9_\-.: ]+", name)
    assert names[-1] == "loss_by_source/default"


def test_a_name_of_megabytes_makes_a_short_metric() -> None:
    names = source_metrics(["x" * 1_000_000, "x" * 1_000_001, "\x1b[2J\n\u202e"])
    assert len(set(names)) == 3
    assert max(map(len, names)) < 130
    assert names[2] == "loss_by_source/__2J__"
