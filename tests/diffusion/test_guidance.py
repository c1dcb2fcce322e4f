from dataclasses import replace

import torch

from framework.diffusion.denoiser import Denoiser, token_t
from framework.diffusion.guidance import guided
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


def test_scale_one_is_the_plain_estimate_at_half_the_cost(make_pack):
    batch, model = make_pack([4, 5]), TextMean()
    denoiser = Denoiser(model, OBJECTIVE)
    x_t = torch.randn(batch.tokens.shape)
    plain = guided(denoiser, batch, 1.0, NULL).denoise(x_t, 0.6)
    assert model.num_tokens == [x_t.shape[0]]
    t = token_t(torch.full((batch.num_segments,), 0.6), batch)
    expected = OBJECTIVE.denoised(model(x_t, torch.zeros(3), batch, batch.text), x_t, t)
    torch.testing.assert_close(plain, expected)
    # The general path, a hair from 1, says the same: guidance is continuous in its scale.
    near = guided(denoiser, batch, 1.0 + 1e-6, NULL).denoise(x_t, 0.6)
    assert model.num_tokens[-1] == 2 * x_t.shape[0]
    torch.testing.assert_close(near, plain, atol=1e-4, rtol=1e-4)


def test_guidance_extrapolates_from_unconditioned_through_conditioned(make_pack):
    batch, model = make_pack([4, 5]), TextMean()
    x_t = torch.randn(batch.tokens.shape)
    estimates = {
        s: guided(Denoiser(model, OBJECTIVE), batch, s, NULL).denoise(x_t, 0.6)
        for s in (0.0, 1.0, 2.5)
    }
    expected = estimates[0.0] + 2.5 * (estimates[1.0] - estimates[0.0])
    torch.testing.assert_close(estimates[2.5], expected, atol=1e-4, rtol=1e-4)
    clips = slice(0, int(batch.cu_seqlens[2]))
    assert not torch.isclose(estimates[0.0][clips], estimates[1.0][clips]).all()


def test_given_tokens_come_back_as_they_are(make_pack):
    batch = make_pack([4, 5], given=[0, 3])
    x_t = torch.randn(batch.tokens.shape)
    estimate = guided(Denoiser(TextMean(), OBJECTIVE), batch, 2.5, NULL).denoise(x_t, 0.6)
    assert torch.equal(estimate[[0, 3]], x_t[[0, 3]])


def test_a_masked_pack_is_guided_at_the_places_of_its_tokens(make_pack):
    """Both halves hand the model the same places, though the pack drops tokens."""

    def places(tokens, t, layout, text):
        return layout.token_index[:, None].expand_as(tokens).float()

    batch = replace(make_pack([2, 3], padding=0), index=torch.tensor([1, 4, 6, 7, 0, 2, 3, 5, 8]))
    x_t = torch.randn(batch.tokens.shape)
    denoiser = Denoiser(places, OBJECTIVE)
    plain, guided_twice = (guided(denoiser, batch, s, NULL).denoise(x_t, 0.6) for s in (1.0, 2.5))
    torch.testing.assert_close(guided_twice, plain)
