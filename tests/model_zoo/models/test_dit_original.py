"""Our original DiT against diffusers' DiTTransformer2DModel: the same numbers from its weights."""

import pytest
import torch
import yaml
from diffusers import DiTTransformer2DModel
from torch import Tensor

from model_zoo.models.dit_original import OriginalDiTConfig
from model_zoo.patchify import patchify, unpatchify
from model_zoo.text.byte import ByteTextConfig
from tests.conftest import relative_l2

CHANNELS, CLASSES = 3, 7
SIDES = [4, 8, 2, 12]  # latent sides of the images of a pack; diffusers' model is for one side
# Ours -> diffusers', where a tensor has another name only; {i} is a block.
SAME = {
    "embed.bias": "pos_embed.proj.bias",
    "text_stem.weight": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    "time_embedding.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
    "time_embedding.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    "head.modulation": "proj_out_1",
}
SAME_IN_BLOCK = {
    "modulation": "norm1.linear",
    "attention.out": "attn1.to_out.0",
    "ffn.up": "ff.net.0.proj",
    "ffn.down": "ff.net.2",
}


def reference(side: int, head_dim: int, patch: int, learn_sigma: bool) -> DiTTransformer2DModel:
    """Random weights, none of them zero, equal for every side."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS * (1 + learn_sigma),
        num_layers=3,
        sample_size=side,
        patch_size=patch,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,  # DiT's; diffusers' default of 1e-5 is its norms' before the feed-forward
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # By the width, so that outputs are of order one, as the tolerance is meant.
            parameter.add_(torch.randn_like(parameter) * 0.5 * model.inner_dim**-0.5)
    for block in model.transformer_blocks:
        # Each has a copy of the embeddings, which DiT has once; their gradients add up here.
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
        # DiT's frequencies are 10000^(-i/128); diffusers' are 10000^(-i/127).
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()


def ours_from(theirs: dict[str, Tensor], depth: int, patch: int, sigma: bool) -> dict[str, Tensor]:
    """Tensors of diffusers' model, weights or gradients, by our names."""
    names = dict(SAME)
    for i in range(depth):
        for mine, name in SAME_IN_BLOCK.items():
            names[f"blocks.{i}.{mine}"] = f"transformer_blocks.{i}.{name}"
    ours = {}
    for mine, name in names.items():
        if mine.endswith(("weight", "bias")):
            ours[mine] = theirs[name]
        else:
            ours |= {f"{mine}.{kind}": theirs[f"{name}.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        for i in range(depth):
            there = f"transformer_blocks.{i}.attn1.to_"
            ours[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(
                [theirs[f"{there}{which}.{kind}"] for which in "qkv"]
            )
        # Channels: first those of the prediction, then those of sigma, for each place of a patch.
        out = theirs[f"proj_out_2.{kind}"].unflatten(0, (patch**2, 1 + sigma, CHANNELS))
        ours[f"head.out.{kind}"] = out.transpose(0, 1).flatten(0, 2)
    kernel = theirs["pos_embed.proj.weight"]  # (D, C, p, p)
    ours["embed.weight"] = kernel.permute(0, 2, 3, 1).flatten(1)
    return ours


@pytest.mark.parametrize("head_dim", [12, 128])
@pytest.mark.parametrize(("patch", "learn_sigma"), [(1, False), (2, True)])
def test_a_pack_is_what_dit_makes_of_each_image(make_pack, head_dim, patch, learn_sigma):
    references = [reference(side, head_dim, patch, learn_sigma) for side in SIDES]
    config = OriginalDiTConfig(
        hidden_size=2 * head_dim,
        num_heads=2,
        depth=3,
        patch_size=(1, patch, patch),
        learn_sigma=learn_sigma,
    )
    ours = config.build(CHANNELS * patch**2, CLASSES + 1, None)
    state = references[0].state_dict()
    ours.load_state_dict(ours_from(state, config.depth, patch, learn_sigma))

    grids = [(1, side // patch, side // patch) for side in SIDES]
    pack = make_pack(grids, [1] * len(SIDES), CHANNELS * patch**2, CLASSES + 1, padding=(4, 3))
    images = [torch.randn(CHANNELS, 1, side, side) for side in SIDES]
    used = sum(h * w for _, h, w in grids)
    pack.tokens[:used] = torch.cat([patchify(image, config.patch_size) for image in images])
    t = torch.linspace(0.1, 0.9, pack.num_segments)
    upstream = torch.randn_like(pack.tokens)

    together = ours(pack.tokens, t, pack, pack.text)
    (together[:used] * upstream[:used]).sum().backward()
    starts = pack.cu_seqlens.tolist()
    gradients: dict[str, Tensor] = {}
    for i, (image, model) in enumerate(zip(images, references, strict=True)):
        label = pack.text[pack.cu_text[i] : pack.cu_text[i + 1]]
        out = model(image[:, 0][None], 1000 * t[i : i + 1], label, return_dict=False)[0]
        out = out[0, :CHANNELS, None]  # (C, 1, H, W)
        here = slice(starts[i], starts[i + 1])
        assert relative_l2(together[here], patchify(out, config.patch_size)) < 1e-5
        weight = unpatchify(upstream[here], grids[i], config.patch_size, CHANNELS, out.shape[1:])
        (out * weight).sum().backward()
        for key, parameter in model.named_parameters():
            gradients[key] = gradients.get(key, 0) + parameter.grad

    for key, theirs in ours_from(gradients, config.depth, patch, learn_sigma).items():
        assert relative_l2(ours.get_parameter(key).grad, theirs) < 1e-4, key


def test_sigma_is_cut_off_and_gets_no_gradient(make_pack):
    model = OriginalDiTConfig(hidden_size=24, num_heads=2, depth=1, learn_sigma=True).build(
        6, 258, None
    )
    pack = make_pack([(1, 2, 3)], [1], 6)
    out = model(pack.tokens, torch.rand(pack.num_segments), pack, pack.text)
    out.sum().backward()
    assert out.shape == pack.tokens.shape
    prediction, sigma = model.head.out.bias.grad.chunk(2)
    assert (prediction > 0).all()
    assert (sigma == 0).all()


def test_the_real_size_is_dits() -> None:
    """DiT-XL/2 for 256 x 256: 675,129,632 parameters with its 256 fixed positions of 1,152.

    That is what facebookresearch/DiT's train.py logs of itself, as others report (the logs of a
    port to MindSpore, and of SiT-XL/2, which is the same network); diffusers' model of
    facebook/DiT-XL-2-256 has as many, once its copies of the embeddings are left out.
    """
    config = OriginalDiTConfig(hidden_size=1152, num_heads=16, depth=28, learn_sigma=True)
    with torch.device("meta"):
        ours = config.build(2 * 2 * 4, 1001, None)
        theirs = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    embeddings = [block.norm1.emb for block in theirs.transformer_blocks]  # one a block; DiT has 1
    count = _count(theirs) - sum(_count(copy) for copy in embeddings[1:])
    assert _count(ours) == count == 675_129_632 - 256 * 1152


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_small_size(pytestconfig) -> None:
    path = pytestconfig.rootpath / "conf" / "model" / "dit_original_xs.yaml"
    options = yaml.safe_load(path.read_text())
    assert options.pop("defaults") == ["dit_original"]
    with torch.device("meta"):
        model = OriginalDiTConfig(**options).build(144, ByteTextConfig.vocab_size, None)
    assert _count(model) == pytest.approx(2.34e6, abs=5e3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 5}, "hidden_size=24 must be divisible by num_heads=5"),
        ({"hidden_size": 18}, "hidden_size=18 must be divisible by 4"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"patch_size": (1, 0, 2)}, "must be at least 1 in time"),
        ({"text_depth": -1}, "text_depth=-1"),
        ({"gelu": "relu"}, "gelu='relu' is not known"),
        ({"attention": "xformers"}, "attention='xformers' is not known"),
    ],
)
def test_impossible_models_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        OriginalDiTConfig(**{"hidden_size": 24, "num_heads": 2, "depth": 3, **options})


@pytest.mark.parametrize("text_depth", [0, 1])
@pytest.mark.parametrize(("vocab", "dim"), [(None, None), (258, 16)])
def test_text_is_ids_or_embeddings(text_depth, vocab, dim):
    config = OriginalDiTConfig(hidden_size=24, num_heads=2, depth=1, text_depth=text_depth)
    with pytest.raises(ValueError, match="give exactly one"):
        config.build(6, vocab, dim)
