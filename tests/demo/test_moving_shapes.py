import hashlib
from dataclasses import replace

import numpy as np
import pytest

from framework.data.config import SyntheticConfig
from framework.demo.clips.moving_shapes import (
    AREA,
    COLOURS,
    NUM_FRAMES,
    OVERHANG,
    REACH,
    SHAPES,
    SIZES,
    SPEEDS,
    ClipSpec,
    caption,
    clip_spec,
    coverage,
    held_out_prompts,
    num_shards,
    render,
    shard_samples,
    write_clips,
)
from framework.video import decode, encode, probe

CONFIG = SyntheticConfig()
# SHA-256 of the frames of the first hundred clips.
DIGEST = "58b993fa1352d61f9bc9347bf1ac44bac910dc63341d592b306b5a863b0cf6f8"


@pytest.fixture(scope="module")
def specs():
    return [clip_spec(CONFIG, index) for index in range(CONFIG.num_clips)]


def test_captions():
    spec = ClipSpec("circle", "red", "grey", "left", "quickly", 8, 32, 32, 8.0, (16.0, 20.0))
    assert caption(spec) == "a red circle moves left quickly over grey"
    assert caption(replace(spec, direction=None, speed=None)) == "a red circle over grey"


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_the_centre_that_are_asked_for(shape):
    y, x, radius = np.array([30.2, 25.0]), np.array([33.7, 30.5]), np.array([8.0, 12.5])
    alpha = coverage(shape, y, x, radius, 64, 64).astype(np.float64)
    area = alpha.sum(axis=(1, 2))
    # Corners are rounded off by the smoothing of one pixel.
    np.testing.assert_allclose(area, AREA[shape] * radius**2, rtol=0.01)
    rows = alpha.sum(axis=2) @ (np.arange(64) + 0.5) / area
    columns = alpha.sum(axis=1) @ (np.arange(64) + 0.5) / area
    np.testing.assert_allclose(rows, y, atol=0.1)
    np.testing.assert_allclose(columns, x, atol=0.1)


def test_a_clip_is_a_pure_function_of_seed_and_index(specs):
    assert [clip_spec(CONFIG, i) for i in (11, 5)] == [specs[11], specs[5]]
    assert clip_spec(SyntheticConfig(seed=1), 5) != specs[5]
    np.testing.assert_array_equal(render(specs[5]), render(specs[5]))
    # Pinned: another machine, or a later version, must render the same bytes.
    digest = hashlib.sha256(b"".join(render(spec).tobytes() for spec in specs[:100]))
    assert digest.hexdigest() == DIGEST


def test_shapes_never_leave_the_frame(specs):
    for spec in specs:
        steps = spec.num_frames - 1
        path = (SPEEDS[spec.speed] if spec.speed else 0.0) * spec.scale * steps
        sign = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
        dy, dx = sign.get(spec.direction, (0, 0))
        up, down, side = (reach * spec.radius for reach in REACH[spec.shape])
        margin = OVERHANG * spec.scale + 1e-9
        for y, x in (spec.start, (spec.start[0] + dy * path, spec.start[1] + dx * path)):
            assert up - margin <= y <= spec.height - down + margin
            assert side - margin <= x <= spec.width - side + margin


def test_every_kind_of_clip_exists(specs):
    assert {(spec.height, spec.width) for spec in specs} == {
        (scale * height, scale * width) for scale in (1, 2) for height, width in SIZES
    }
    moving = [spec for spec in specs if spec.direction]
    assert {spec.num_frames for spec in moving} == set(NUM_FRAMES)
    assert {spec.num_frames for spec in specs if not spec.direction} == {1}
    # Shares within four standard deviations of what the config says.
    assert 1 - len(moving) / len(specs) == pytest.approx(CONFIG.still_share, abs=0.03)
    assert np.mean([s.scale == 2 for s in specs]) == pytest.approx(CONFIG.large_share, abs=0.03)
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("speed", SPEEDS)):
        counts = [sum(getattr(s, name) == value for s in moving) for value in values]
        assert min(counts) > 0.7 * np.mean(counts)
    # The planner's long packs want long clips: enough of them to learn from.
    assert sum(spec.num_frames == 48 for spec in moving) > 80


def test_motion_shows_in_the_pixels(specs):
    spec = next(s for s in specs if s.direction == "right" and s.num_frames == 12)
    frames = render(spec).astype(int)
    weight = np.abs(frames - frames[0, 0, 0]).sum(axis=-1)
    x = weight.sum(axis=1) @ np.arange(spec.width) / weight.sum(axis=(1, 2))
    # A shape at the border loses a part, and its centroid lags by some tenths of a pixel.
    assert np.median(np.diff(x)) == pytest.approx(SPEEDS[spec.speed] * spec.scale, abs=0.1)


def test_held_out_prompts_have_captions_that_no_clip_has(specs):
    prompts = held_out_prompts(CONFIG, 250)
    assert len(prompts) == 250
    assert prompts[:200] == held_out_prompts(CONFIG)
    assert {caption(s) for s in prompts}.isdisjoint(caption(s) for s in specs)
    assert len({caption(s) for s in prompts}) > 40
    assert all(s.direction and 8 <= s.num_frames <= 24 for s in prompts)
    assert {(s.height, s.width) for s in prompts} == set(SIZES)
    assert {s.colour for s in prompts} == set(COLOURS)
    assert {s.shape for s in prompts} == set(SHAPES)


def test_samples_hold_what_their_spec_says():
    config = SyntheticConfig(num_clips=60, still_share=0.5, png_share=0.5)
    kinds = set()
    for index, sample in enumerate(write_clips(config, range(60))):
        spec = clip_spec(config, index)
        (kind,) = sample.keys() - {"__key__", "json"}
        kinds.add((kind, spec.num_frames == 1))
        assert sample["__key__"] == f"clip-{index:06d}"
        assert sample["json"]["caption"] == caption(spec)
        data = sample[kind]
        info = probe(data)
        assert (info.num_frames, info.height, info.width) == (
            spec.num_frames,
            spec.height,
            spec.width,
        )
        assert info.num_frames == 1 or info.fps == config.fps
        decoded = decode(data, range(spec.num_frames), spec.height, spec.width)
        error = np.abs(decoded.astype(int) - render(spec)).mean()
        assert error == 0 if kind == "png" else error < 8  # colour has half the resolution
    assert kinds == {("mp4", False), ("mp4", True), ("png", True)}


def test_shards_cover_every_clip_once():
    config = SyntheticConfig(num_clips=23, clips_per_shard=10)
    assert num_shards(config) == 3
    keys = [s["__key__"] for shard in range(3) for s in shard_samples(config, shard)]
    assert keys == [f"clip-{index:06d}" for index in range(23)]
    with pytest.raises(ValueError, match="num_shards=3"):
        shard_samples(config, 3)


@pytest.mark.parametrize(
    "change", [{"num_clips": 0}, {"clips_per_shard": 0}, {"png_share": 1.5}, {"fps": 0.0}]
)
def test_config_refuses(change):
    with pytest.raises(ValueError, match="must"):
        SyntheticConfig(**change)


def test_the_same_clip_is_the_same_bytes() -> None:
    """The third clip had 13 encodings in 60 runs, with x264's macroblock tree."""
    frames = render(clip_spec(CONFIG, 2))
    assert len({encode(frames, 8.0) for _ in range(40)}) == 1
