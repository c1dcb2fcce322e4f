from dataclasses import replace

import numpy as np
import pytest
import torch

from framework.data.config import SyntheticConfig
from framework.demo.clips.moving_shapes import clip_spec, held_out_prompts, render
from framework.demo.reader import Rate, Reading, read_shape, score, wilson
from framework.video import decode, encode
from model_zoo.codecs.haar import HaarConfig

CONFIG = SyntheticConfig(seed=3)
RED, BLACK = np.array([220, 40, 40]), np.array([0, 0, 0])


def after_h264(spec, resize=False):
    scale = spec.scale if resize else 1
    size = (round(spec.height / scale), round(spec.width / scale))
    return decode(encode(render(spec), CONFIG.fps), range(spec.num_frames), *size)


@pytest.fixture(scope="module")
def moving():
    """Held-out clips as a decoder gives them."""
    specs = held_out_prompts(CONFIG, 100)
    return [(spec, after_h264(spec)) for spec in specs]


@pytest.mark.slow
def test_real_clips_are_read_right():
    """Stills and large clips included, half of the latter resized as the pipeline does."""
    specs = [clip_spec(CONFIG, index) for index in range(200)] + held_out_prompts(CONFIG, 150)
    scores = score([after_h264(spec, i % 2 == 0) for i, spec in enumerate(specs)], specs)
    assert scores.count == 350
    assert scores.colour.value >= 0.99
    assert scores.shape.value >= 0.99
    assert scores.direction.value >= 0.99
    assert scores.all_three.value >= 0.97


def test_clips_are_read_right_after_the_demos_codec(moving):
    """The demo's model cannot be better than its codec: that must not be what limits it."""
    codec = HaarConfig().build()
    decoded = []
    for _, frames in moving[:50]:
        video = torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1
        video = codec.decode(codec.encode(video), len(frames)).movedim(1, -1)
        decoded.append(((video + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    assert score(decoded, [spec for spec, _ in moving[:50]]).all_three.value >= 0.95


def test_a_little_noise_is_forgiven(moving):
    rng = np.random.default_rng(0)
    noisy = [np.clip(f + rng.normal(0, 8, f.shape), 0, 255).astype(np.uint8) for _, f in moving]
    assert score(noisy, [spec for spec, _ in moving]).all_three.value >= 0.95


def test_shuffled_frames_have_no_direction(moving):
    rng = np.random.default_rng(0)
    read = [read_shape(frames[rng.permutation(len(frames))]) for _, frames in moving]
    assert sum(reading.direction is not None for reading in read) <= 2
    assert all(
        reading.colour == spec.colour for reading, (spec, _) in zip(read, moving, strict=True)
    )


def test_standing_shapes_have_no_direction(moving):
    for _, frames in moving[:30]:
        assert read_shape(np.repeat(frames[:1], len(frames), axis=0)).direction is None


def test_backward_clips_have_the_opposite_direction(moving):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for spec, frames in moving[:30]:
        assert read_shape(frames[::-1]).direction == opposite[spec.direction]


def test_diagonal_motion_has_no_direction():
    disc = [_ellipse(12 + i, 12 + i, 8, 8) for i in range(8)]
    reading = read_shape(_paint(np.stack(disc)))
    assert (reading.shape, reading.direction) == ("circle", None)


def test_wrong_colours_are_not_taken_for_right(moving):
    for spec, frames in moving[:30]:
        reading = read_shape(frames[..., [1, 2, 0]])  # every colour becomes another one
        assert reading.colour not in (None, spec.colour)
        assert reading.shape == spec.shape
    white, orange = np.array([255, 255, 255]), np.array([255, 130, 0])
    for colour in (white, orange):
        reading = read_shape(
            _paint(np.stack([_ellipse(16, 12 + i, 8, 8) for i in range(8)]), colour)
        )
        assert (reading.colour, reading.shape, reading.direction) == (None, "circle", "right")


def _ellipse(y, x, height, width):
    rows, columns = np.mgrid[:32, :32] + 0.5
    return ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 <= 1


def _paint(mask, colour=RED):
    return np.where(mask[..., None], colour, BLACK).astype(np.uint8)


@pytest.mark.parametrize(
    "blob",
    [
        _ellipse(16, 16, 5, 12),
        _ellipse(10, 10, 5, 5) | _ellipse(22, 21, 6, 6),
        _ellipse(16, 16, 10, 10) & ~_ellipse(16, 16, 6, 6),
        _ellipse(16, 16, 9, 9) & (np.mgrid[:32, :32][1] > 16),
    ],
    ids=["ellipse", "two lumps", "ring", "half disc"],
)
def test_blobs_have_no_shape(blob):
    assert read_shape(_paint(np.stack([blob] * 8))).shape is None


def test_wobbling_shapes_have_no_direction():
    """It drifts to the right on the whole, as many a blob does, but not steadily."""
    offsets = [0, 4, 1, 6, 2, 8, 4, 9]
    reading = read_shape(_paint(np.stack([_ellipse(16, 10 + x, 8, 8) for x in offsets])))
    assert (reading.shape, reading.direction) == ("circle", None)


def test_noise_and_emptiness_are_unreadable():
    noise = np.random.default_rng(0).integers(0, 256, (20, 12, 32, 32, 3), dtype=np.uint8)
    for frames in noise:
        reading = read_shape(frames)
        assert (reading.colour, reading.shape, reading.direction) == (None, None, None)
    assert read_shape(np.full((8, 32, 32, 3), 90, np.uint8)) == Reading()


def test_a_shape_that_comes_and_goes_is_unreadable(moving):
    spec, frames = moving[0]
    frames = frames.copy()
    frames[::2] = frames[0, 0, 0]
    assert read_shape(frames) == Reading()
    assert read_shape(moving[0][1]).colour == spec.colour


def test_score_counts_attributes_apart():
    specs = held_out_prompts(CONFIG, 4)
    clips = [render(spec) for spec in specs]
    clips[0] = clips[0][:1].repeat(len(clips[0]), axis=0)
    asked = [*specs[:3], replace(specs[3], shape="hexagon")]
    scores = score(clips, asked)
    assert (scores.colour.value, scores.shape.value, scores.direction.value) == (1.0, 0.75, 0.75)
    assert scores.all_three.value == 0.5
    with pytest.raises(ValueError, match="4 clips for 3 specs"):
        score(clips, specs[:3])


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # From R's prop.test(correct=FALSE), and by hand: at p = 0 the upper end is z²/(n + z²).
        (7, 10, 0.3968, 0.8922),
        (0, 200, 0.0, 0.01885),
        (200, 200, 0.98115, 1.0),
        (120, 200, 0.5309, 0.6654),
    ],
)
def test_wilson(hits, count, low, high):
    rate = wilson(hits, count)
    assert rate == Rate(hits / count, pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
