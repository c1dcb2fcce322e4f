"""What every Denoiser must do: the original DiT, U-ViT and the DiT of factorised attention."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from framework.batch import PackedBatch
from model_zoo.dit import DiTConfig
from model_zoo.dit_original import OriginalDiTConfig
from model_zoo.flops import cost_coefficients, forward_flops
from model_zoo.layers import CheckpointPolicy
from model_zoo.uvit import UViTConfig

SIZE = {"width": 24, "num_heads": 2, "text_max_length": 16}
CONFIGS: dict[str, Any] = {
    "dit_alternate": DiTConfig(ffn=40, depth=4, attention_span="alternate", **SIZE),
    "dit_original": OriginalDiTConfig(depth=3, text_depth=1, learn_sigma=True, **SIZE),
    "dit_original_labels": OriginalDiTConfig(depth=3, text_depth=0, **SIZE),
    "uvit": UViTConfig(ffn=40, depth=5, **SIZE),
}
TIME_IS_A_TOKEN = ("uvit",)  # whose given tokens are marked instead of modulated with t = 0

GRIDS = [(2, 3, 2), (1, 1, 1), (3, 2, 4), (3, 2, 4), (2, 1, 5)]
TEXT = [4, 1, 0, 6, 3]  # the third clip has no text
P = 6


def build(name: str, text_dim: int | None = None) -> nn.Module:
    """A small model in which nothing is zero any more, so that something comes out."""
    torch.manual_seed(0)
    model = CONFIGS[name].build(P, None if text_dim else 258, text_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def times(pack: PackedBatch) -> torch.Tensor:
    return torch.linspace(0.05, 0.95, pack.num_segments)


def run(model: nn.Module, pack: PackedBatch, t: torch.Tensor | None = None) -> torch.Tensor:
    return model(pack.tokens, times(pack) if t is None else t, pack, pack.text)


def subset(pack: PackedBatch, segments: list[int]) -> PackedBatch:
    """The pack of these segments alone, in this order."""
    video, text = list(pairwise(pack.cu_seqlens.tolist())), list(pairwise(pack.cu_text.tolist()))

    def cut(x: torch.Tensor, ends: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([x[slice(*ends[s])] for s in segments])

    def cumulated(ends: list[tuple[int, int]]) -> torch.Tensor:
        lengths = [ends[s][1] - ends[s][0] for s in segments]
        return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    return replace(
        pack,
        tokens=cut(pack.tokens, video),
        given_mask=cut(pack.given_mask, video),
        cu_seqlens=cumulated(video),
        text=cut(pack.text, text),
        cu_text=cumulated(text),
        **{
            name: getattr(pack, name)[segments]
            for name in ("grid", "clip_ids", "clip_weights", "source", "fps")
        },
    )


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(params=[None, 10], ids=["ids", "embeddings"])
def text_dim(request):
    return request.param


@pytest.mark.parametrize("mode", ["none", "full", "every_k"])
def test_a_pack_equals_its_clips_one_at_a_time(make_pack, name, text_dim, mode):
    model, single = build(name, text_dim), build(name, text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5))
    pack.given_mask[::5] = True
    upstream = torch.randn_like(pack.tokens)

    model.set_checkpointing(CheckpointPolicy(mode, every=2))
    together = run(model, pack)
    (together * upstream).sum().backward()

    outputs, start = [], 0
    for segment in range(pack.num_segments):
        clip = subset(pack, [segment])
        out = run(single, clip, times(pack)[segment : segment + 1])
        (out * upstream[start : start + out.shape[0]]).sum().backward()
        outputs.append(out)
        start += out.shape[0]

    # float32 sums in another order
    torch.testing.assert_close(together, torch.cat(outputs), atol=1e-5, rtol=1e-4)
    for (which, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
        assert one.grad is not None, which
        difference = (one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-6)
        assert difference < 1e-4, (which, difference)


def test_order_inside_a_pack_does_not_matter(make_pack, name, text_dim):
    model = build(name, text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5))
    order = [3, 0, 6, 4, 1, 5, 2]
    shuffled = subset(pack, order)
    expected = subset(replace(pack, tokens=run(model, pack)), order).tokens
    out = run(model, shuffled, times(pack)[order])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["tokens", "text", "t"])
def test_a_nan_reaches_no_other_clip(make_pack, name, where):
    model = build(name, text_dim=10)
    pack = make_pack(GRIDS, TEXT, P, text_dim=10, padding=(3, 5))
    clean, t, sick = run(model, pack), times(pack), pack.segment_ids == 3
    if where == "tokens":
        pack.tokens[sick] = float("nan")
    elif where == "text":
        pack.text[pack.cu_text[3] : pack.cu_text[4]] = float("nan")
    else:
        t[3] = float("nan")
    out = run(model, pack, t)
    assert out[sick].isnan().all()
    torch.testing.assert_close(out[~sick], clean[~sick], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("grids", "text_lengths", "padding"),
    [([(2, 3, 2)], [0], (0, 0)), ([(0, 0, 0)], [3], (0, 4)), ([(1, 1, 1)], [2], (5, 0))],
    ids=["no text at all", "no video at all", "padding without text"],
)
def test_all_modules_run_whatever_there_is(make_pack, name, text_dim, grids, text_lengths, padding):
    """Under ZeRO-3 a rank whose pack lacks something must still gather what the others gather."""
    model = build(name, text_dim)
    pack = make_pack(grids, text_lengths, P, text_dim=text_dim, padding=padding)
    ran = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: ran.add(module))
    out = run(model, pack)
    assert out.isfinite().all()
    silent = {module for module in model.modules() if not isinstance(module, nn.ModuleList)} - ran
    assert not silent


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in TIME_IS_A_TOKEN])
def test_given_tokens_are_modulated_as_at_time_zero(make_pack, name):
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P)
    clip = pack.segment_ids == 2
    given, t = replace(pack, given_mask=clip), times(pack)
    at_zero = t.clone()
    at_zero[2] = 0
    torch.testing.assert_close(run(model, given, t), run(model, pack, at_zero))
    assert not torch.allclose(run(model, given, t)[clip], run(model, pack, t)[clip])


def test_time_text_position_and_given_tokens_matter(make_pack, name):
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P)
    out = run(model, pack)
    assert not torch.allclose(out, run(model, pack, times(pack).flip(0)))
    assert not torch.allclose(out, run(model, replace(pack, text=pack.text.flip(0))))
    turned = replace(pack, grid=pack.grid[:, [0, 2, 1]])
    assert not torch.allclose(out, run(model, turned))
    # One given token of a clip: the others see it otherwise than before.
    given = replace(pack, given_mask=torch.arange(pack.tokens.shape[0]) == 0)
    changed = (run(model, given) - out).abs().amax(-1) > 1e-6
    assert changed[: pack.cu_seqlens[1]].all()
    assert not changed[pack.cu_seqlens[1] :].any()


def test_the_output_starts_at_zero(make_pack, name):
    torch.manual_seed(0)
    model = CONFIGS[name].build(P, 258, None)
    assert run(model, make_pack(GRIDS, TEXT, P)).abs().max() == 0


def test_the_same_seed_gives_the_same_weights(name):
    one, other = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_bf16_is_close_to_float32(make_pack, name, text_dim):
    model = build(name, text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5))
    exact = run(model, pack)
    half = run(model.bfloat16(), pack)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(build(name, text_dim), pack)
    assert half.dtype == mixed.dtype == torch.float32
    # bf16 keeps 8 bits; errors of .4 % add up over the blocks.
    for out in (half, mixed):
        assert (out - exact).norm() / exact.norm() < 0.03


def test_learns_one_pack(make_pack, name):
    torch.manual_seed(0)
    model = CONFIGS[name].build(P, 258, None)
    pack = make_pack(GRIDS, TEXT, P)
    target = torch.randn_like(pack.tokens)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        loss = (run(model, pack) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_work_equals_the_counter(make_pack, name, text_dim):
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim)
    # The CPU's fused attention is unknown to the counter; its plain form is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(build(name, text_dim), pack)
    # Two more segments, empty ones, have no tokens but still a time.
    work = CONFIGS[name].work(P, text_dim)
    grids = [*GRIDS, (0, 0, 0), (0, 0, 0)]
    assert counter.get_total_flops() == forward_flops(work, grids, [*TEXT, 0, 0])


def test_cost_coefficients_give_the_difference_between_two_clips(name):
    work = CONFIGS[name].work(P, None)
    # Without attention inside a step or place, which the coefficients leave out.
    work = replace(work, space_widths=0, time_widths=0)
    linear, quadratic = cost_coefficients(work, text_tokens=16)
    small, large = (forward_flops(work, [(n, 1, 1)], [16]) for n in (100, 700))
    assert large - small == linear * 600 + quadratic * (700**2 - 100**2)
