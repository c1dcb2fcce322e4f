"""What holds for every denoiser: packing changes nothing, clips do not meet, work is as counted.

A new model is one line in MODELS. Whatever else is its own belongs in a file of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from framework.batch import PackedBatch
from model_zoo.attention import ATTENTION_OPERATORS
from model_zoo.checkpointing import CheckpointPolicy
from model_zoo.flops import cost_coefficients, forward_flops
from model_zoo.models.dit import DiTConfig
from model_zoo.models.dit_original import OriginalDiTConfig
from model_zoo.models.mmdit import MMDiTConfig
from model_zoo.models.uvit import UViTConfig
from tests.conftest import relative_l2

SIZE = {"hidden_size": 24, "num_heads": 2, "text_max_length": 20}
SMALL = {**SIZE, "ffn": 40, "gate_init": 0.5}
# `build` of a config, (token_size, text_vocab, text_dim) -> a model that keeps it as `config`.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "dit": DiTConfig(**SMALL, depth=3, pooled_text=True).build,
    "mmdit": MMDiTConfig(**SMALL, double_depth=1, single_depth=2, rope_axes=(4, 4, 4)).build,
    "dit_alternate": DiTConfig(**SMALL, depth=4, attention_span="alternate").build,
    "dit_original": OriginalDiTConfig(**SIZE, depth=3, text_depth=1, learn_sigma=True).build,
    "dit_original_labels": OriginalDiTConfig(**SIZE, depth=3, text_depth=0).build,
    "uvit": UViTConfig(**SIZE, ffn=40, depth=5).build,
}
TIME_IS_A_TOKEN = ("uvit",)  # whose given tokens are marked instead of modulated with t = 0

# The fifth clip has no text; the last has no video, which the planner never makes.
GRIDS = [(2, 3, 2), (1, 1, 1), (3, 2, 4), (3, 2, 4), (2, 1, 5), (0, 0, 0)]
TEXT = [4, 1, 6, 6, 0, 3]
P, VOCAB, TEXT_DIM = 6, 258, 10


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=[None, TEXT_DIM], ids=["ids", "embeddings"])
def text_dim(request) -> int | None:
    return request.param


def fresh(name: str, text_dim: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](P, None if text_dim else VOCAB, text_dim)


def build(name: str, text_dim: int | None = None) -> nn.Module:
    """A small model whose weights that start at zero are moved, so that something comes out."""
    model = fresh(name, text_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def times(pack: PackedBatch) -> Tensor:
    return torch.linspace(0.05, 0.95, pack.num_segments)


def run(model: nn.Module, pack: PackedBatch, t: Tensor | None = None) -> Tensor:
    return model(pack.tokens, times(pack) if t is None else t, pack, pack.text)


def subset(pack: PackedBatch, segments: list[int]) -> PackedBatch:
    """The pack of these segments alone, in this order."""
    video, text = list(pairwise(pack.cu_seqlens.tolist())), list(pairwise(pack.cu_text.tolist()))

    def cut(x: Tensor, ends: list[tuple[int, int]]) -> Tensor:
        return torch.cat([x[slice(*ends[s])] for s in segments])

    def cumulated(ends: list[tuple[int, int]]) -> Tensor:
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


@pytest.mark.parametrize("mode", ["none", "full", "every_k", "selective"])
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

    assert relative_l2(together, torch.cat(outputs)) < 1e-5  # float32 sums in another order
    for (weight, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
        assert one.grad is not None, weight
        assert relative_l2(one.grad, other.grad) < 1e-4, weight


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_attention_is_computed_again_under_full_checkpointing_alone(make_pack, name, mode):
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P)
    model.set_checkpointing(CheckpointPolicy(mode))
    attended = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal attended
            attended += func in ATTENTION_OPERATORS
            return func(*args, **kwargs or {})

    with Count():
        out = run(model, pack)
        forward = attended
        out.sum().backward()
    assert forward > 0
    assert (attended > forward) == (mode == "full")


def test_order_inside_a_pack_does_not_matter(make_pack, name, text_dim):
    model = build(name, text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim)
    order = [3, 0, 6, 4, 1, 7, 5, 2]
    shuffled = subset(pack, order)
    expected = subset(replace(pack, tokens=run(model, pack)), order).tokens
    out = run(model, shuffled, times(pack)[order])
    assert relative_l2(out, expected) < 1e-5


@pytest.mark.parametrize("where", ["tokens", "text", "t"])
def test_a_nan_reaches_no_other_clip(make_pack, name, where):
    model = build(name, TEXT_DIM)
    pack = make_pack(GRIDS, TEXT, P, text_dim=TEXT_DIM, padding=(3, 5))
    clean, t = run(model, pack), times(pack)
    if where == "tokens":
        pack.tokens[pack.segment_ids == 2] = float("nan")
    elif where == "text":
        pack.text[pack.cu_text[2] : pack.cu_text[3]] = float("nan")
    else:
        t[2] = float("nan")
    out = run(model, pack, t)
    sick = pack.segment_ids == 2
    assert out[sick].isnan().all()
    torch.testing.assert_close(out[~sick], clean[~sick], atol=1e-6, rtol=1e-5)


def test_given_tokens_are_modulated_as_at_time_zero(make_pack, name):
    """A clip without text: text may see its clip's t all the same."""
    if name in TIME_IS_A_TOKEN:
        return
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P)
    clip = pack.segment_ids == 4
    given = replace(pack, given_mask=clip)
    t = times(pack)
    at_zero = t.clone()
    at_zero[4] = 0
    torch.testing.assert_close(run(model, given, t), run(model, pack, at_zero))
    assert not torch.allclose(run(model, given, t)[clip], run(model, pack, t)[clip])


