import pytest
import torch

from framework.diffusion.schedule import (
    interpolate,
    logit_normal_t,
    sampling_grid,
    shift_t,
    uniform_t,
)
from framework.seeding import draws


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.7, 3.0, 17.3])
def test_grid_runs_from_noise_to_data(shift):
    grid = sampling_grid(7, shift)
    assert len(grid) == 8
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    assert grid == sorted(grid, reverse=True)


def test_shift_is_the_published_formula():
    assert shift_t(0.5, 3.0) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert shift_t(0.3, 1.0) == pytest.approx(0.3)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        sampling_grid(0, 1.0)


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


def test_ends_of_the_path():
    latents, noise = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(interpolate(latents, noise, torch.zeros(3, 1)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(3, 1)), noise)
