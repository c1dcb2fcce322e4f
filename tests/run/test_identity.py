"""A name finds its run; another config is refused; fresh starts beside it."""

from pathlib import Path

import pytest

from framework.run.identity import (
    Identity,
    RunSection,
    claim,
    generations,
    name_freed_if_refused,
    run_store,
)
from framework.storage import Store


def test_a_run_is_found_again_by_name_and_config(tmp_path: Path) -> None:
    run = RunSection("a", str(tmp_path))
    config = {"train.steps": 3, "cluster.num_workers": 2, "clusters": 1}
    first = claim(run, Identity(config, ["cluster"]))
    assert claim(run, Identity(config)).url == first.url == run_store(run).url
    # Where it computes may change.
    config["cluster.num_workers"] = 8
    assert claim(run, Identity(config, ["cluster"])).url == first.url
    with pytest.raises(ValueError, match="clusters: 1 there, 2 here"):
        claim(run, Identity({**config, "clusters": 2}, ["cluster"]))


def test_another_config_is_refused_by_its_keys(tmp_path: Path) -> None:
    run = RunSection("a", str(tmp_path))
    claim(run, Identity({"train.steps": 3, "optimizer.lr": 0.1}))
    with pytest.raises(ValueError, match=r"train.steps: 3 there, 4 here\n(.|\n)*run.fresh=true"):
        claim(run, Identity({"train.steps": 4, "optimizer.lr": 0.1}))


def test_fresh_starts_beside_it_and_is_then_the_one_that_is_found(tmp_path: Path) -> None:
    run = RunSection("a", str(tmp_path))
    fresh = RunSection("a", str(tmp_path), fresh=True)
    claim(run, Identity({"x": 1}))
    second = claim(fresh, Identity({"x": 2}))
    assert second.url.endswith("/a~2")
    assert claim(run, Identity({"x": 2})).url == second.url
    assert claim(fresh, Identity({"x": 2})).url.endswith("/a~3")
    assert generations(run) == ["a", "a~2", "a~3"]
    assert generations(RunSection("b", str(tmp_path))) == []


def refuse_its_data(store: Store) -> None:
    with name_freed_if_refused(store):
        raise ValueError("no clip can be used")


def test_a_run_whose_data_is_refused_gives_its_name_back(tmp_path: Path) -> None:
    run = RunSection("a", str(tmp_path))
    store = claim(run, Identity({"x": 1}))
    store.write("manifest.json", b"{}")
    store.write("logs/driver.log", b"what went wrong")
    store.write("manifest/manifest.json", b"{}")
    with pytest.raises(ValueError, match="no clip"):
        refuse_its_data(store)
    assert store.list() == ["logs/driver.log", "manifest/manifest.json"]
    assert claim(run, Identity({"x": 2})).url == store.url

    store.write("plan/recipe.json", b"{}")
    with pytest.raises(ValueError, match="no clip"):
        refuse_its_data(store)
    with pytest.raises(ValueError, match="another config"):
        claim(run, Identity({"x": 3}))


@pytest.mark.parametrize("name", ["", "a/b", "a~2", "../a", "a b"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        RunSection(name)


def test_a_run_of_the_old_format_names_the_commit_that_can_finish_it(tmp_path: Path) -> None:
    run = RunSection("a", str(tmp_path))
    store = Store(tmp_path / "a")
    store.write(
        "config.json", b'{"train.steps": 3, "model._target_": "model_zoo.models.dit.DiTConfig"}'
    )
    for open_it in (lambda: claim(run, Identity({"train.steps": 3})), lambda: run_store(run)):
        with pytest.raises(ValueError, match=r"older Longtake; commit [0-9a-f]{7,40} is the last"):
            open_it()
    fresh = RunSection("a", str(tmp_path), fresh=True)
    assert claim(fresh, Identity({"train.steps": 3})).url.endswith("/a~2")