def test_time_text_and_position_matter(make_pack, name):
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
    assert changed[: pack.cu_seqlens[1]].any()
    assert not changed[pack.cu_seqlens[1] :].any()


def test_a_token_is_where_its_index_says(make_pack, name):
    """So that tokens may be dropped: those that are left keep their places."""
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P, padding=(3, 5))
    whole = replace(pack, index=pack.token_index.int())
    torch.testing.assert_close(run(model, whole), run(model, pack), atol=0, rtol=0)
    if not model.config.drops_tokens:
        return
    order = torch.argsort(pack.segment_ids + 0.9 * torch.rand(pack.tokens.shape[0]))
    shuffled = replace(pack, tokens=pack.tokens[order], index=whole.index[order])
    out = run(model, pack)
    assert relative_l2(run(model, shuffled), out[order]) < 1e-5
    assert not torch.allclose(run(model, replace(shuffled, index=None)), out[order])


@pytest.mark.parametrize("text", [[4, 1], [0, 0]], ids=["text", "no_text"])
def test_the_same_modules_run_whatever_the_data(make_pack, name, text_dim, text):
    """All that have weights, in the order of any other pack: ZeRO-3 gathers them on all ranks."""
    model = build(name, text_dim)
    ran: list[str] = []
    for module_name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, it=module_name: ran.append(it))
    run(model, make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5)))
    usual = ran.copy()
    ran.clear()
    run(model, make_pack([(1, 2, 2), (0, 0, 0)], text, P, text_dim=text_dim))
    assert ran == usual
    owners = {weight.rpartition(".")[0] for weight, _ in model.named_parameters()}
    assert set(ran) == owners


def test_the_output_starts_at_zero(make_pack, name):
    assert run(fresh(name), make_pack(GRIDS, TEXT, P)).abs().max() == 0


def test_the_same_seed_gives_the_same_weights(name):
    one, other = fresh(name).state_dict(), fresh(name).state_dict()
    assert all(torch.equal(one[weight], other[weight]) for weight in one)


def test_bf16_is_close_to_float32(make_pack, name, text_dim):
    model = build(name, text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5))
    exact = run(model, pack)
    half = run(model.bfloat16(), pack)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(build(name, text_dim), pack)
    assert half.dtype == mixed.dtype == torch.float32
    # bf16 keeps 8 bits; errors of .4 % add up over three blocks.
    for out in (half, mixed):
        assert (out - exact).norm() / exact.norm() < 0.03


def test_text_of_the_padding_segment_may_be_longer_than_the_table(make_pack, name):
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P, padding=(3, 50))
    assert run(model, pack).isfinite().all()


def test_learns_one_pack(make_pack, name):
    model = build(name)
    pack = make_pack(GRIDS, TEXT, P)
    target = torch.randn_like(pack.tokens)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (run(model, pack) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_forward_flops_equal_the_counter(make_pack, name, text_dim):
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim)
    model = build(name, text_dim)
    # The CPU's fused attention is unknown to the counter; its plain form is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(model, pack)
    # Two more segments, empty ones, have no tokens but still a time.
    grids, text = [*GRIDS, (0, 0, 0), (0, 0, 0)], [*TEXT, 0, 0]
    work = model.config.work(P, text_dim)
    assert counter.get_total_flops() == forward_flops(work, grids, text)


def test_cost_coefficients_give_the_difference_between_two_clips(name):
    # Attention within one time step or place is short, and no part of a clip's cost.
    work = replace(fresh(name).config.work(P, None), space_widths=0, time_widths=0)
    linear, quadratic = cost_coefficients(work, text_tokens=16)
    small, large = (forward_flops(work, [(n, 1, 1)], [16]) for n in (100, 700))
    assert large - small == linear * 600 + quadratic * (700**2 - 100**2)


def test_the_kernel_does_not_matter(make_pack, name):
    """The oracle goes by boundaries on the device, as the kernels of GPUs do; SDPA by lengths."""
    model = build(name)
    dense = replace(model.config, attention="dense").build(P, VOCAB, None)
    dense.load_state_dict(model.state_dict())
    pack = make_pack(GRIDS, TEXT, P, padding=(3, 5))
    assert relative_l2(run(dense, pack), run(model, pack)) < 1e-5


def test_a_kernel_that_cannot_run_here_is_refused(make_pack, name):
    model = replace(fresh(name).config, attention="varlen").build(P, VOCAB, None)
    with pytest.raises(ValueError, match="runs on CUDA"):
        run(model, make_pack(GRIDS, TEXT, P))


@pytest.mark.parametrize(("vocab", "dim"), [(None, None), (VOCAB, TEXT_DIM)])
def test_text_is_ids_or_embeddings(name, vocab, dim):
    with pytest.raises(ValueError, match="give exactly one"):
        MODELS[name](P, vocab, dim)
