"""Every YAML in conf/ composes; mistakes are answered with a sentence and the nearest name."""

import pickle

import pytest

from framework.assembly import Assembly
from framework.config import compose, conf_dir, from_mapping
from framework.mapping import flatten, to_mapping
from framework.train.__main__ import job_of

CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in conf_dir().glob("*/*.yaml")
    if path.parent.name not in ("experiment", "hydra")
)
EXPERIMENTS = sorted(path.stem for path in conf_dir().glob("experiment/*.yaml"))


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes(group: str, name: str) -> None:
    assert compose([f"{group}={name}", "data.shards=/shards"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_a_recipe(name: str) -> None:
    config = compose([f"experiment={name}", "data.shards=/shards"])
    recipe = Assembly.of(config).recipe()
    assert recipe.global_batch_packs >= config.cluster.max_workers
    pickle.loads(pickle.dumps(job_of(config)))


def test_a_config_survives_a_round_trip() -> None:
    config = compose(["experiment=demo", "train.steps=7"])
    assert from_mapping(to_mapping(config)) == config
    assert flatten(to_mapping(config))["train.steps"] == 7


def test_parameter_groups_compose() -> None:
    given = '[{pattern: "blocks.*", lr_scale: 0.5}, {pattern: "*", weight_decay: 0}]'
    config = compose(["experiment=demo", f"optimizer.groups={given}"])
    first, second = config.optimizer.groups
    assert (first.pattern, first.lr_scale, first.weight_decay) == ("blocks.*", 0.5, None)
    assert (second.pattern, second.lr_scale, second.weight_decay) == ("*", 1.0, 0.0)
    assert from_mapping(to_mapping(config)) == config


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
        ("model.widht=64", "did you mean model.width?"),
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
        ("model._target_=model_zoo.dit.DiT", "not a frozen config dataclass"),
        ("model._target_=model_zoo.nothing.Config", "No module named"),
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
