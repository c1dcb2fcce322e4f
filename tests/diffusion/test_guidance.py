from dataclasses import replace

import torch

from framework.diffusion.guidance import guided, with_null_half
from framework.objectives.objective import token_t
from framework.objectives.rectified_flow import RectifiedFlowConfig

NULL = torch.tensor([97, 98, 99])
OBJECTIVE = RectifiedFlowConfig().build(torch.tensor([0.3, 0.6, 1.0, 1.4, 2.0, 3.0]))


class TextMean:
    """Its output is the mean text id of the token's clip, so that both halves are told apart."""

    def __init__(self):
        self.num_tokens = []

    def __call__(self, tokens, t, layout, text):
        self.num_tokens.append(tokens.shape[0])
        pieces = text.float().tensor_split(layout.cu_text[1:-1].long())
        means = torch.stack([p.mean() if len(p) else torch.zeros(()) for p in pieces])
        return 0.01 * means[layout.segment_ids][:, None].expand_as(tokens) + 0.1 * tokens


def test_null_half_is_the_same_clips_without_their_captions(make_pack):
    batch = make_pack([4, 5], given=[1], padding=0)
    both = with_null_half(batch, NULL)
    num_tokens = batch.tokens.shape[0]
    assert both.cu_seqlens.tolist() == [0, 2, 5, 5, 7, 10, 10]
    assert both.cu_text.tolist() == [0, 2, 4, 4, 7, 10, 10]  # the empty segment gets no text
    assert both.text.tolist() == [0, 1, 2, 3, *NULL.tolist(), *NULL.tolist()]
    assert both.cu_seqlens.dtype == both.cu_text.dtype == torch.int32
    assert torch.equal(both.tokens[num_tokens:], batch.tokens)
    assert both.given_mask.nonzero().flatten().tolist() == [1, 1 + num_tokens]
    assert both.num_segments == 2 * batch.num_segments


def test_embeddings_work_as_ids_do(make_pack):
    batch = make_pack([4, 5], padding=0)
    batch = replace(batch, text=torch.randn(4, 8))
    both = with_null_half(batch, torch.zeros(1, 8))
    assert both.text.shape == (6, 8)
    assert both.cu_text.tolist() == [0, 2, 4, 4, 5, 6, 6]


def test_scale_one_is_the_plain_estimate_at_half_the_cost(make_pack):
    batch, model = make_pack([4, 5]), TextMean()
    x_t = torch.randn(batch.tokens.shape)
    plain = guided(model, OBJECTIVE, batch, 1.0, NULL)(x_t, 0.6)
    assert model.num_tokens == [x_t.shape[0]]
    t = token_t(torch.full((batch.num_segments,), 0.6), batch)
    expected = OBJECTIVE.denoised(model(x_t, torch.zeros(3), batch, batch.text), x_t, t)
    torch.testing.assert_close(plain, expected)
    # The general path, a hair from 1, says the same: guidance is continuous in its scale.
    near = guided(model, OBJECTIVE, batch, 1.0 + 1e-6, NULL)(x_t, 0.6)
    assert model.num_tokens[-1] == 2 * x_t.shape[0]
    torch.testing.assert_close(near, plain, atol=1e-4, rtol=1e-4)


def test_guidance_extrapolates_from_unconditioned_through_conditioned(make_pack):
    batch, model = make_pack([4, 5]), TextMean()
    x_t = torch.randn(batch.tokens.shape)
    estimates = {s: guided(model, OBJECTIVE, batch, s, NULL)(x_t, 0.6) for s in (0.0, 1.0, 2.5)}
    expected = estimates[0.0] + 2.5 * (estimates[1.0] - estimates[0.0])
    torch.testing.assert_close(estimates[2.5], expected, atol=1e-4, rtol=1e-4)
    clips = slice(0, int(batch.cu_seqlens[2]))
    assert not torch.isclose(estimates[0.0][clips], estimates[1.0][clips]).all()


def test_given_tokens_come_back_as_they_are(make_pack):
    batch = make_pack([4, 5], given=[0, 3])
    x_t = torch.randn(batch.tokens.shape)
    estimate = guided(TextMean(), OBJECTIVE, batch, 2.5, NULL)(x_t, 0.6)
    assert torch.equal(estimate[[0, 3]], x_t[[0, 3]])
