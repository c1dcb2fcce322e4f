"""Weights of others: diffusers' Wan transformers into a `DiT` of the same numbers, and back.

A folder holds `config.json` and safetensors files, whole or in pieces with an index, as diffusers
saves `WanTransformer3DModel`. Only text-to-video models: one with an image encoder is refused. Both
ways are exact; projections are fused or cut apart, and nothing is computed.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_zoo.checks import check_limit
from model_zoo.models.dit import TIME_FEATURES, DiT, DiTConfig
from model_zoo.text_stem import TextEmbeddingStem

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_JSON_BYTES = 64 << 20  # chosen by hand; the index of the largest model takes some MB
_SIZES = ("in_channels", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim")
# Ours -> Wan's, where a tensor has another name only; {i} is a block.
_SAME = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_stem.mlp.up": "condition_embedder.text_embedder.linear_1",
    "text_stem.mlp.down": "condition_embedder.text_embedder.linear_2",
}
_SAME_IN_BLOCK = {
    "attention.out": "attn1.to_out.0",
    "attention.q_norm": "attn1.norm_q",
    "attention.k_norm": "attn1.norm_k",
    "cross_norm": "norm2",
    "cross_attention.q": "attn2.to_q",
    "cross_attention.out": "attn2.to_out.0",
    "cross_attention.q_norm": "attn2.norm_q",
    "cross_attention.k_norm": "attn2.norm_k",
    "ffn.up": "ffn.net.0.proj",
    "ffn.down": "ffn.net.2",
}
# Ours, stacked -> Wan's.
_STACKED_IN_BLOCK = {
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
}


@dataclass(frozen=True)
class WanShape:
    """A Wan transformer as our config, and what `DiTConfig.build` wants beside it."""

    config: DiTConfig
    channels: int  # of the latents
    text_dim: int

    @property
    def token_size(self) -> int:
        """Values in one patch."""
        return self.channels * prod(self.config.patch_size)

    def build(self) -> DiT:
        """The model, with weights of its own."""
        return self.config.build(self.token_size, None, self.text_dim)


def wan_shape(config: Mapping[str, Any]) -> WanShape:
    """From diffusers' `config.json`; ValueError names what is missing or our DiT does not have."""
    for name in (*_SIZES, "num_layers"):
        check_whole(name, config.get(name))
    patch_size = config.get("patch_size")
    if not isinstance(patch_size, list | tuple) or len(patch_size) != 3:
        raise ValueError(f"patch_size={_short(patch_size)}: three whole numbers are needed")
    for number in patch_size:
        check_whole("patch_size", number)
    wanted = {
        "cross_attn_norm": (True,),
        "qk_norm": ("rms_norm_across_heads",),
        "eps": (1e-6,),
        "freq_dim": (TIME_FEATURES,),
        "image_dim": (None,),
        "added_kv_proj_dim": (None,),
        "out_channels": (None, config["in_channels"]),
    }
    for name, values in wanted.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{name}={config[name]!r}: only {values[-1]!r} can be converted")
    heads = config["num_attention_heads"]
    ours = DiTConfig(
        hidden_size=heads * config["attention_head_dim"],
        ffn=config["ffn_dim"],
        num_heads=heads,
        depth=config["num_layers"],
        patch_size=tuple(patch_size),
        qk_norm="width",
    )
    return WanShape(ours, config["in_channels"], config["text_dim"])


def wan_config(shape: WanShape) -> dict[str, Any]:
    """The reverse of `wan_shape`; ValueError where the model has what Wan has not."""
    ours = shape.config
    if ours.qk_norm != "width" or ours.pooled_text or ours.gelu != "tanh":
        raise ValueError("Wan has qk_norm='width', pooled_text=False and gelu='tanh'")
    if ours.rope_theta != 10000.0:
        raise ValueError(f"rope_theta={ours.rope_theta}: Wan has 10000")
    if ours.attention_span != "full":
        raise ValueError(f"attention_span={ours.attention_span!r}: Wan has 'full'")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(ours.patch_size),
        "num_attention_heads": ours.num_heads,
        "attention_head_dim": ours.head_dim,
        "in_channels": shape.channels,
        "out_channels": shape.channels,
        "text_dim": shape.text_dim,
        "freq_dim": TIME_FEATURES,
        "ffn_dim": ours.ffn,
        "num_layers": ours.depth,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    }


def from_wan(state: Mapping[str, Tensor], shape: WanShape) -> dict[str, Tensor]:
    """State of WanTransformer3DModel -> state of our DiT. ValueError names tensors left over."""
    left = dict(state)
    ours: dict[str, Tensor] = {}
    for mine, theirs in _names(shape.config.depth):
        ours[mine] = torch.cat([left.pop(name) for name in theirs])
    kernel = left.pop("patch_embedding.weight")  # (D, C, pt, ph, pw)
    ours["embed.weight"] = kernel.permute(0, 2, 3, 4, 1).flatten(1).contiguous()
    ours["embed.bias"] = left.pop("patch_embedding.bias")
    ours["head.modulation"] = left.pop("scale_shift_table")[0]
    for i in range(shape.config.depth):
        ours[f"blocks.{i}.modulation"] = left.pop(f"blocks.{i}.scale_shift_table")[0]
    if left:
        raise ValueError(
            f"{len(left)} tensors have no place in a DiT: {', '.join(sorted(left)[:3])}"
        )
    return ours


