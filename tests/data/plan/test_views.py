"""Views: the one token count, and which frames and size a clip is seen at."""

import numpy as np
import pytest

from framework.data.plan.views import Geometry, View, ViewConfig, choose_views

CAUSAL = Geometry(temporal_stride=4, spatial_stride=8, causal=True, patch_size=(1, 2, 2))
HAAR = Geometry(temporal_stride=4, spatial_stride=8, causal=False, patch_size=(1, 1, 1))
CONFIG = ViewConfig(frames=(8, 16, 48), sizes=((32, 32), (32, 48), (48, 32)), fps=8.0)


@pytest.mark.parametrize(
    ("geometry", "view", "grid"),
    [
        (CAUSAL, (1, 256, 448), (1, 16, 28)),
        (CAUSAL, (17, 256, 448), (5, 16, 28)),
        (CAUSAL, (18, 250, 450), (6, 16, 29)),
        (HAAR, (1, 32, 48), (1, 4, 6)),
        (HAAR, (8, 32, 48), (2, 4, 6)),
        (HAAR, (9, 33, 48), (3, 5, 6)),
        (Geometry(1, 1, False, (2, 2, 2)), (5, 4, 3), (3, 2, 2)),
    ],
)
def test_token_grid(geometry, view, grid):
    assert geometry.token_grid(*view) == grid
    assert geometry.num_tokens(*view) == np.prod(grid)


def choose(clips, config=CONFIG, geometry=HAAR, max_tokens=10_000, seed=0, epoch=0, ids=None):
    """clips: (num_frames, fps, height, width) of each."""
    columns = dict(zip(("num_frames", "fps", "height", "width"), np.array(clips).T, strict=True))
    columns["clip_id"] = np.arange(len(clips)) if ids is None else np.array(ids)
    return choose_views(columns, config, geometry, max_tokens, seed, epoch)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (720, 1280, (720, 1280)),
        (480, 854, (256, 448)),
        # Exactly 256:448; but 720:1280 is nearly the same shape, and larger.
        (1024, 1792, (720, 1280)),
        (1080, 1080, (256, 256)),
        # Nothing is upscaled: 640 is too narrow for 1280, whatever the shape.
        (360, 640, (256, 448)),
        (1280, 720, (448, 256)),
        # Every size that fits is far off; the nearest is taken all the same.
        (256, 4000, (256, 448)),
    ],
)
def test_nearest_shape_without_upscaling(height, width, size):
    sizes = ((256, 256), (256, 448), (448, 256), (720, 1280))
    views = choose([(20, 8, height, width)], ViewConfig(frames=(8,), sizes=sizes))
    assert (views.height[0], views.width[0]) == size


def test_max_upscale_allows_that_much():
    config = ViewConfig(frames=(8,), sizes=((64, 64),), max_upscale=2.0)
    assert choose([(8, 8, 32, 40), (8, 8, 31, 40)], config).refused.tolist() == ["", "too_small"]


@pytest.mark.parametrize(
    ("num_frames", "fps", "stride", "length", "seen_fps"),
    [
        (50, 8, 1, 48, 8),
        (47, 8, 1, 16, 8),
        (16, 8, 1, 16, 8),
        (8, 8, 1, 8, 8),
        (48, 24, 3, 16, 8),
        (46, 24, 3, 16, 8),  # frames 0, 3, …, 45
        (45, 24, 3, 8, 8),
        (200, 30, 4, 48, 7.5),  # the nearest whole stride
        (100, 4, 1, 48, 4),  # frames are never doubled
        (1, 24, 1, 1, 8),  # a still is given the rate of the others
    ],
)
def test_longest_length_at_the_nearest_stride(num_frames, fps, stride, length, seen_fps):
    views = choose([(num_frames, fps, 32, 32)])
    assert views.refused[0] == ""
    assert (views.stride[0], views.num_frames[0], views.fps[0]) == (stride, length, seen_fps)


def test_no_fps_means_every_frame():
    config = ViewConfig(frames=(8, 16), sizes=((32, 32),))
    views = choose([(20, 24, 32, 32), (20, 30, 32, 32)], config)
    assert views.stride.tolist() == [1, 1]
    assert views.fps.tolist() == [24, 30]


