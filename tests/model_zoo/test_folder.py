"""A model comes back from its folder as it was, whichever model it is."""

import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from model_zoo.convert import WEIGHTS
from model_zoo.folder import WAN, Network, folder_format, load_model
from model_zoo.models.dit import DiTConfig
from model_zoo.models.dit_original import OriginalDiTConfig
from model_zoo.models.mmdit import MMDiTConfig
from model_zoo.models.uvit import UViTConfig

SIZE = {"hidden_size": 24, "num_heads": 2, "text_max_length": 20, "patch_size": (1, 1, 2)}
NETWORKS = {
    "dit": Network(DiTConfig(**SIZE, ffn=40, depth=2, pooled_text=True), 3, 258, None),
    "dit_wan": Network(DiTConfig(**SIZE, ffn=40, depth=2, qk_norm="width"), 3, None, 10),
    "dit_alternate": Network(
        DiTConfig(**SIZE, ffn=40, depth=2, qk_norm="width", attention_span="alternate"), 3, None, 10
    ),
    "dit_original": Network(
        OriginalDiTConfig(**SIZE, depth=2, text_depth=1, learn_sigma=True), 3, 258, None
    ),
    "mmdit": Network(
        MMDiTConfig(**SIZE, ffn=40, double_depth=1, single_depth=1, rope_axes=(4, 4, 4)),
        3,
        258,
        None,
    ),
    "uvit": Network(UViTConfig(**SIZE, ffn=40, depth=3), 3, None, 10),
}


def write(network: Network, folder: Path) -> torch.nn.Module:
    """A model of moved weights, and its folder."""
    torch.manual_seed(0)
    model = network.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    layout = folder_format(network)
    tensors = {
        name: piece
        for mine, tensor in model.state_dict().items()
        for name, piece in layout.pieces(mine, tensor).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(layout.config))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_gives_the_model_back(make_pack, tmp_path: Path, name: str) -> None:
    network = NETWORKS[name]
    model, again = write(network, tmp_path), load_model(tmp_path)
    assert type(again) is type(model)
    if name != "dit_wan":  # Wan's config.json has no place for what embeddings leave unused
        assert again.config == network.config
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in again.state_dict().items())
    pack = make_pack([(2, 3, 2), (1, 1, 1)], [4, 1], network.token_size, text_dim=network.text_dim)
    t = torch.linspace(0.1, 0.9, pack.num_segments)
    assert torch.equal(
        again(pack.tokens, t, pack, pack.text), model(pack.tokens, t, pack, pack.text)
    )


def test_only_a_wan_is_written_as_one() -> None:
    formats = {name: folder_format(network) for name, network in NETWORKS.items()}
    assert [name for name, layout in formats.items() if layout.wan] == ["dit_wan"]
    assert formats["dit_wan"].config["_class_name"] == WAN
    assert formats["dit"].why_not_wan == "text comes as ids: Wan reads embeddings"
    assert "Wan has 'full'" in formats["dit_alternate"].why_not_wan
    assert formats["uvit"].why_not_wan == "UViT is another model than Wan"


def test_every_model_of_conf_has_a_layout(pytestconfig) -> None:
    known = {
        f"{type(network.config).__module__}.{type(network.config).__qualname__}"
        for network in NETWORKS.values()
    }
    for path in (pytestconfig.rootpath / "conf/model").glob("*.yaml"):
        options = yaml.safe_load(path.read_text())
        if "_target_" in options:  # the sizes of a kind lead to it by their defaults
            assert options["_target_"] in known, path.name


def test_the_kernel_of_attention_does_not_travel() -> None:
    assert "attention" not in folder_format(NETWORKS["uvit"]).config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel' is not known"),
        ({"registers": 4}, "UViT has no registers: a newer version wrote it"),
        ({"depth": 4}, "depth=4 must be odd"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(folder_format(NETWORKS["uvit"]).config | change)
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)