def to_wan(state: Mapping[str, Tensor], shape: WanShape) -> dict[str, Tensor]:
    """State of our DiT -> state of WanTransformer3DModel. ValueError names tensors left over."""
    places = wan_names(shape.config.depth)
    left = sorted(state.keys() - places.keys())
    if left:
        raise ValueError(f"{len(left)} tensors have no place in Wan: {', '.join(left[:3])}")
    return {
        name: piece
        for mine, theirs in places.items()
        for name, piece in zip(theirs, wan_pieces(mine, state[mine], theirs, shape), strict=True)
    }


def wan_names(depth: int) -> dict[str, tuple[str, ...]]:
    """Every tensor of our DiT, and what it becomes in Wan: several where ours is stacked."""
    names = dict(_names(depth))
    names |= {f"embed.{kind}": (f"patch_embedding.{kind}",) for kind in ("weight", "bias")}
    names["head.modulation"] = ("scale_shift_table",)
    for i in range(depth):
        names[f"blocks.{i}.modulation"] = (f"blocks.{i}.scale_shift_table",)
    return names


def wan_pieces(
    mine: str, tensor: Tensor, theirs: tuple[str, ...], shape: WanShape
) -> tuple[Tensor, ...]:
    """One tensor of ours as Wan has it, a piece for each name in `theirs` of `wan_names`."""
    if mine == "embed.weight":  # (D, P) -> (D, C, pt, ph, pw)
        weight = tensor.unflatten(1, (*shape.config.patch_size, shape.channels))
        return (weight.permute(0, 4, 1, 2, 3).contiguous(),)
    if mine.endswith("modulation"):
        return (tensor[None],)
    return tuple(piece.contiguous() for piece in tensor.chunk(len(theirs)))


def load_wan(folder: Path) -> DiT:
    """The model that diffusers saved in `folder`; ValueError where it is none that we have."""
    shape = wan_shape(read_json(folder / "config.json"))
    state = read_tensors(folder)
    with one_sentence(folder):
        with torch.device("meta"):
            model = shape.build()
        model.load_state_dict(from_wan(state, shape), assign=True)
    return model


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; ValueError where it is none, or of more than 64 MiB."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; JSON of a model has at most {MAX_JSON_BYTES}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping")
    return content


def check_whole(name: str, value: object) -> None:
    """ValueError unless it is a whole number from 1 on that a model may have."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={_short(value)}: a whole number from 1 on is needed")
    check_limit("depth" if name == "num_layers" else name, value)


@contextlib.contextmanager
def one_sentence(folder: Path) -> Iterator[None]:
    """Whatever a build or a load raises where config.json and tensors do not fit: a ValueError."""
    try:
        yield
    except (LookupError, TypeError, RuntimeError, ArithmeticError, AttributeError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder}: config.json and the tensors make no model: {words[:300]}"
        ) from error


def _short(value: object) -> str:
    return repr(value)[:80]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, from one file or from the pieces that its index lists.

    ValueError where the index lists a file of another folder, or one is not there or no
    safetensors.
    """
    index = folder / f"{WEIGHTS}.index.json"
    files = [WEIGHTS]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        files = sorted({str(file) for file in weight_map.values()})
        if outside := [file for file in files if file in ("", "..") or Path(file).name != file]:
            raise ValueError(f"{index}: weight_map names {outside[0]!r}, no file of that folder")
    try:
        return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: its tensors cannot be read: {error}") from error


def save_wan(model: DiT, folder: Path) -> None:
    """Write `folder` as diffusers reads it. ValueError where the model is no Wan."""
    if not isinstance(model.text_stem, TextEmbeddingStem):
        raise ValueError("text comes as ids: Wan reads embeddings")
    channels = model.embed.in_features // prod(model.config.patch_size)
    shape = WanShape(model.config, channels, model.text_stem.mlp.up.in_features)
    config = wan_config(shape)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_wan(model.state_dict(), shape), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _names(depth: int) -> list[tuple[str, tuple[str, ...]]]:
    """Our tensors and those of Wan that they are stacked of."""
    layers: list[tuple[str, tuple[str, ...]]] = [(mine, (name,)) for mine, name in _SAME.items()]
    layers.append(("head.out", ("proj_out",)))
    for i in range(depth):
        here = f"blocks.{i}."
        layers += [(here + mine, (here + theirs,)) for mine, theirs in _SAME_IN_BLOCK.items()]
        layers += [
            (here + mine, tuple(here + name for name in theirs))
            for mine, theirs in _STACKED_IN_BLOCK.items()
        ]
    no_bias = ("q_norm", "k_norm")
    return [
        (f"{mine}.{kind}", tuple(f"{name}.{kind}" for name in theirs))
        for mine, theirs in layers
        for kind in ("weight", "bias")
        if kind == "weight" or not mine.endswith(no_bias)
    ]
