from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml

from framework.batch import PackedBatch
from model_zoo.dit import DiT, DiTConfig
from model_zoo.layers import CheckpointPolicy
from model_zoo.text.byte import ByteText

GRIDS = [(2, 3, 2), (1, 1, 1), (3, 2, 4), (3, 2, 4), (2, 1, 5)]
TEXT = [4, 1, 6, 6, 3]
P = 6


def build(text_dim: int | None = None, **options) -> DiT:
    """A small model whose head does not start at zero, so that something comes out."""
    torch.manual_seed(0)
    config = DiTConfig(width=24, ffn=40, num_heads=2, depth=3, gate_init=0.5, **options)
    model = config.build(P, None if text_dim else 258, text_dim)
    torch.nn.init.normal_(model.head.out.weight, std=0.1)
    return model


def times(pack: PackedBatch) -> torch.Tensor:
    return torch.linspace(0.05, 0.95, pack.num_segments)


def run(model: DiT, pack: PackedBatch, t: torch.Tensor | None = None) -> torch.Tensor:
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


@pytest.fixture(params=[None, 10], ids=["ids", "embeddings"])
def text_dim(request):
    return request.param


@pytest.mark.parametrize("mode", ["none", "full", "every_k"])
def test_a_pack_equals_its_clips_one_at_a_time(make_pack, text_dim, mode):
    model = build(text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5))
    pack.given_mask[::5] = True
    upstream = torch.randn_like(pack.tokens)
    single = build(text_dim)

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
    for (name, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
        assert one.grad is not None, name
        difference = (one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-6)
        assert difference < 1e-4, (name, difference)


def test_order_inside_a_pack_does_not_matter(make_pack, text_dim):
    model = build(text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim)
    order = [3, 0, 6, 4, 1, 5, 2]
    shuffled = subset(pack, order)
    expected = subset(replace(pack, tokens=run(model, pack)), order).tokens
    out = run(model, shuffled, times(pack)[order])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["tokens", "text", "t"])
def test_a_nan_reaches_no_other_clip(make_pack, where):
    model = build(text_dim=10)
    pack = make_pack(GRIDS, TEXT, P, text_dim=10, padding=(3, 5))
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


def test_given_tokens_are_modulated_as_at_time_zero(make_pack):
    model = build()
    pack = make_pack(GRIDS, TEXT, P)
    clip = pack.segment_ids == 2
    given = replace(pack, given_mask=clip)
    t = times(pack)
    at_zero = t.clone()
    at_zero[2] = 0
    torch.testing.assert_close(run(model, given, t), run(model, pack, at_zero))
    assert not torch.allclose(run(model, given, t)[clip], run(model, pack, t)[clip])


def test_time_text_and_position_matter(make_pack):
    model = build()
    pack = make_pack(GRIDS, TEXT, P)
    out = run(model, pack)
    assert not torch.allclose(out, run(model, pack, times(pack).flip(0)))
    assert not torch.allclose(out, run(model, replace(pack, text=pack.text.flip(0))))
    turned = replace(pack, grid=pack.grid[:, [0, 2, 1]])
    assert not torch.allclose(out, run(model, turned))


def test_the_output_starts_at_zero(make_pack):
    model = DiTConfig(width=24, ffn=40, num_heads=2, depth=1).build(P, 258, None)
    pack = make_pack(GRIDS, TEXT, P)
    assert run(model, pack).abs().max() == 0


def test_the_same_seed_gives_the_same_weights():
    one, other = build().state_dict(), build().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bf16_is_close_to_float32(make_pack, text_dim):
    model = build(text_dim)
    pack = make_pack(GRIDS, TEXT, P, text_dim=text_dim, padding=(3, 5))
    exact = run(model, pack)
    half = run(model.bfloat16(), pack)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(build(text_dim), pack)
    assert half.dtype == mixed.dtype == torch.float32
    # bf16 keeps 8 bits; errors of .4 % add up over three blocks.
    for out in (half, mixed):
        assert (out - exact).norm() / exact.norm() < 0.03


def test_text_of_the_padding_segment_may_be_longer_than_the_table(make_pack):
    model = build(text_max_length=6)
    pack = make_pack(GRIDS, TEXT, P, padding=(3, 50))
    assert run(model, pack).isfinite().all()


def test_learns_one_pack(make_pack):
    model = build()
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
    assert options.pop("_target_") == "model_zoo.dit.DiTConfig"
    return DiTConfig(**options | {"patch": tuple(options.get("patch", (1, 2, 2)))})


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name, pytestconfig):
    config = load(name, pytestconfig.rootpath / "conf")
    sizes = (144, ByteText.vocab_size, None) if name.endswith("_xs") else (64, None, 4096)
    with torch.device("meta"):
        model = config.build(*sizes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(SIZES[name], abs=5e3)


def test_every_size_has_its_count(pytestconfig):
    paths = (pytestconfig.rootpath / "conf" / "model").glob("*.yaml")
    names = {path.stem for path in paths if "model_zoo.dit.DiTConfig" in path.read_text()}
    assert names == set(SIZES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 5}, "width=24 must be divisible by num_heads=5"),
        ({"num_heads": 6}, "head_dim=4"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"patch": (1, 0, 2)}, "must be at least 1 in time"),
        ({"text_depth": -1}, "text_depth=-1"),
        ({"attention": "xformers"}, "attention='xformers' is not known"),
    ],
)
def test_impossible_models_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiTConfig(**{"width": 24, "ffn": 40, "num_heads": 2, "depth": 3, **options})


def test_a_kernel_that_cannot_run_here_is_refused(make_pack):
    model = build(attention="varlen")
    with pytest.raises(ValueError, match="runs on CUDA"):
        run(model, make_pack(GRIDS, TEXT, P))


@pytest.mark.parametrize(("vocab", "dim"), [(None, None), (258, 16)])
def test_text_is_ids_or_embeddings(vocab, dim):
    with pytest.raises(ValueError, match="give exactly one"):
        DiTConfig(width=24, ffn=40, num_heads=2, depth=1).build(P, vocab, dim)


def test_checkpoint_policies():
    applied = [CheckpointPolicy("every_k", 3).applies(i) for i in range(7)]
    assert applied == [True, False, False, True, False, False, True]
    with pytest.raises(ValueError, match="mode='all'"):
        CheckpointPolicy("all")
    with pytest.raises(ValueError, match="every=0"):
        CheckpointPolicy("every_k", 0)
