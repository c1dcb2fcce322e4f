"""What judges samples: the Fréchet distance of made videos to real ones, and prompt following."""

from dataclasses import replace

import numpy as np
import pytest

from framework.data.config import SyntheticConfig
from framework.demo.clips.moving_shapes import caption, held_out_prompts, render
from framework.evaluate.metrics.features import RandomConv3d
from framework.evaluate.metrics.metric import Sample
from framework.evaluate.metrics.prompt_following import prompt_following
from framework.evaluate.metrics.video_distance import VideoDistance


@pytest.fixture(scope="module")
def perfect() -> list[Sample]:
    """Videos that show just what is asked for."""
    specs = held_out_prompts(SyntheticConfig(), 4, 16)
    return [Sample(caption(s), render(s), render(s), s) for s in specs]


def test_made_as_real_is_at_distance_zero_and_follows_its_prompts(perfect: list[Sample]) -> None:
    found = VideoDistance(RandomConv3d())(perfect)
    assert found["frechet_num_videos"] == 4
    assert found["frechet_random_conv3d"] == pytest.approx(0, abs=1e-9)
    rates = prompt_following(perfect)
    assert {name for name in rates if not name.endswith(("_low", "_high"))} == {
        "prompt_colour",
        "prompt_shape",
        "prompt_direction",
        "prompt_all_three",
    }
    assert rates["prompt_all_three"] == 1.0
    assert 0.5 < rates["prompt_all_three_low"] < 1.0  # 4 videos say little


def test_noise_is_far_away_and_follows_nothing(perfect: list[Sample]) -> None:
    rng = np.random.default_rng(0)
    noise = [replace(s, made=rng.integers(0, 256, s.real.shape, dtype=np.uint8)) for s in perfect]
    assert VideoDistance(RandomConv3d())(noise)["frechet_random_conv3d"] > 0.1
    assert prompt_following(noise)["prompt_all_three"] == 0.0


def test_videos_of_no_known_shape_have_no_prompt_following(perfect: list[Sample]) -> None:
    assert prompt_following([replace(sample, spec=None) for sample in perfect]) == {}
