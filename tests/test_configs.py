"""Every YAML in conf/ composes; mistakes are answered with a sentence and the nearest name."""

import json
import pickle

import pytest

from framework.assembly import Assembly
from framework.config import GROUPS, RunConfig, compose, conf_dir, from_flat
from framework.train.job import Job

CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in conf_dir().glob("*/*.yaml")
    if path.parent.name not in ("experiment", "hydra")
)
EXPERIMENTS = sorted(path.stem for path in conf_dir().glob("experiment/*.yaml"))


# Kinds that have no sizes of their own: the other files of their group begin with them.
BARE = {("model", name) for name in ("dit", "dit_original", "mmdit", "uvit")}


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes(group: str, name: str) -> None:
    overrides = [f"{group}={name}", "data.shards=/shards"]
    if (group, name) in BARE:
        with pytest.raises(ValueError, match=r"model\.\w+: a value is needed"):
            compose(overrides)
    else:
        assert compose(overrides).choices.get(group, name) == name


def stored_and_read(config: RunConfig) -> RunConfig:
    """By way of JSON, as a run's folder keeps it."""
    return from_flat(json.loads(json.dumps(dict(config.identity.values))))


def test_a_config_is_known_by_names_alone() -> None:
    config = compose(["experiment=demo", "model=mmdit_xs", "sampler=heun"])
    values = config.identity.values
    assert (config.choices["model"], config.kinds["model"]) == ("mmdit_xs", "mmdit")
    assert {name: values[f"{name}.kind"] for name in GROUPS} == config.kinds
    assert config.identity.parameters()["model"] == "mmdit_xs"
    text = json.dumps(dict(values))
    assert not [word for word in ("_target_", "Config", "framework.", "model_zoo.") if word in text]


def test_what_is_free_says_so_itself() -> None:
    config = compose(["experiment=demo"])
    elsewhere = compose(
        [
            "experiment=demo",
            *("cluster.num_workers=1", "tracking=none", "sampler=heun", "evaluate.num_prompts=3"),
            *("model.attention=dense", "engine.stage=1", "engine.overlap_comm=false"),
            *("train.activation_checkpointing.mode=full", "train.log_every=3"),
            *("data.stream.max_tasks=3", "data.exclude=/x", "hardware.mfu=0.3", "run.root=/y"),
        ]
    )
    data = {"data.shards": "runs/demo/clips", "data.manifest": "runs/demo/manifest"}  # below root
    there = {**elsewhere.identity.values, **data}
    assert config.identity.differences(there) == []
    for override in (
        *("engine.dtype=bf16", "engine.ema_decay=0.9", "data.global_batch_packs=4", "run.seed=1"),
        *("data.max_tokens=512", "model.depth=7", "objective.shift=1", "optimizer.lr=1e-4"),
        *("train.steps=901", "train.deterministic=true", "codec=identity", "model=uvit_xs"),
    ):
        other = compose(["experiment=demo", override])
        assert config.identity.differences(other.identity.values), override


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_a_recipe(name: str) -> None:
    config = compose([f"experiment={name}", "data.shards=/shards"])
    recipe = Assembly.of(config).recipe()
    assert recipe.global_batch_packs >= config.cluster.max_workers
    pickle.loads(pickle.dumps(Job.of(config)))


def test_a_config_survives_a_round_trip() -> None:
    config = compose(["experiment=demo", "train.steps=7"])
    assert stored_and_read(config) == config
    assert config.identity.values["train.steps"] == 7


def test_parameter_groups_compose() -> None:
    given = '[{pattern: "blocks.*", lr_scale: 0.5}, {pattern: "*", weight_decay: 0}]'
    config = compose(["experiment=demo", f"optimizer.groups={given}"])
    first, second = config.optimizer.groups
    assert (first.pattern, first.lr_scale, first.weight_decay) == ("blocks.*", 0.5, None)
    assert (second.pattern, second.lr_scale, second.weight_decay) == ("*", 1.0, 0.0)
    assert stored_and_read(config) == config


def test_a_field_that_no_yaml_lists_can_be_overridden() -> None:
    assert compose(["train.keep_checkpoints=9"]).train.keep_checkpoints == 9


def test_a_number_may_stand_for_a_name() -> None:
    config = compose(["run.name=2024", "evaluate.checkpoint=200", "sample.checkpoint=7"])
    assert (config.run.name, config.evaluate.checkpoint) == ("2024", "200")
    assert config.sample.checkpoint == "7"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.setps=3", "train.setps: no such key; did you mean train.steps?"),
        ("trian.steps=3", "trian: no such key; did you mean train?"),
        ("model.hiden_size=64", "did you mean model.hidden_size?"),
        (
            "optimizer.groups=[{patern: x}]",
            r"groups\[0\].patern: no such key; did you mean optimizer.groups\[0\].pattern",
        ),
        ("train.steps=many", "train.steps='many': int is needed, not str"),
        ("train.steps=true", "int is needed, not bool"),
        ("train.steps=0", "steps=0 must be at least 1"),
        ("data.views.sizes=[[32,32,3]]", r"data.views.sizes\[0\].*exactly 2 values"),
        ("data.views=3", "a mapping is needed"),
        ("model.num_heads=3", "divisible by num_heads"),
        ("model._target_=os.system", "only names under framework. and model_zoo. are built"),
        ("model._target_=model_zoo.models.dit.DiT", "no file of conf/model/ states it"),
        ("model.kind=mmdit", "model.kind: no such key; choose one of conf/model/"),
        ("kinds.model=mmdit", "kinds: no such key"),
        ("packages=[no_such_package]", "there is no package 'no_such_package'"),
        ("run.name=a/b", "letters, digits"),
        ("run.name=true", "str is needed, not bool"),
    ],
)
def test_a_mistake_is_named(override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compose([override])


def test_an_impossible_combination_fails_on_the_driver() -> None:
    config = compose(["data.views.sizes=[[33,32]]"])
    with pytest.raises(ValueError, match="divisible"):
        Assembly.of(config).recipe()
