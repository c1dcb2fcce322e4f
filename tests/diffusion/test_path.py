"""Laws of a path, held by ours and by one that is curved."""

import math
from dataclasses import dataclass

import pytest
import torch

from framework.diffusion.denoiser import Denoiser
from framework.diffusion.guidance import guided
from framework.diffusion.path import Flow, StraightPath, interpolate
from framework.diffusion.samplers import EulerConfig, HeunConfig, euler, heun
from framework.diffusion.schedule import sampling_grid
from framework.objectives.rectified_flow import RectifiedFlowConfig

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
STD = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)


@dataclass(frozen=True)
class CosinePath:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): its velocity turns."""

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t) if torch.is_tensor(t) else math.cos(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * t) if torch.is_tensor(t) else math.sin(math.pi / 2 * t)

    def velocity(self, x_t, data, t):
        alpha, sigma = self.alpha(t), self.sigma(t)
        noise = (x_t - alpha * data) / sigma
        return math.pi / 2 * (alpha * noise - sigma * data)


PATHS = [StraightPath(), CosinePath()]
EVERY_PATH = pytest.mark.parametrize("path", PATHS, ids=["straight", "cosine"])


def gaussian_flow(path):
    """The exact flow where data ~ N(MEAN, STD^2)."""

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = sigma**2 + alpha**2 * STD**2
        return MEAN + alpha * STD**2 / total * (x - alpha * MEAN)

    return Flow(path, denoise)


@EVERY_PATH
def test_a_path_ends_in_data_and_in_noise(path):
    latents, noise = torch.randn(3, 4), torch.randn(3, 4)
    start = interpolate(path, latents, noise, torch.zeros(3, 1))
    end = interpolate(path, latents, noise, torch.ones(3, 1))
    # A quarter turn is not exact in float32.
    torch.testing.assert_close(start, latents, atol=1e-6, rtol=0)
    torch.testing.assert_close(end, noise, atol=1e-6, rtol=0)


def test_the_ends_of_the_straight_path_are_exact():
    latents, noise = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(interpolate(StraightPath(), latents, noise, torch.zeros(3, 1)), latents)
    assert torch.equal(interpolate(StraightPath(), latents, noise, torch.ones(3, 1)), noise)


@EVERY_PATH
@pytest.mark.parametrize("t", [0.05, 0.4, 0.99])
def test_velocity_is_the_derivative_along_the_path(path, t):
    latents, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    time = torch.full((5, 1), t, dtype=torch.float64, requires_grad=True)
    x_t = interpolate(path, latents, noise, time)
    for i in range(3):
        (derivative,) = torch.autograd.grad(x_t[:, i].sum(), time, retain_graph=True)
        velocity = path.velocity(x_t, latents, time)[:, i : i + 1]
        torch.testing.assert_close(velocity, derivative, atol=1e-12, rtol=1e-10)
    whole = path.velocity(x_t, latents, t)  # one number for all
    torch.testing.assert_close(whole, path.velocity(x_t, latents, time))


@EVERY_PATH
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_samplers_converge_on_any_path(path, sampler, order):
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The flow keeps quantiles: (x_t - alpha MEAN) / sqrt(sigma^2 + alpha^2 STD^2) never changes.
    exact = MEAN + STD * noise
    first, second = (
        float((sampler(gaussian_flow(path), noise, sampling_grid(n, 1.0)) - exact).abs().max())
        for n in (200, 400)
    )
    assert math.log2(first / second) == pytest.approx(order, abs=0.15)
    assert second < 0.05  # of values of size 2


@EVERY_PATH
@pytest.mark.parametrize("config", [EulerConfig, HeunConfig])
def test_given_tokens_stay_on_any_path(path, config):
    given, noise = torch.randn(6, 3), torch.randn(6, 3)
    mask = torch.tensor([True, True, False, False, False, False])

    def denoise(x, t):
        assert torch.equal(x[:2], given[:2])
        return x * 0.5

    sampled = config(num_steps=4).sample(Flow(path, denoise), noise, given, mask)
    assert torch.equal(sampled[:2], given[:2])
    free = config(num_steps=4).sample(Flow(path, lambda x, t: x * 0.5), noise)
    assert torch.equal(sampled[2:], free[2:])


class Own:
    """What a network's output means to somebody else; no objective at all."""

    path = StraightPath()

    def denoised(self, model_output, x_t, t):
        return x_t.float() - t * model_output.float()  # the output is the velocity


class Half(torch.nn.Module):
    def forward(self, tokens, t, layout, text):
        return tokens * 0.5 + t[layout.segment_ids][:, None]


@pytest.mark.parametrize("config", [EulerConfig, HeunConfig])
def test_sampling_does_not_know_the_objective(make_pack, config):
    batch, null_text = make_pack([4, 5]), torch.tensor([97])
    noise = torch.randn(batch.tokens.shape)
    ours = RectifiedFlowConfig(precondition=False).build(torch.ones(6))
    sampled = [
        config(num_steps=4).sample(guided(Denoiser(Half(), it), batch, 2.5, null_text), noise)
        for it in (ours, Own())
    ]
    assert torch.equal(*sampled)
