"""A checkpoint is evaluated once for equal settings, and only by the network it was trained for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.assembly import Assembly
from framework.config import RunConfig, compose
from framework.data.config import IndexConfig, SyntheticConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.data.manifest.table import read_manifest
from framework.data.shards.tar import write_shards
from framework.demo.clips.moving_shapes import shard_samples
from framework.evaluate.evaluate import Evaluation, evaluated, missed_gates, sample_metrics
from framework.run.checkpoint import Checkpoints
from framework.run.sharded_state import save_state, shapes_of
from framework.storage import Store
from framework.trained import load_trained

SHARD = "shard-000000.tar"


@pytest.fixture
def config(small_line: list[str], tmp_path: Path) -> RunConfig:
    """A small line on 24 indexed clips, half of them held out."""
    config = compose(
        [
            *small_line,
            "model.depth=1",
            "evaluate.num_prompts=3",
            "evaluate.validation_packs=4",
            "sampler.num_steps=1",
        ]
    )
    clips = SyntheticConfig(num_clips=24, still_share=0.1)
    write_shards(Store(config.data.shards), shard_samples(clips, 0), 24)
    chosen = IndexConfig(heldout_fraction=0.5)
    found = {SHARD: index_shard(config.data.shards, SHARD, chosen)}
    write_index(config.data.shards, config.data.manifest, found, chosen)
    return config


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Store:
    """The run's folder with a committed checkpoint of step 100: the untrained model plus 1."""
    run = Store(tmp_path / "runs/small")
    model = Assembly.of(config).build_model()
    checkpoints = Checkpoints(run.child("checkpoints"))
    weights = {name: p.detach().flatten() for name, p in model.named_parameters()}
    state = {f"weights.{name}": w for name, w in weights.items()}
    state |= {f"ema.{name}": w + 1 for name, w in weights.items()}
    save_state(state, shapes_of(model), checkpoints.begin(100))
    checkpoints.commit(100, {"config": dict(config.identity.values)})
    return run


def evaluation(
    config: RunConfig, run: Store, which: str = "latest", **changes: Any
) -> tuple[Evaluation, list[str]]:
    said: list[str] = []
    found = evaluated(
        Assembly.of(config),
        run,
        replace(config.evaluate, **changes),
        config.sampler,
        which,
        said.append,
    )
    return found, said


def is_computed(said: list[str]) -> bool:
    return any(text.startswith("validation loss") for text in said)


def test_an_evaluation_is_kept_with_what_it_depends_on(config: RunConfig, run: Store) -> None:
    first, said = evaluation(config, run)
    assert is_computed(said)
    assert first.step == 100
    assert first.metrics["eval/frechet_num_videos"] == 3
    kept = json.loads(run.read("evaluation/step-00000100.json"))
    assert kept["metrics"] == first.metrics
    assert kept["settings"]["checkpoint"].endswith("small/checkpoints/step-00000100")
    assert kept["settings"]["sampler.num_steps"] == 1

    again, said = evaluation(config, run, "100", gates={"eval/loss": 1.0}, checkpoint="100")
    assert again == first
    assert not is_computed(said)

    assert is_computed(evaluation(config, run, seed=5)[1])
    assert is_computed(evaluation(config, run)[1])  # the other settings have taken its place
    assert evaluation(config, run, "init")[0].step == 0
    evaluation(config, run, weights="weights")
    assert run.list("evaluation") == [
        "evaluation/init.json",
        "evaluation/step-00000100-weights.json",
        "evaluation/step-00000100.json",
    ]


def test_a_new_metric_is_not_read_from_before(
    config: RunConfig, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation(config, run)
    metrics = {**sample_metrics(), "count": lambda samples: {"count": len(samples)}}
    monkeypatch.setattr("framework.evaluate.evaluate.sample_metrics", lambda: metrics)
    found, said = evaluation(config, run)
    assert is_computed(said)
    assert found.metrics["eval/count"] == 3


def test_a_clip_that_cannot_be_read_is_skipped_by_name(config: RunConfig, run: Store) -> None:
    footage = replace(config, data=replace(config.data, synthetic=None))
    whole, said = evaluation(footage, run)
    assert not [text for text in said if "skipped" in text]
    table = read_manifest(config.data.manifest).table.sort_by("clip_id")
    clip = next(c for c in table.to_pylist() if c["split"] == "heldout" and c["num_frames"] > 1)
    store = Store(config.data.shards)
    data = bytearray(store.read(SHARD))
    data[clip["offset"] : clip["offset"] + clip["size_bytes"]] = bytes(clip["size_bytes"])
    store.write(SHARD, bytes(data))
    found, said = evaluation(footage, run, seed=2)
    assert any(text.startswith(f"skipped {clip['key']}: ") for text in said)
    assert found.metrics["eval/frechet_num_videos"] == whole.metrics["eval/frechet_num_videos"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"rope_theta": 10000.0}}, r"model\.rope_theta: 100\.0 there, 10000\.0 here"),
        ({"text": {"multiple_of": 32}}, r"text\.multiple_of: 16 there, 32 here"),
        ({"objective": {"precondition": False}}, r"objective\.precondition: True there"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    config: RunConfig, run: Store, change: dict[str, dict[str, Any]], sentence: str
) -> None:
    parts = {name: replace(getattr(config, name), **fields) for name, fields in change.items()}
    other = Assembly.of(replace(config, **parts))
    with pytest.raises(ValueError, match=sentence):
        load_trained(other, run, "latest", "ema")


def test_loading_takes_the_asked_weights_to_the_device(config: RunConfig, run: Store) -> None:
    assembly = Assembly.of(replace(config, model=replace(config.model, attention="sdpa")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    init, step = load_trained(assembly, run, "init", "ema")
    assert step == 0
    for weights, shift in (("weights", 0.0), ("ema", 1.0)):
        model, step = load_trained(assembly, run, "100", weights)
        assert step == 100
        assert not model.training
        for p, start in zip(model.parameters(), init.parameters(), strict=True):
            assert p.device.type == start.device.type == device
            assert torch.equal(p, start + shift)


def test_gates_that_are_missed_are_named() -> None:
    before = {"eval/loss": 0.5, "eval/prompt_colour": 0.1}
    after = {"eval/loss": 0.3, "eval/prompt_colour": 0.8}
    assert missed_gates({"eval/prompt_colour": 0.8}, before, after) == []
    (sentence,) = missed_gates({"eval/prompt_colour": 0.9}, before, after)
    assert sentence == "eval/prompt_colour 0.800 is below 0.9"
    (sentence,) = missed_gates({"eval/prompt_color": 0.5}, before, after)
    assert sentence.startswith("eval/prompt_color is no metric; there are eval/loss, ")
    for loss in (0.5, float("nan")):
        (sentence,) = missed_gates({}, before, {**after, "eval/loss": loss})
        assert "is not below the 0.5000 before training" in sentence
