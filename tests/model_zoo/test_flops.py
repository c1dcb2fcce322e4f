"""MFU's count against torch's. That a pass is counted exactly is a law: see test_laws.py."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_zoo.flops import training_flops_per_token
from model_zoo.models.dit import DiTConfig

CONFIG = DiTConfig(hidden_size=48, ffn=160, num_heads=2, depth=3, gate_init=0.5, pooled_text=True)


def test_training_flops_are_near_the_counter(make_pack):
    # A caption of one token, so that what MFU leaves out (text, once a clip) is small.
    pack = make_pack([(8, 8, 16)], [1], token_size=12, text_dim=4)
    model = CONFIG.build(12, None, 4)
    # The CPU's fused attention is unknown to the counter; its plain form is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pack.tokens, torch.rand(pack.num_segments), pack, pack.text).sum().backward()
    per_token = training_flops_per_token(CONFIG.work(12, 4), [(8, 8, 16)])
    assert 1024 * per_token == pytest.approx(counter.get_total_flops(), rel=0.02)
