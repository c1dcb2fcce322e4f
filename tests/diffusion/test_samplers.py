import math

import pytest
import torch

from framework.diffusion.path import Flow, StraightPath
from framework.diffusion.samplers import EulerConfig, HeunConfig, euler, heun
from framework.diffusion.schedule import sampling_grid

STD = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def gaussian(x, t):
    """E[data | x_t] where data ~ N(MEAN, STD^2)."""
    total = t**2 + (1 - t) ** 2 * STD**2
    return MEAN + (1 - t) * STD**2 / total * (x - (1 - t) * MEAN)


FLOW = Flow(StraightPath(), gaussian)


def errors(sampler, nums_steps):
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The flow keeps quantiles: (x_t - (1-t) MEAN) / sqrt(t^2 + (1-t)^2 STD^2) never changes.
    exact = MEAN + STD * noise
    return [
        float((sampler(FLOW, noise, sampling_grid(n, 1.0)) - exact).abs().max()) for n in nums_steps
    ]


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence_on_a_flow_with_a_known_answer(sampler, order):
    first, second = errors(sampler, [200, 400])
    assert math.log2(first / second) == pytest.approx(order, abs=0.15)
    assert second < 0.05  # of values of size 2


def test_one_euler_step_is_the_estimate_from_pure_noise():
    noise = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(euler(FLOW, noise, [1.0, 0.0]), gaussian(noise, 1.0))


@pytest.mark.parametrize("config", [EulerConfig, HeunConfig])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_point_of_data_is_reached_exactly(config, shift):
    point = torch.randn(6, 3)
    flow = Flow(StraightPath(), lambda x, t: point)
    sampled = config(num_steps=5, shift=shift).sample(flow, torch.randn(6, 3))
    torch.testing.assert_close(sampled, point, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [EulerConfig, HeunConfig])
def test_given_tokens_stay_and_are_seen_clean(config):
    given = torch.randn(6, 3)
    mask = torch.tensor([True, True, False, False, False, False])

    def denoise(x, t):
        assert torch.equal(x[:2], given[:2])
        return x * 0.5

    sampled = config(num_steps=4).sample(
        Flow(StraightPath(), denoise), torch.randn(6, 3), given, mask
    )
    assert torch.equal(sampled[:2], given[:2])
    assert not torch.isclose(sampled[2:], given[2:]).any()


def test_given_tokens_need_their_mask():
    with pytest.raises(ValueError, match="go together"):
        EulerConfig().sample(FLOW, torch.zeros(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"shift": -1.0}, r"shift=-1\.0"),
        ({"guidance_scale": -0.5}, r"guidance_scale=-0\.5"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EulerConfig(**changes)
