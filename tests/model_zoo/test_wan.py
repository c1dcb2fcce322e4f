"""Our DiT against diffusers' WanTransformer3DModel: the same numbers from the same weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from model_zoo.convert import (
    WEIGHTS,
    WanShape,
    from_wan,
    load_wan,
    save_wan,
    to_wan,
    wan_config,
    wan_shape,
)
from model_zoo.models.dit import DiTConfig
from model_zoo.patchify import patchify, unpatchify
from tests.conftest import relative_l2

CHANNELS, TEXT_DIM = 3, 10
# Latent sizes (frames, height, width) and text lengths of the clips of a pack.
CLIPS = [((3, 4, 6), 5), ((1, 2, 2), 1), ((5, 8, 2), 7)]


def reference(head_dim: int, **options) -> WanTransformer3DModel:
    """Wan with random weights; what starts at zero, or at one, is moved."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        ffn_dim=40,
        num_layers=3,
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("head_dim", [12, 128])
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1)])
def test_a_pack_is_what_wan_makes_of_each_clip(make_pack, head_dim: int, patch) -> None:
    wan = reference(head_dim, patch_size=patch)
    shape = wan_shape(wan.config)
    ours = shape.build()
    ours.load_state_dict(from_wan(wan.state_dict(), shape))

    grids = [tuple(n // p for n, p in zip(size, patch, strict=True)) for size, _ in CLIPS]
    texts = [length for _, length in CLIPS]
    pack = make_pack(grids, texts, shape.token_size, text_dim=TEXT_DIM, padding=(4, 3))
    latents = [torch.randn(CHANNELS, *size) for size, _ in CLIPS]
    used = sum(f * h * w for f, h, w in grids)
    pack.tokens[:used] = torch.cat([patchify(clip, patch) for clip in latents])
    t = torch.linspace(0.1, 0.9, pack.num_segments)
    upstream = torch.randn_like(pack.tokens)

    together = ours(pack.tokens, t, pack, pack.text)
    (together[:used] * upstream[:used]).sum().backward()
    starts = pack.cu_seqlens.tolist()
    for i, clip in enumerate(latents):
        text = pack.text[pack.cu_text[i] : pack.cu_text[i + 1]]
        out = wan(clip[None], 1000 * t[i : i + 1], text[None], return_dict=False)[0][0]
        here = slice(starts[i], starts[i + 1])
        assert relative_l2(together[here], patchify(out, patch)) < 1e-5
        weight = unpatchify(upstream[here], grids[i], patch, CHANNELS, CLIPS[i][0])
        (out * weight).sum().backward()

    gradients = {name: parameter.grad for name, parameter in wan.named_parameters()}
    for name, gradient in from_wan(gradients, shape).items():
        assert relative_l2(ours.get_parameter(name).grad, gradient) < 1e-4, name


def test_both_ways_are_exact_and_whole() -> None:
    wan = reference(12)
    shape = wan_shape(wan.config)
    state = wan.state_dict()
    back = to_wan(from_wan(state, shape), shape)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("piece", ["10GB", "50KB"])
def test_folders_of_either_are_read(tmp_path: Path, piece: str) -> None:
    wan = reference(12)
    wan.save_pretrained(tmp_path / "theirs", max_shard_size=piece)
    ours = load_wan(tmp_path / "theirs")
    save_wan(ours, tmp_path / "ours")
    config = WanTransformer3DModel.load_config(tmp_path / "ours")
    again = WanTransformer3DModel.from_config(config)
    again.load_state_dict(load_file(tmp_path / "ours" / WEIGHTS))
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wan.state_dict().items())


def test_real_sizes_are_wans(pytestconfig) -> None:
    """Wan 2.1 1.3B as published: its config.json, and 1,418,996,800 parameters."""
    published = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    with torch.device("meta"):
        wan = WanTransformer3DModel(**published)
        ours = wan_shape(wan.config).build()
    counts = [sum(p.numel() for p in model.parameters()) for model in (wan, ours)]
    assert counts == [1_418_996_800] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_dim": 1280}, "image_dim=1280"),
        ({"added_kv_proj_dim": 64}, "added_kv_proj_dim=64"),
        ({"qk_norm": None}, "qk_norm=None"),
        ({"out_channels": 8}, "out_channels=8"),
    ],
)
def test_other_models_are_refused_by_name(change: dict, words: str) -> None:
    config = json.loads(json.dumps(wan_config(WanShape(_config(), CHANNELS, TEXT_DIM))))
    with pytest.raises(ValueError, match=words):
        wan_shape(config | change)


@pytest.mark.parametrize(
    "option",
    [
        {"qk_norm": "head"},
        {"pooled_text": True},
        {"gelu": "none"},
        {"rope_theta": 100.0},
        {"attention_span": "alternate"},
    ],
)
def test_what_wan_has_not_cannot_become_wan(option: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Wan has"):
        save_wan(_config(**option).build(12, None, TEXT_DIM), tmp_path)
    with pytest.raises(ValueError, match="Wan reads embeddings"):
        save_wan(_config().build(12, 258, None), tmp_path)


def test_tensors_without_a_place_are_named() -> None:
    wan = reference(12)
    state = wan.state_dict() | {"blocks.0.attn2.add_k_proj.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 tensors have no place.*add_k_proj"):
        from_wan(state, wan_shape(wan.config))


def _config(**options) -> DiTConfig:
    return DiTConfig(
        **{"hidden_size": 24, "ffn": 40, "num_heads": 2, "depth": 1, "qk_norm": "width"} | options
    )
