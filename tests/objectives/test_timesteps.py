import pytest
import torch

from framework.objectives.timesteps import logit_normal_t, uniform_t
from framework.seeding import draws


def test_densities():
    normals = [float(x) for x in draws(0, 0, 0, "test").normal(20_000)]
    logit = torch.tensor([logit_normal_t(x, 0.5, 1.2, 1.0) for x in normals]).logit()
    # Standard error of mean and deviation of 20,000 draws: below 0.01.
    assert logit.mean() == pytest.approx(0.5, abs=0.03)
    assert logit.std() == pytest.approx(1.2, abs=0.03)
    uniform = torch.tensor([uniform_t(x, 1.0) for x in normals])
    for level in (0.1, 0.5, 0.9):
        assert (uniform < level).float().mean() == pytest.approx(level, abs=0.02)


def test_logit_normal_does_not_overflow():
    assert logit_normal_t(-1e4, 0.0, 1.0, 3.0) == 0.0
    assert logit_normal_t(1e4, 0.0, 1.0, 3.0) == 1.0