STRANGE = {
    "uvit": {
        "depth": [1e9, 10**9 + 1, [3], "3", True, None, -1],
        "hidden_size": [10**12, [24], {}],
        "num_heads": [10**9, 10**30, 0],
        "text_depth": [10**9],
        "text_max_length": [10**15],
        "patch_size": [2, [1, 2], [1, 2, "x"], [10**9, 1, 1], [[1], 2, 2], [0, 1, 1]],
        "gelu": [3, ["none"], "relu"],
        "channels": [None, [3], 10**12, 0],
        "text_dim": ["ten", 10**12, None],
        "_class_name": [None, ["UViT"], {}],
    },
    "dit": {"rope_theta": ["x", [1], float("inf"), float("nan")], "gate_init": [None]},
    "mmdit": {"double_depth": [10**9], "refiner_depth": [10**9], "rope_axes": [4, [4], ["4"] * 3]},
    "dit_original": {"depth": [10**9], "ffn_ratio": [[1]]},
    "dit_wan": {
        "num_layers": [1e9, 10**9, [2], None, 3],
        "num_attention_heads": [[2], "2", 10**12],
        "attention_head_dim": [10**9, [2]],
        "in_channels": [None, [3], 10**12],
        "text_dim": [10**12, [10]],
        "ffn_dim": [10**12, {}],
        "patch_size": [2, None, [1, 2], [1, 1, [2]], [10**9, 1, 1]],
        "eps": [[1e-6], "x"],
    },
}


@pytest.mark.parametrize("name", STRANGE)
def test_numbers_of_a_stranger_are_a_sentence_at_once(tmp_path: Path, name: str) -> None:
    write(NETWORKS[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, values in STRANGE[name].items():
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
            with pytest.raises(ValueError, match=r"."):
                load_model(tmp_path)
    for key in config.keys() - {"eps", "freq_dim", "qk_norm", "cross_attn_norm", "out_channels"}:
        left = {k: v for k, v in config.items() if k != key}
        (tmp_path / "config.json").write_text(json.dumps(left))
        with contextlib.suppress(ValueError):  # a field with a default may be left out
            load_model(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "7", "{", "", "1" * 9000])
def test_json_of_a_stranger_is_a_sentence_at_once(tmp_path: Path, text: str) -> None:
    write(NETWORKS["uvit"], tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (is not readable JSON|holds no mapping)"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not readable JSON|holds no mapping)"):
        load_model(tmp_path)


def test_tensors_that_are_none_are_a_sentence(tmp_path: Path) -> None:
    write(NETWORKS["uvit"], tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"noise" * 100)
    with pytest.raises(ValueError, match="tensors cannot be read"):
        load_model(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": ["x"]}')
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["uvit", "dit_wan"])
@pytest.mark.parametrize("outside", ["../private", "{tmp_path}/private", "a/private", "..", ""])
def test_an_index_names_no_file_of_another_folder(tmp_path: Path, name: str, outside: str) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    write(NETWORKS[name], folder)
    for private in (tmp_path / "private", folder / "a/private"):
        shutil.copy(folder / WEIGHTS, private)
    weight_map = {"embed.weight": outside.format(tmp_path=tmp_path)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="no file of that folder"):
        load_model(folder)


@dataclass(frozen=True)
class WideConfig(UViTConfig):
    """A model from elsewhere."""

    bold: bool = True


def test_a_model_from_elsewhere_goes_the_same_way(tmp_path: Path) -> None:
    uvit = NETWORKS["uvit"]
    network = replace(uvit, config=WideConfig(**vars(uvit.config), bold=False))
    assert not folder_format(network).is_of_the_zoo
    model = write(network, tmp_path)
    with pytest.raises(ValueError, match="_class_name='Wide' is not known"):
        load_model(tmp_path)
    again = load_model(tmp_path, {"Wide": WideConfig})
    assert isinstance(again.config, WideConfig)
    assert not again.config.bold
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_name_of_the_zoo_is_not_given_twice() -> None:
    uvit = NETWORKS["uvit"]
    double = type("UViTConfig", (UViTConfig,), {})
    with pytest.raises(ValueError, match="UViT is the name of another model"):
        folder_format(replace(uvit, config=double(**vars(uvit.config))))
