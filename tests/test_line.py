"""The whole line in small, through the real parts: the demo, then each stage as a command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.run.checkpoint import Checkpoints
from framework.run.ledger import read_ledger
from framework.storage import Store
from framework.video import probe

READING = ("clips_per_s", "mb_per_s", "decode_ms", "fetch_ms", "wait_share_worst")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_demo_and_then_each_command_on_its_run(
    small_line: list[str],
    finish: Callable[..., str],
    tmp_path: Path,
) -> None:
    small_line = [*small_line, "cluster.num_workers=1"]
    run = tmp_path / "runs/small"
    printed = finish("framework.demo", *small_line)
    assert "mlflow server" in printed
    check_run(run)
    check_mlflow(f"sqlite:///{tmp_path}/mlflow.db")

    summary = json.loads((run / "summary.json").read_text())
    assert "starting workers" not in finish("framework.demo", *small_line)  # cheap
    assert json.loads((run / "summary.json").read_text())["after"] == summary["after"]

    # The stages as commands; what is there already is not done again.
    assert "96 clips are in" in finish("framework.demo.clips", *small_line)
    assert "imbalance" in finish("framework.data.plan", *small_line)
    assert "all 12 steps are done already" in finish("framework.train", *small_line)
    assert "evaluated already" in finish("framework.evaluate", *small_line)
    check_samples(finish, small_line, run)


def check_run(run: Path) -> None:
    assert len(list((run / "clips").glob("*.tar"))) == 3
    store = Store(run)
    assert sorted(read_ledger(store)) == list(range(12))
    assert Checkpoints(store.child("checkpoints")).committed_steps() == [4, 8, 12]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert set(summary["before"]) == set(summary["after"])
    assert summary["after"]["eval/frechet_random_conv3d"] > 0
    assert 0 <= summary["after"]["eval/prompt_colour"] <= 1
    assert len(list((run / "samples").glob("*.mp4"))) == 9


def check_mlflow(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
    assert found.info.status == "FINISHED"
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in losses] == list(range(12))
    assert found.data.params["train.steps"] == "12"
    reading = {name: found.data.metrics[f"data/{name}"] for name in READING}
    assert all(value >= 0 for value in reading.values()), reading
    assert min(reading["clips_per_s"], reading["mb_per_s"], reading["decode_ms"]) > 0
    assert any(a.path == "samples" for a in client.list_artifacts(found.info.run_id))


def check_samples(finish: Callable[..., str], small_line: list[str], run: Path) -> None:
    text = "a blue cross moves up slowly over navy"
    printed = finish(
        "framework.sample",
        *small_line,
        f'sample.prompts=["{text}"]',
        "sample.num_frames=10",
        "sample.height=40",
        "sample.width=56",
    )
    video = run / "samples/00-a-blue-cross-moves-up-slowly-over-navy.mp4"
    assert str(video) in printed
    info = probe(video.read_bytes())
    assert (info.num_frames, info.height, info.width) == (10, 40, 56)
