"""DiT's own: sizes, checks, checkpointing. Its laws are in test_laws.py."""

import pytest
import torch
import yaml

from model_zoo.checkpointing import CheckpointPolicy
from model_zoo.models.dit import DiTConfig
from model_zoo.text.byte import ByteTextConfig

# Rounded to 10^4; ids are bytes and tokens have 144 values (dit_xs), or embeddings of 4,096 values
# and tokens of 64. Wan's own sizes are 1.42 G, 5.0 G and 14.29 G parameters.
SIZES = {
    "dit_xs": 2.23e6,
    "dit_alternate_xs": 2.23e6,
    "dit_s": 31.32e6,
    "dit_b": 121.62e6,
    "dit_l": 416.17e6,
    "dit_xl": 611.03e6,
    "dit_1b": 1419.00e6,
    "dit_5b": 4999.00e6,
    "dit_14b": 14288.49e6,
}


def load(name: str, conf) -> DiTConfig:
    options = yaml.safe_load((conf / "model" / f"{name}.yaml").read_text())
    assert options.pop("defaults") == ["dit"]
    return DiTConfig(**options | {"patch_size": tuple(options.get("patch_size", (1, 2, 2)))})


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name, pytestconfig):
    config = load(name, pytestconfig.rootpath / "conf")
    sizes = (144, ByteTextConfig.vocab_size, None) if name.endswith("_xs") else (64, None, 4096)
    with torch.device("meta"):
        model = config.build(*sizes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(SIZES[name], abs=5e3)


def test_every_size_has_its_count(pytestconfig):
    paths = (pytestconfig.rootpath / "conf" / "model").glob("*.yaml")
    names = {path.stem for path in paths if "defaults: [dit]" in path.read_text()}
    assert names == set(SIZES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 5}, "hidden_size=24 must be divisible by num_heads=5"),
        ({"num_heads": 6}, "head_dim=4"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"patch_size": (1, 0, 2)}, "must be at least 1 in time"),
        ({"text_depth": -1}, "text_depth=-1"),
        ({"attention": "xformers"}, "attention='xformers' is not known"),
    ],
)
def test_impossible_models_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiTConfig(**{"hidden_size": 24, "ffn": 40, "num_heads": 2, "depth": 3, **options})


def test_checkpoint_policies():
    assert all(CheckpointPolicy("selective").applies(i) for i in range(3))
    applied = [CheckpointPolicy("every_k", 3).applies(i) for i in range(7)]
    assert applied == [True, False, False, True, False, False, True]
    with pytest.raises(ValueError, match="mode='all'"):
        CheckpointPolicy("all")
    with pytest.raises(ValueError, match="every=0"):
        CheckpointPolicy("every_k", 0)
