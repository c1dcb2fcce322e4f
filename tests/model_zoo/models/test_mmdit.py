"""MMDiT's own: sizes and checks. Its laws are in test_laws.py, its proof in test_hunyuan.py."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from framework.config import compose
from model_zoo.layers import Modulation
from model_zoo.models.mmdit import MMDiTConfig
from model_zoo.text.byte import ByteTextConfig

# Rounded to 10^4; ids are bytes and tokens have 144 values (mmdit_xs), or embeddings of 4,096
# values and tokens of 64.
SIZES = {
    "mmdit_xs": 2.65e6,
    "mmdit_s": 49.01e6,
    "mmdit_b": 185.89e6,
    "mmdit_13b": 12821.01e6,
}


def load(name: str) -> MMDiTConfig:
    return compose([f"model={name}", "data.shards=/shards"]).model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    sizes = (144, ByteTextConfig.vocab_size, None) if name == "mmdit_xs" else (64, None, 4096)
    with torch.device("meta"):
        model = load(name).build(*sizes)
    assert num_parameters(model) == pytest.approx(SIZES[name], abs=5e3)


def test_every_size_has_its_count(pytestconfig):
    names = {path.stem for path in (pytestconfig.rootpath / "conf" / "model").glob("mmdit_*.yaml")}
    assert names == set(SIZES)


def test_the_largest_is_hunyuan_video():
    """Their defaults are the published model; its pooled text comes from CLIP, ours from 4,096."""
    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(guidance_embeds=False, pooled_projection_dim=4096)
        ours = load("mmdit_13b").build(64, None, 4096)
    assert num_parameters(ours) == num_parameters(theirs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 5}, "hidden_size=24 must be divisible by num_heads=5"),
        ({"rope_axes": (4, 4, 2)}, r"rope_axes=\(4, 4, 2\) must be even .* head_dim=12"),
        ({"rope_axes": (6, 3, 3)}, "must be even"),
        ({"rope_axes": (16, -2, -2)}, "must be even"),
        ({"double_depth": 0}, "double_depth=0 must be at least 1"),
        ({"single_depth": 0}, "single_depth=0 must be at least 1"),
        ({"refiner_depth": 0}, "refiner_depth=0 must be at least 1"),
        ({"patch_size": (1, 0, 2)}, "must be at least 1 in time"),
        ({"text_depth": -1}, "text_depth=-1"),
        ({"gelu": "erf"}, "gelu='erf' is not known"),
        ({"attention": "xformers"}, "attention='xformers' is not known"),
    ],
)
def test_impossible_models_are_refused(options, sentence):
    small = {"hidden_size": 24, "ffn": 40, "num_heads": 2, "double_depth": 1, "single_depth": 1}
    with pytest.raises(ValueError, match=sentence):
        MMDiTConfig(**{**small, "rope_axes": (4, 4, 4), **options})


def test_modulation_starts_as_nothing_but_its_gates():
    modulation = Modulation(4, 6, gates=(2, 5), gate_init=0.3)
    starts = modulation(torch.randn(2, 4))[:, 0, 0]
    assert torch.equal(starts, torch.tensor([0, 0, 0.3, 0, 0, 0.3]))
