"""Factorised attention: tokens of a time step, and of a place over time."""

import pytest
import torch
import torch.nn.functional as F

from model_zoo.attention import Run, packed_attention
from model_zoo.models.dit import DiTConfig
from model_zoo.pack import space_and_time
from tests.conftest import relative_l2

GRIDS = [(2, 3, 2), (1, 1, 1), (3, 2, 4), (3, 2, 4), (1, 2, 2), (4, 1, 1)]
TEXT = [4, 1, 0, 6, 3, 2]
P = 6


def build(depth: int, attention_span: str):
    torch.manual_seed(0)
    config = DiTConfig(24, 40, 2, depth, gate_init=0.5, attention_span=attention_span)
    model = config.build(P, 258, None)
    torch.nn.init.normal_(model.head.out.weight, std=0.1)
    return model


def run(model, pack):
    return model(pack.tokens, torch.linspace(0.05, 0.95, pack.num_segments), pack, pack.text)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_each_step_and_each_place_attends_to_itself(make_pack, backend):
    pack = make_pack(GRIDS, TEXT, P, padding=(5, 3))
    q, k, v = torch.randn(3, pack.tokens.shape[0], 2, 8)  # 3 x (L, N, d)
    space, time = space_and_time(pack, backend)
    in_space, in_time = (
        span.restore(packed_attention(*map(span.arrange, (q, k, v)), span.segments))
        for span in (space, time)
    )
    start = 0
    for f, h, w in [*GRIDS, (5, 1, 1)]:  # padding is one place over time
        here = slice(start, start + f * h * w)
        start += f * h * w
        steps = [x[here].unflatten(0, (f, h * w)).transpose(1, 2) for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(*steps)  # (f, N, h * w, d)
        torch.testing.assert_close(in_space[here], expected.transpose(1, 2).flatten(0, 1))
        places = [x[here].unflatten(0, (f, h * w)).permute(1, 2, 0, 3) for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(*places)  # (h * w, N, f, d)
        torch.testing.assert_close(in_time[here], expected.permute(2, 0, 1, 3).flatten(0, 1))


def test_equal_lengths_are_one_run(make_pack):
    pack = make_pack(GRIDS, TEXT, P, padding=(5, 3))
    space, time = space_and_time(pack, "sdpa")
    # 3 and 3 steps of 8 tokens are one call; so are 1 step of 4 places and 4 steps of 1, over time.
    assert space.segments.runs == tuple(
        Run(n, length, length) for n, length in [(2, 6), (1, 1), (6, 8), (1, 4), (9, 1)]
    )
    assert time.segments.runs == tuple(
        Run(n, length, length) for n, length in [(6, 2), (1, 1), (16, 3), (4, 1), (1, 4), (1, 5)]
    )


def test_even_blocks_see_a_step_and_odd_ones_a_place(make_pack):
    pack = make_pack([(3, 2, 4), (2, 2, 2)], [2, 2], P)
    step, place = 1, 6
    for depth, reached in ((1, torch.arange(24) // 8 == step), (2, torch.arange(24) >= 0)):
        model = build(depth, "alternate")
        pack = make_pack([(3, 2, 4), (2, 2, 2)], [2, 2], P)
        before = run(model, pack)
        pack.tokens[8 * step + place] += 1
        changed = (run(model, pack) - before).abs().amax(-1) > 1e-7
        assert changed.tolist() == [*reached.tolist(), *[False] * 8]


def test_an_image_sees_all_of_itself_in_a_block_of_space(make_pack):
    pack = make_pack([(1, 3, 4), (1, 2, 2)], [2, 3], P, padding=(1, 3))
    full, alternate = (run(build(1, span), pack) for span in ("full", "alternate"))
    assert relative_l2(full, alternate) < 1e-5


def test_an_unknown_span_is_refused():
    with pytest.raises(ValueError, match="attention_span='axial' is not known; use one of full"):
        DiTConfig(24, 40, 2, 1, attention_span="axial")
