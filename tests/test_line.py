"""The whole line in small, through the real parts, each stage by its own command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.checkpoint import Checkpoints
from framework.storage import Store
from framework.train.report import read_ledger
from framework.video import probe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_each_stage_is_a_command(
    small_line: list[str], finish: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "runs/small"
    finish("framework.data.synthetic", *small_line)
    assert len(list((run / "clips").glob("*.tar"))) == 3
    assert "96 clips of 3 shards" in finish("framework.data.index", *small_line)
    assert "imbalance" in finish("framework.data.plan", *small_line)
    finish("framework.train", *small_line)
    store = Store(run)
    assert sorted(read_ledger(store)) == list(range(12))
    assert Checkpoints(store.child("checkpoints")).committed_steps()[-1] == 12

    prompt = '"a red circle moves left quickly over grey"'
    printed = finish(
        "framework.sample",
        *small_line,
        f"sample.prompts=[{prompt}]",
        "sample.num_frames=10",
        "sample.height=40",
        "sample.width=56",
    )
    (video,) = (run / "samples").glob("*.mp4")
    assert str(video) in printed
    info = probe(video.read_bytes())
    assert (info.num_frames, info.height, info.width) == (10, 40, 56)

    printed = finish("framework.evaluate", *small_line)
    assert "eval/frechet_random_conv3d" in printed
    metrics = json.loads((run / "evaluation/step-00000012.json").read_text())["metrics"]
    assert metrics["eval/loss"] > 0
    assert 0 <= metrics["eval/prompt_colour"] <= 1


def test_the_demo_ends_in_a_summary_and_a_second_one_is_cheap(
    small_line: list[str], finish: Callable[..., str], tmp_path: Path
) -> None:
    printed = finish("framework.demo", *small_line)
    assert "mlflow" in printed
    run = tmp_path / "runs/small"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert set(summary["before"]) == set(summary["after"])
    assert len(list((run / "samples").glob("*.mp4"))) == 9

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
    assert found.info.status == "FINISHED"
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in losses] == list(range(12))
    assert found.data.params["train.steps"] == "12"
    assert any(a.path == "samples" for a in client.list_artifacts(found.info.run_id))

    again = finish("framework.demo", *small_line)
    assert "starting workers" not in again
    assert json.loads((run / "summary.json").read_text())["after"] == summary["after"]


def test_another_config_under_the_same_name_is_refused(
    small_line: list[str], start: Callable[..., object], finish: Callable[..., str]
) -> None:
    finish("framework.data.synthetic", *small_line)
    finish("framework.data.index", *small_line)
    finish("framework.data.plan", *small_line)
    process = start("framework.data.plan", *small_line, "optimizer.lr=0.5")
    output, _ = process.communicate(timeout=120)  # type: ignore[attr-defined]
    assert process.returncode == 2  # type: ignore[attr-defined]
    assert "optimizer.lr" in output
    assert "Traceback" not in output
