"""The parts of the loss add up to the whole, on any number of ranks, and nothing waits for them."""

import re
from dataclasses import replace

import pytest
import torch

from framework.batch import Clip, PackedBatch
from framework.train.observers.breakdown import Breakdown

# Clips of 3, 2, 4 and 1 tokens, one token of the third given; the second failed; then padding.
LENGTHS = [3, 2, 4, 1]
SUMS = torch.tensor([6.0, 0.0, 1.5, 8.0, 0.0, 0.0])
T = torch.tensor([0.04, 0.05, 0.31, 1.0, 0.0, 0.0])


def batch(source: tuple[int, ...] = (0, 0, 1, 0)) -> PackedBatch:
    clips = [
        Clip(
            tokens=torch.zeros(n, 2),
            grid=(n, 1, 1),
            text=torch.zeros(1, dtype=torch.int64),
            clip_id=5 + i,
            fps=1.0,
            weight=float(i != 1),
            source=source[i],
            given=torch.arange(n) == 0 if i == 2 else None,
        )
        for i, n in enumerate(LENGTHS)
    ]
    return PackedBatch.from_clips(clips, num_segments=6, max_tokens=12)


def test_each_token_counts_once_in_its_bin_and_once_in_its_source() -> None:
    breakdown = Breakdown(["films", "drones", "unseen"], "cpu")
    breakdown.add(batch(), T, SUMS.requires_grad_())
    sums = breakdown.take()
    assert sums.dtype == torch.float64
    assert not sums.requires_grad
    assert breakdown.metrics(sums) == {
        "loss/t_0.0-0.1": 6.0 / 3,
        "loss/t_0.3-0.4": 1.5 / 3,
        "loss/t_0.9-1.0": 8.0 / 1,  # t = 1 belongs to the last bin
        "loss_by_source/films": 14.0 / 4,
        "loss_by_source/drones": 1.5 / 3,
    }
    assert breakdown.metrics(breakdown.take()) == {}


def test_parts_weighted_by_tokens_are_the_whole_over_steps_and_ranks() -> None:
    ranks = [Breakdown(["a", "b"], "cpu", num_bins=5) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    loss = tokens = 0.0
    for step in range(4):
        for breakdown in ranks:
            sums = torch.rand(6, generator=generator) * (batch().clip_weights > 0)
            t = torch.rand(6, generator=generator)
            breakdown.add(batch((step % 2, 1, 0, 1)), t, sums)
            loss, tokens = loss + sums.double().sum().item(), tokens + 7.0
    summed = sum((breakdown.take() for breakdown in ranks), torch.zeros(()))
    for part in (summed[:, :5], summed[:, 5:7]):
        # Sums of a few dozen float64 terms in another order.
        assert part.sum(dim=1).tolist() == pytest.approx([loss, tokens], rel=1e-12)


def test_adding_reads_nothing_back_from_the_device() -> None:
    """A meta tensor has no values: whoever asks for one gets an error, as a sync would be."""
    breakdown = Breakdown(["a"], "meta")
    breakdown.add(replace(batch()).to("meta"), T.to("meta"), SUMS.to("meta"))
    with pytest.raises(NotImplementedError):  # what torch says of reading a meta tensor
        breakdown.take()


def test_a_loss_that_is_not_a_number_stays_in_its_place() -> None:
    breakdown = Breakdown(["a", "b"], "cpu")
    breakdown.add(batch(), T, torch.tensor([6.0, 0.0, torch.nan, 8.0, 0.0, 0.0]))
    metrics = breakdown.metrics(breakdown.take())
    assert [name for name, value in metrics.items() if value != value] == [
        "loss/t_0.3-0.4",
        "loss_by_source/b",
    ]


def test_names_are_what_a_tracker_takes_and_all_different() -> None:
    sources = ["a/b", "a_b", "a%b", "", "..", "films 2:1", "äöü", "default"]
    names = Breakdown(sources, "cpu", num_bins=4).names
    assert len(set(names)) == 4 + len(sources)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_\-.: ]+/[A-Za-z0-9_\-.: ]+", name)
    assert names[-1] == "loss_by_source/default"
    assert names[0] == "loss/t_0.0-0.25"


def test_sources_may_be_left_out() -> None:
    breakdown = Breakdown([], "cpu", num_bins=1)
    breakdown.add(batch(), T, SUMS)
    assert breakdown.metrics(breakdown.take()) == {"loss/t_0.0-1.0": 15.5 / 7}


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_bins=0.*at least 1"):
        Breakdown([], "cpu", num_bins=0)
