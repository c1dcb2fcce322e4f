import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_zoo.dit import DiTConfig
from model_zoo.flops import cost_coefficients, forward_flops, training_flops_per_token

CONFIG = DiTConfig(width=48, ffn=160, num_heads=2, depth=3, gate_init=0.5, pooled_text=True)
GRIDS, TEXT = [(4, 6, 8), (2, 6, 8), (3, 1, 5)], [16, 12, 3]
EMPTY = (0, 0, 0)


def count(pack, model, backward: bool = False) -> int:
    # The CPU's fused attention is unknown to the counter; its plain form is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(pack.tokens, torch.rand(pack.num_segments), pack, pack.text)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("text_dim", [None, 20])
def test_forward_flops_equal_the_counter(make_pack, text_dim):
    pack = make_pack(GRIDS, TEXT, token_size=12, text_dim=text_dim)
    model = CONFIG.build(12, None if text_dim else 258, text_dim)
    # Two more segments, empty ones, have no tokens but still a time.
    work = CONFIG.work(12, text_dim)
    assert count(pack, model) == forward_flops(work, [*GRIDS, EMPTY, EMPTY], [*TEXT, 0, 0])


def test_training_flops_are_near_the_counter(make_pack):
    # A caption of one token, so that what MFU leaves out (text, once a clip) is small.
    pack = make_pack([(8, 8, 16)], [1], token_size=12, text_dim=4)
    counted = count(pack, CONFIG.build(12, None, 4), backward=True)
    per_token = training_flops_per_token(CONFIG.work(12, 4), [(8, 8, 16)])
    assert 1024 * per_token == pytest.approx(counted, rel=0.02)


def test_cost_coefficients_give_the_difference_between_two_clips():
    work = CONFIG.work(12, None)
    linear, quadratic = cost_coefficients(work, text_tokens=16)
    small, large = (forward_flops(work, [(n, 1, 1)], [16]) for n in (100, 700))
    assert large - small == linear * 600 + quadratic * (700**2 - 100**2)
