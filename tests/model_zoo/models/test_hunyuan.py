"""Our MMDiT against diffusers' HunyuanVideoTransformer3DModel: equal numbers from equal weights.

Theirs is given the mean text embedding as its pooled projection, and no guidance.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from model_zoo.models.mmdit import MMDiTConfig
from model_zoo.patchify import Patch, patchify, unpatchify
from tests.conftest import relative_l2

CHANNELS, TEXT_DIM, HEADS = 3, 10, 2
DOUBLE, SINGLE, REFINER = 2, 2, 2
AXES = {12: (4, 4, 4), 128: (16, 56, 56)}
# Latent sizes (frames, height, width) and text lengths of the clips of a pack.
CLIPS = [((6, 4, 6), 5), ((4, 2, 2), 1), ((4, 8, 2), 7), ((4, 8, 2), 7)]


def reference(head_dim: int, patch: Patch, **options: Any) -> HunyuanVideoTransformer3DModel:
    """Theirs with random weights; what starts at zero, or at one, is moved, so that outputs are
    about 1 at both widths."""
    torch.manual_seed(0)
    noise = 0.5 * (HEADS * head_dim) ** -0.5
    model = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=head_dim,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        num_refiner_layers=REFINER,
        patch_size=patch[1],
        patch_size_t=patch[0],
        guidance_embeds=False,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=AXES[head_dim],
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def our_config(head_dim: int, patch: Patch) -> MMDiTConfig:
    width = HEADS * head_dim
    return MMDiTConfig(
        hidden_size=width,
        ffn=4 * width,
        num_heads=HEADS,
        double_depth=DOUBLE,
        single_depth=SINGLE,
        refiner_depth=REFINER,
        patch_size=patch,
        rope_axes=AXES[head_dim],
    )


# Our layers -> theirs that they are stacked of.
EMBEDDING = {
    "time.0": ("timestep_embedder.linear_1",),
    "time.2": ("timestep_embedder.linear_2",),
    "text.0": ("text_embedder.linear_1",),
    "text.2": ("text_embedder.linear_2",),
}
REFINER_BLOCK = {
    "modulation": ("norm_out.linear",),
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "ffn.0": ("ff.net.0.proj",),
    "ffn.2": ("ff.net.2",),
}
DOUBLE_BLOCK = {
    "video_modulation": ("norm1.linear",),
    "text_modulation": ("norm1_context.linear",),
    "video_qkv.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "text_qkv.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "video_qkv.q_norm": ("attn.norm_q",),
    "video_qkv.k_norm": ("attn.norm_k",),
    "text_qkv.q_norm": ("attn.norm_added_q",),
    "text_qkv.k_norm": ("attn.norm_added_k",),
    "video_out": ("attn.to_out.0",),
    "text_out": ("attn.to_add_out",),
    "video_ffn.up": ("ff.net.0.proj",),
    "video_ffn.down": ("ff.net.2",),
    "text_ffn.up": ("ff_context.net.0.proj",),
    "text_ffn.down": ("ff_context.net.2",),
}
SINGLE_BLOCK = {
    "modulation": ("norm.linear",),
    "qkv.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv.q_norm": ("attn.norm_q",),
    "qkv.k_norm": ("attn.norm_k",),
    "up": ("proj_mlp",),
    "out": ("proj_out",),
}
PLACES = [
    ("condition.", "time_text_embed.", EMBEDDING),
    ("refiner.condition.", "context_embedder.time_text_embed.", EMBEDDING),
    ("refiner.", "context_embedder.", {"embed": ("proj_in",)}),
    *(
        (f"{ours}.{i}.", f"{theirs}.{i}.", layers)
        for ours, theirs, depth, layers in [
            ("refiner.blocks", "context_embedder.token_refiner.refiner_blocks", 2, REFINER_BLOCK),
            ("double_blocks", "transformer_blocks", DOUBLE, DOUBLE_BLOCK),
            ("single_blocks", "single_transformer_blocks", SINGLE, SINGLE_BLOCK),
        ]
        for i in range(depth)
    ),
]


def from_hunyuan(state: Mapping[str, Tensor], patch: Patch) -> dict[str, Tensor]:
    """State (or gradients) of theirs as ours."""
    left, ours = dict(state), {}
    for here, there, layers in PLACES:
        for mine, theirs in layers.items():
            for kind in ("weight", "bias"):
                if f"{there}{theirs[0]}.{kind}" in left:
                    parts = [left.pop(f"{there}{name}.{kind}") for name in theirs]
                    ours[f"{here}{mine}.{kind}"] = torch.cat(parts)
    kernel = left.pop("x_embedder.proj.weight")  # (D, C, pt, ph, pw)
    ours["embed.weight"] = kernel.permute(0, 2, 3, 4, 1).flatten(1)
    ours["embed.bias"] = left.pop("x_embedder.proj.bias")
    for kind in ("weight", "bias"):
        # They scale, then shift; and their channels run slowest within a patch.
        scale, shift = left.pop(f"norm_out.linear.{kind}").chunk(2)
        ours[f"head.modulation.{kind}"] = torch.cat([shift, scale])
        rows = left.pop(f"proj_out.{kind}").unflatten(0, (CHANNELS, *patch)).movedim(0, 3)
        ours[f"head.out.{kind}"] = rows.flatten(0, 3)
    assert not left
    return ours


@pytest.mark.parametrize("given", [False, True], ids=["all_noisy", "first_frame_given"])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("head_dim", [12, 128])
def test_a_pack_is_what_hunyuan_makes_of_each_clip(make_pack, head_dim, patch, given) -> None:
    # Their image-to-video model modulates the first frame by t = 0, as ours does what is given.
    options = {"image_condition_type": "token_replace"} if given else {}
    theirs = reference(head_dim, patch, **options)
    config = our_config(head_dim, patch)
    ours = config.build(CHANNELS * patch[0] * patch[1] * patch[2], None, TEXT_DIM)
    ours.load_state_dict(from_hunyuan(theirs.state_dict(), patch))

    grids = [tuple(n // p for n, p in zip(size, patch, strict=True)) for size, _ in CLIPS]
    texts = [length for _, length in CLIPS]
    pack = make_pack(grids, texts, ours.embed.in_features, text_dim=TEXT_DIM, padding=(4, 3))
    latents = [torch.randn(CHANNELS, *size) for size, _ in CLIPS]
    starts = pack.cu_seqlens.tolist()
    used = starts[len(CLIPS)]
    pack.tokens[:used] = torch.cat([patchify(clip, patch) for clip in latents])
    if given:
        for start, (_, height, width) in zip(starts, grids, strict=False):
            pack.given_mask[start : start + height * width] = True
    t = torch.linspace(0.1, 0.9, pack.num_segments)
    # Theirs modulates the last norm of given tokens by t, which no loss sees.
    upstream = torch.randn_like(pack.tokens) * ~pack.given_mask[:, None]

    together = ours(pack.tokens, t, pack, pack.text)
    (together[:used] * upstream[:used]).sum().backward()
    for i, clip in enumerate(latents):
        text = pack.text[pack.cu_text[i] : pack.cu_text[i + 1]][None]
        mask, time = torch.ones(text.shape[:2]), 1000 * t[i : i + 1]
        out = theirs(clip[None], time, text, mask, text.mean(1), return_dict=False)[0][0]
        here = slice(starts[i], starts[i + 1])
        noisy = ~pack.given_mask[here]
        assert relative_l2(together[here][noisy], patchify(out, patch)[noisy]) < 1e-5
        weight = unpatchify(upstream[here], grids[i], patch, CHANNELS, CLIPS[i][0])
        (out * weight).sum().backward()

    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in from_hunyuan(gradients, patch).items():
        assert relative_l2(ours.get_parameter(name).grad, gradient) < 1e-4, name
