import pytest

from framework.diffusion.schedule import sampling_grid, shift_t


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