def test_causes_of_refusal():
    no_stills = ViewConfig(frames=(8,), sizes=((32, 32),), stills=False)
    clips = [(8, 8, 31, 64), (1, 8, 32, 32), (7, 8, 32, 32), (8, 8, 32, 32)]
    assert choose(clips, no_stills).refused.tolist() == ["too_small", "still", "too_short", ""]
    # 8 frames are 2 x 4 x 4 tokens, a still is 16.
    config = ViewConfig(frames=(8, 16), sizes=((32, 32),))
    clips = [(16, 8, 32, 32), (1, 8, 32, 32)]
    assert choose(clips, config, max_tokens=31).refused.tolist() == ["over_budget", ""]


def test_a_clip_over_budget_takes_a_shorter_view():
    views = choose([(48, 8, 32, 32), (48, 8, 32, 48)], max_tokens=64)
    assert views.num_frames.tolist() == [16, 8]
    assert views.tokens.tolist() == [64, 48]


def test_single_frames_of_a_video_only_where_frames_has_one():
    clip = [(5, 8, 32, 32)]
    assert choose(clip, ViewConfig(frames=(1, 8), sizes=((32, 32),))).num_frames[0] == 1
    assert choose(clip, ViewConfig(frames=(8,), sizes=((32, 32),))).refused[0] == "too_short"


def test_first_frame_covers_the_slack_and_belongs_to_clip_and_epoch():
    clips = [(20, 8, 32, 32)] * 400  # views of 16 frames: 0 to 4
    views = choose(clips)
    counts = np.bincount(views.first_frame)
    assert len(counts) == 5
    # 400 fair draws over 5 values: 80 each, standard deviation 8; five of them.
    assert counts.min() > 40
    assert (choose(clips, epoch=1).first_frame != views.first_frame).any()
    assert (choose(clips, seed=1).first_frame != views.first_frame).any()
    alone = choose(clips[:1], ids=[399])
    assert alone.first_frame[0] == views.first_frame[399]


def test_a_view_stays_inside_its_clip():
    rng = np.random.default_rng(0)
    clips = np.stack(
        [rng.integers(1, 300, 500), rng.integers(5, 61, 500), *rng.integers(20, 99, (2, 500))], 1
    )
    views = choose(clips)
    used = views.refused == ""
    assert 100 < used.sum() < 500
    last = views.first_frame + (views.num_frames - 1) * views.stride
    assert (last < clips[:, 0])[used].all()
    assert (views.first_frame >= 0)[used].all()
    assert (views.height <= clips[:, 2])[used].all()


def test_flip_is_half_of_the_clips_and_off_by_default():
    clips = [(8, 8, 32, 32)] * 400
    assert not choose(clips).flip.any()
    flip = choose(clips, ViewConfig(frames=(8,), sizes=((32, 32),), flip=True)).flip
    assert 150 < flip.sum() < 250  # five standard deviations


def test_view_frames():
    assert list(View(3, 2, 4, 32, 32).frames) == [3, 5, 7, 9]


def test_smallest_view():
    assert CONFIG.smallest_view(HAAR) == View(0, 1, 1, 32, 32)
    assert ViewConfig((8,), ((48, 48), (32, 64)), stills=False).smallest_view(HAAR).width == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": ()}, "frames"),
        ({"frames": (0,)}, "frames"),
        ({"sizes": ()}, "sizes"),
        ({"fps": 0.0}, "fps=0.0 must be positive"),
        ({"max_upscale": 0.0}, "max_upscale"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ViewConfig(**{"frames": (8,), "sizes": ((32, 32),), **changes})


def test_lengths_and_sizes_must_suit_the_codec():
    with pytest.raises(ValueError, match=r"divisible by 16 .* try \(256, 448\)"):
        ViewConfig((17,), ((256, 450),)).check(CAUSAL)
    with pytest.raises(ValueError, match=r"1 \+ k \* 4 frames; try 17"):
        ViewConfig((18,), ((256, 448),)).check(CAUSAL)
    ViewConfig((1, 17), ((256, 448),)).check(CAUSAL)
    with pytest.raises(ValueError, match="at least 1"):
        Geometry(4, 0, False, (1, 1, 1))
