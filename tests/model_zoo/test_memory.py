from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model_zoo.checkpointing import CheckpointPolicy
from model_zoo.memory import Memory, training_memory
from model_zoo.models.dit import DiTConfig

CONFIG = DiTConfig(hidden_size=96, ffn=320, num_heads=4, depth=4)
GRID, TOKENS = (8, 8, 16), 1024


def kept_bytes(make_pack, config: DiTConfig, dtype: torch.dtype, policy: CheckpointPolicy) -> int:
    """What autograd holds after a forward pass, each storage once, weights left out."""
    model = config.build(6, None, 10).to(dtype)
    model.set_checkpointing(policy)
    pack = make_pack([GRID], [1], 6, text_dim=10)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(pack.tokens, torch.rand(pack.num_segments), pack, pack.text)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("qk_norm", ["head", "width"])
def test_activations_are_those_that_autograd_keeps(make_pack, dtype, value_bytes, qk_norm) -> None:
    config = replace(CONFIG, qk_norm=qk_norm)
    none = CheckpointPolicy("none")
    measured = kept_bytes(make_pack, config, dtype, none)
    formula = config.activation_bytes(value_bytes, TOKENS, none)
    assert formula == pytest.approx(measured, rel=0.03)  # text, time, embedding and tokens
    deeper = replace(config, depth=8)
    blocks = kept_bytes(make_pack, deeper, dtype, none) - measured
    formula = deeper.activation_bytes(value_bytes, TOKENS, none) - formula
    assert formula == pytest.approx(blocks, rel=0.01)


def test_policies_in_their_order() -> None:
    sizes = [
        replace(CONFIG, depth=24).activation_bytes(2, TOKENS, CheckpointPolicy(mode, every))
        for mode, every in [("full", 1), ("selective", 1), ("every_k", 2), ("none", 1)]
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 6


def test_states_by_stage_are_those_of_the_paper() -> None:
    """ZeRO, table 1: 7.5 G parameters on 64 ranks in half precision.

    Ours: an average, and gradients in float32, two bytes more.
    """
    numel, ranks = 7_500_000_000, 64
    stages = [training_memory(numel, i, ranks, 2) for i in range(4)]
    more = [2 * numel / (ranks if i >= 2 else 1) for i in range(4)]
    more[0] = 0  # its weights and gradients are the float32 ones
    paper = [(m.weights + m.gradients + m.optimizer - more[i]) / 1e9 for i, m in enumerate(stages)]
    assert paper == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    assert [round(m.ema / 1e9, 2) for m in stages] == [30.0, 0.47, 0.47, 0.47]
    one = stages[3]
    parts = (one.weights, one.gradients, one.optimizer, one.ema, one.gathered, one.activations)
    assert one.total == sum(parts)


def test_what_is_offloaded_is_the_hosts() -> None:
    def memory(**changes: Any) -> Memory:
        return training_memory(1_000_000, 3, 4, 2, activations=7, **changes)

    none, optimizer, everything = (memory(offload=o) for o in ("none", "optimizer", "all"))
    assert (none.host, optimizer.host, everything.host) == (4_000_000, 9_000_000, 9_500_000)
    assert none.total + none.host == optimizer.total + optimizer.host
    assert none.total + none.host == everything.total + everything.host
    assert everything.total == everything.activations == 7
    assert memory(has_ema=False).host == 3_000_000
    assert memory(gathered=10).gathered == 20
