"""Blocks are compiled once for packs of any lengths: attention is one operator to the compiler."""

import copy
import random
from collections.abc import Iterator

import pytest
import torch

from model_zoo.attention import Segments, _attend, packed_attention
from model_zoo.checkpointing import CheckpointPolicy
from model_zoo.models.dit import DiTConfig
from model_zoo.models.mmdit import MMDiTConfig
from tests.conftest import relative_l2

L, K, P = 200, 60, 6
SMALL = {"hidden_size": 24, "ffn": 40, "num_heads": 2, "gate_init": 0.5}
# Models, and where their blocks are, of one kind each.
MODELS = {
    "dit": (DiTConfig(**SMALL, depth=3), ("blocks",)),
    "mmdit": (
        MMDiTConfig(**SMALL, double_depth=2, single_depth=2, rope_axes=(4, 4, 4)),
        ("double_blocks", "single_blocks"),
    ),
}


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def random_pack(make_pack, seed: int):
    """A pack of six clips; what they leave of L and K is the padding segment's."""
    rng = random.Random(seed)
    grids: list[tuple[int, int, int]] = []
    room = L
    while len(grids) < 6:
        f, h, w = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)
        if f * h * w < room:
            grids.append((f, h, w))
            room -= f * h * w
    texts = [rng.randint(1, 6) for _ in grids]
    return make_pack(grids, texts, P, padding=(room, K - sum(texts)), seed=seed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_fifty_packs_and_one_graph(make_pack, mode: str, name: str) -> None:
    """One for each kind of block."""
    config, kinds = MODELS[name]
    torch.manual_seed(0)
    model = config.build(P, 258, None)
    torch.nn.init.normal_(model.head.out.weight, std=0.1)
    eager = copy.deepcopy(model)
    for kind in kinds:
        for block in getattr(model, kind):
            block.compile(backend="aot_eager")
    model.set_checkpointing(CheckpointPolicy(mode))
    for seed in range(50):
        pack = random_pack(make_pack, seed)
        t = torch.linspace(0, 1, pack.num_segments)
        outputs = [net(pack.tokens, t, pack, pack.text) for net in (model, eager)]
        assert relative_l2(*outputs) < 1e-5
        for out in outputs:
            out.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert relative_l2(one.grad, other.grad) < 1e-4, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(kinds)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [((3, 4, 4, 0, 1), (2, 2, 2, 3, 0)), ((5,), (5,)), ((0, 0), (2, 1)), ((2, 2), (0, 0))],
)
def test_the_operator_is_what_it_says(q_lengths, k_lengths) -> None:
    """Its fake, its backward and its aliasing, as torch checks them; and its numbers."""
    cu_q, cu_k = (
        torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (q_lengths, k_lengths)
    )
    segments = Segments.of(cu_q, cu_k, "sdpa")
    q, k, v = (
        torch.randn(sum(n), 2, 8, requires_grad=True) for n in (q_lengths, k_lengths, k_lengths)
    )
    inputs = (q, k, v, segments.cu_q, segments.cu_k, segments.lengths, "sdpa")
    torch.library.opcheck(_attend, inputs, test_utils=("test_schema", "test_faketensor"))
    out = _attend(*inputs)[0]
    torch.testing.assert_close(out, packed_attention(q, k, v, segments))
    if sum(q_lengths) and sum(k_lengths):
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        other = packed_attention(q, k, v, segments)
        expected = torch.autograd.grad(other, (q, k, v), upstream)
        torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-5)
