"""A profile holds the steps that were asked for and their operators, and nothing of others."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from framework.train.observers.profile import Profile, ProfileConfig

CONFIG = ProfileConfig(enabled=True, first_step=2, num_steps=3)


def train(profile: Profile, steps: int) -> None:
    """Steps that are told apart by the range they are marked with."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    for number in range(steps):
        with torch.profiler.record_function(f"step number {number}"):
            model(torch.ones(4, 8)).sum().backward()
        profile.step()


def events(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace) as file:
        return json.load(file)["traceEvents"]


def marked(trace: Path) -> set[str]:
    names = {str(event.get("name")) for event in events(trace)}
    return {name.removeprefix("step number ") for name in names if name.startswith("step number")}


@pytest.mark.parametrize(("first", "num"), [(2, 3), (1, 1)])
def test_the_steps_asked_for_are_recorded(tmp_path: Path, first: int, num: int) -> None:
    config = ProfileConfig(enabled=True, first_step=first, num_steps=num)
    with Profile(config, tmp_path / "profile", rank=0) as profile:
        train(profile, 8)
        trace, table = profile.files  # there as soon as the steps are over
    assert marked(trace) == {str(number) for number in range(first, first + num)}
    assert {"aten::addmm", "aten::tanh"} <= {str(event.get("name")) for event in events(trace)}
    assert "aten::addmm" in table.read_text()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        f"rank-00000-steps-{first}-{first + num - 1}.json.gz",
        f"rank-00000-steps-{first}-{first + num - 1}.txt",
    ]


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    with Profile(CONFIG, tmp_path, rank=0) as profile:
        train(profile, 4)
    trace, _ = profile.files
    assert marked(trace) == {"2", "3"}
    assert "steps-2-3" in trace.name


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_never_comes_there_leaves_nothing(tmp_path: Path, steps: int) -> None:
    with Profile(CONFIG, tmp_path, rank=0) as profile:
        train(profile, steps)
    assert not profile.files
    assert not list(tmp_path.iterdir())


def test_an_error_is_not_hidden_and_another_profile_can_follow(tmp_path: Path) -> None:
    def fail() -> None:
        with Profile(CONFIG, tmp_path, rank=0) as profile:
            train(profile, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    with Profile(CONFIG, tmp_path, rank=0) as profile:
        train(profile, 6)
    assert profile.files


def test_switched_off_or_on_another_rank_nothing_is_made(tmp_path: Path) -> None:
    for config, rank in ((ProfileConfig(first_step=1), 0), (CONFIG, 1)):
        with Profile(config, tmp_path / "profile", rank) as profile:
            train(profile, 6)
        assert not profile.files
    assert not list(tmp_path.iterdir())


def test_all_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    config = ProfileConfig(enabled=True, first_step=1, num_steps=1, all_ranks=True)
    with Profile(config, tmp_path, rank=3) as profile:
        train(profile, 2)
    assert [path.name for path in profile.files] == [
        "rank-00003-steps-1-1.json.gz",
        "rank-00003-steps-1-1.txt",
    ]


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Profile(CONFIG, tmp_path / "file" / "profile", rank=0) as profile:
        train(profile, 6)
    assert not profile.files


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"first_step": 0}, r"first_step=0.*at least 1"), ({"num_steps": 0}, r"num_steps=0.*try 3")],
)
def test_a_mistake_is_named(given: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ProfileConfig(**given)  # type: ignore[arg-type]
