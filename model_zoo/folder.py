"""A model as a folder in diffusers' layout: `config.json` beside safetensors files.

A DiT that is a Wan is written as diffusers' WanTransformer3DModel, which anybody's code loads; any
other model under its own class name, with the fields of its config, the names of its own tensors,
and what `build` wants beside the config. `load_model` reads both. Who writes the files is free:
`folder_format` says what is in them.
"""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.checkpointing import PackedModel
from model_zoo.convert import (
    WanShape,
    check_whole,
    load_wan,
    one_sentence,
    read_json,
    read_tensors,
    wan_config,
    wan_names,
    wan_pieces,
)
from model_zoo.models.dit import DiTConfig
from model_zoo.models.dit_original import OriginalDiTConfig
from model_zoo.models.mmdit import MMDiTConfig
from model_zoo.models.uvit import UViTConfig
from model_zoo.protocols import ModelConfig

WAN = "WanTransformer3DModel"
# A config without "Config" in its name, as config.json calls the model -> the config.
_CONFIGS: dict[str, type] = {
    "DiT": DiTConfig,
    "MMDiT": MMDiTConfig,
    "OriginalDiT": OriginalDiTConfig,
    "UViT": UViTConfig,
}
_BESIDE = ("channels", "text_vocab", "text_dim")


@dataclass(frozen=True)
class Network:
    """A denoiser's config, and what its `build` wants beside it."""

    config: ModelConfig
    channels: int  # of the latents
    text_vocab: int | None  # where text comes as ids
    text_dim: int | None  # where it comes as embeddings

    @property
    def token_size(self) -> int:
        """Values in one patch."""
        return self.channels * prod(self.config.patch_size)

    def build(self) -> PackedModel:
        """The model, on torch's default device, with weights of its own."""
        return self.config.build(self.token_size, self.text_vocab, self.text_dim)

    def num_parameters(self) -> int:
        """Counted without memory for them."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())


@dataclass(frozen=True)
class FolderFormat:
    """How a network lies in a folder: `config` is the content of config.json."""

    config: dict[str, Any]
    wan: WanShape | None = None  # where diffusers can load it
    wan_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of each tensor
    why_not_wan: str = ""  # a sentence

    @property
    def is_of_the_zoo(self) -> bool:
        """Whether `load_model` knows it by itself."""
        return self.config["_class_name"] in (WAN, *_CONFIGS)

    def pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of the model's state as the folder has it: under its name, or as Wan's pieces.

        The pieces hold the tensor's values in its order or, of the patch embedding, in another.
        """
        if self.wan is None:
            return {name: tensor}
        theirs = self.wan_names[name]
        return dict(zip(theirs, wan_pieces(name, tensor, theirs, self.wan), strict=True))


def folder_format(network: Network) -> FolderFormat:
    """As a Wan where it is one, else as our own.

    ValueError where a model from elsewhere has the name of one of this zoo.
    """
    config = network.config
    class_name = type(config).__name__.removesuffix("Config")
    if class_name == WAN or _CONFIGS.get(class_name, type(config)) is not type(config):
        raise ValueError(f"{class_name} is the name of another model; rename {class_name}Config")
    beside = {name: getattr(network, name) for name in _BESIDE}
    options = asdict(config)  # type: ignore[call-overload]  # a kind is a dataclass
    options.pop("attention", None)  # which kernel computes it is up to the machine that loads
    own = {"_class_name": class_name, **beside, **options}
    if type(config) is not DiTConfig:
        return FolderFormat(own, why_not_wan=f"{own['_class_name']} is another model than Wan")
    if network.text_dim is None:
        return FolderFormat(own, why_not_wan="text comes as ids: Wan reads embeddings")
    shape = WanShape(config, network.channels, network.text_dim)
    try:
        return FolderFormat(wan_config(shape), shape, wan_names(shape.config.depth))
    except ValueError as error:
        return FolderFormat(own, why_not_wan=str(error))


def load_model(folder: Path, configs: Mapping[str, type] | None = None) -> nn.Module:
    """The model of a folder, on the CPU, in eval mode.

    ValueError where it is of no known class, or its files are not what such a folder holds.

    configs: of models that are not of this zoo, by name: {"Wide": WideConfig}.
    """
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no config.json: it is no model, or not written to its end"
        )
    content = read_json(folder / "config.json")
    if content.get("_class_name") == WAN:
        return load_wan(folder).eval()
    network = _network(content, {**_CONFIGS, **(configs or {})})
    state = read_tensors(folder)
    with one_sentence(folder):
        with torch.device("meta"):
            model = network.build()
        model.load_state_dict(state, assign=True)
    return model.eval()


def _network(content: Mapping[str, Any], configs: Mapping[str, type]) -> Network:
    """From config.json of our own layout."""
    name = str(content.get("_class_name"))
    if name not in configs:
        raise ValueError(
            f"_class_name={name!r} is not known; there are {', '.join(configs)}, {WAN}"
        )
    config = configs[name]
    unknown = content.keys() - {f.name for f in fields(config)} - {"_class_name", *_BESIDE}
    if unknown:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}: a newer version wrote it")
    options = {
        key: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for key, value in content.items()
        if key not in ("_class_name", *_BESIDE)
    }
    hints = typing.get_type_hints(config)
    for f in fields(config):
        if f.name in options:
            _check_type(f.name, options[f.name], hints[f.name])
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{name}: config.json lacks {f.name}")
    for key in _BESIDE:
        if content.get(key) is not None or key == "channels":
            check_whole(key, content.get(key))
    beside: list[Any] = [content.get(key) for key in _BESIDE]
    return Network(config(**options), *beside)


def _check_type(name: str, value: Any, hint: Any) -> None:
    """ValueError where a value of JSON is plainly not of a field's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return  # a model from elsewhere; its own config says what it takes
    if origin is tuple:
        size = None if args[-1] is Ellipsis else len(args)
        if not isinstance(value, tuple) or size not in (None, len(value)):
            raise ValueError(f"{name}={repr(value)[:80]}: a list of {size or 'any'} is needed")
        for i, item in enumerate(value):
            _check_type(f"{name}[{i}]", item, args[0] if size is None else args[i])
    elif hint is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name}={repr(value)[:80]}: a number is needed")
    elif hint in (int, str, bool) and type(value) is not hint:
        raise ValueError(f"{name}={repr(value)[:80]}: {hint.__name__} is needed")
