"""Which frames and which size of a clip an epoch sees, and how many tokens that makes.

`Geometry.token_grid` is THE count of tokens: planner, reader and sampler all ask it, since a pack
overflows as soon as two of them count differently. Choosing is vectorised over clips, and depends
on (seed, epoch, clip_id) alone; ratios are compared without logarithms, so that every machine
rounds alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from framework.seeding import hash64, hash64_array

# Sizes whose aspect ratios differ by less than this factor count as the same shape, and the larger
# is taken: rounding to multiples of 16 alone moves 16:9 from 1.75 to 1.78. Chosen by hand.
SAME_ASPECT = 1.05

# Why a clip cannot be used, and which options say so. The last is the planner's.
REFUSALS = {
    "too_small": "smaller than all of data.views.sizes (data.views.max_upscale lets them grow)",
    "still": "of one frame (data.views.stills)",
    "too_short": "shorter than the shortest of data.views.frames at data.views.fps",
    "over_budget": "over data.max_tokens even at the shortest of data.views.frames",
    "too_much_text": "over data.max_text_tokens",
}

# What the view of a clip follows from, beside its id: columns of the manifest.
SEEN = ("num_frames", "fps", "height", "width")


@dataclass(frozen=True)
class Geometry:
    """How frames become tokens: the codec's strides, then the model's patch (time, height, width).

    `causal` codecs give the first frame a latent of its own.
    """

    temporal_stride: int
    spatial_stride: int
    causal: bool
    patch_size: tuple[int, int, int]

    def __post_init__(self) -> None:
        for value in (self.temporal_stride, self.spatial_stride, *self.patch_size):
            if value < 1:
                raise ValueError(f"{self}: strides and patch must be at least 1")

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Rows of tokens (F, H, W) of a view; frames and pixels left over take a whole row."""
        if min(num_frames, height, width) < 1:
            raise ValueError(f"a view of {num_frames}x{height}x{width} is empty; use 1 or more")
        if self.causal:
            latent_frames = 1 + -(-(num_frames - 1) // self.temporal_stride)
        else:
            latent_frames = -(-num_frames // self.temporal_stride)
        latents = (
            latent_frames,
            -(-height // self.spatial_stride),
            -(-width // self.spatial_stride),
        )
        f, h, w = (-(-n // p) for n, p in zip(latents, self.patch_size, strict=True))
        return f, h, w

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """The product of `token_grid`."""
        return math.prod(self.token_grid(num_frames, height, width))


@dataclass(frozen=True)
class View:
    """What is seen of a clip: every `stride`-th frame, resized to cover, cropped at the centre."""

    first_frame: int
    stride: int
    num_frames: int
    height: int
    width: int
    flip: bool = False

    @property
    def frames(self) -> range:
        """Indices of the frames in the clip."""
        stop = self.first_frame + self.num_frames * self.stride
        return range(self.first_frame, stop, self.stride)


@dataclass(frozen=True)
class ViewConfig:
    """The views that a recipe allows.

    A clip takes the longest of `frames` that its duration and the token budget allow, and of
    `sizes` the one of nearest aspect ratio, the largest where several are near.
    """

    frames: tuple[int, ...]  # allowed numbers of frames
    sizes: tuple[tuple[int, int], ...]  # allowed (height, width)
    fps: float | None = (
        None  # what the model should see, as near as a whole stride comes; None: all
    )
    max_upscale: float = 1.0
    flip: bool = False  # mirror half of the clips, another half in every epoch
    stills: bool = True  # clips of one frame are used, as views of one frame

    def __post_init__(self) -> None:
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f"frames={self.frames} must be one or more positive numbers")
        if not self.sizes or min(min(size) for size in self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} must be one or more (height, width) in pixels")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be positive; use null for a clip's own rate")
        if not self.max_upscale > 0:
            raise ValueError(f"max_upscale={self.max_upscale} must be positive; 1 allows none")

    @property
    def lengths(self) -> tuple[int, ...]:
        """All numbers of frames that a view may have, ascending."""
        return tuple(sorted({*self.frames, *([1] if self.stills else [])}))

    def smallest_view(self, geometry: Geometry) -> View:
        """The allowed view with the fewest tokens."""
        height, width = min(self.sizes, key=lambda s: (geometry.num_tokens(1, *s), s))
        return View(0, 1, self.lengths[0], height, width)

    def longest_view(self, geometry: Geometry, max_tokens: int) -> View:
        """The allowed view with the most tokens, up to `max_tokens`, which hold the smallest."""
        views = (View(0, 1, t, height, width) for t in self.lengths for height, width in self.sizes)
        sizes = [(geometry.num_tokens(v.num_frames, v.height, v.width), v) for v in views]
        return max((one for one in sizes if one[0] <= max_tokens), key=lambda one: one[0])[1]

    def check(self, geometry: Geometry) -> None:
        """ValueError where codec and patch cannot carry these lengths and sizes."""
        cell = (
            geometry.spatial_stride * geometry.patch_size[1],
            geometry.spatial_stride * geometry.patch_size[2],
        )
        for size in self.sizes:
            near = tuple(max(1, round(n / c)) * c for n, c in zip(size, cell, strict=True))
            if near != size:
                raise ValueError(
                    f"sizes has {size}: height must be divisible by {cell[0]} and width by "
                    f"{cell[1]} (spatial stride times patch); try {near}"
                )
        for length in self.frames if geometry.causal else ():
            extra = (length - 1) % geometry.temporal_stride
            if extra:
                raise ValueError(
                    f"frames has {length}: a causal codec wants 1 + k * "
                    f"{geometry.temporal_stride} frames; try {length - extra}"
                )


@dataclass(frozen=True)
class Views:
    """Views of n clips as columns, (n,) each; where `refused` is not "", the rest means nothing."""

    first_frame: np.ndarray  # int64
    stride: np.ndarray  # int64
    num_frames: np.ndarray  # int64
    height: np.ndarray  # int64
    width: np.ndarray  # int64
    flip: np.ndarray  # bool
    fps: np.ndarray  # float32, frames a second that the model sees
    tokens: np.ndarray  # int64
    refused: np.ndarray  # str: the cause, or ""

    def columns(self) -> dict[str, np.ndarray]:
        """Its columns by name."""
        return dict(vars(self))


def clip_hashes(seed: int, epoch: int, clip_ids: np.ndarray, purpose: str) -> np.ndarray:
    """(n,) ids -> (n,) uint64, a random number for each clip of one epoch and purpose."""
    return hash64_array(hash64(seed, purpose, epoch), clip_ids)


def num_kept(tokens: np.ndarray, rate: float) -> np.ndarray:
    """How many of each clip's tokens (n,) are kept at a rate, rounded up: at least one."""
    return np.ceil(tokens * rate - 1e-9).astype(np.int64)


def kept_tokens(seed: int, epoch: int, clip_id: int, tokens: int, kept: int) -> np.ndarray:
    """(kept,) int64, rising: which of a clip's tokens an epoch keeps."""
    order = np.arange(tokens)
    if kept < tokens:
        drawn = hash64_array(hash64(seed, "keep", epoch, clip_id), order)
        order = np.sort(np.argsort(drawn, kind="stable")[:kept])
    return order


def choose_views(
    clips: Mapping[str, np.ndarray],
    config: ViewConfig,
    geometry: Geometry,
    max_tokens: int,
    seed: int,
    epoch: int,
) -> Views:
    """The view of each clip in an epoch.

    clips: columns clip_id and SEEN, (n,) each. Causes of refusal are those
    of REFUSALS but the last.
    """
    num_frames = clips["num_frames"].astype(np.int64)
    native_fps = clips["fps"].astype(np.float64)
    is_still = num_frames == 1
    size, has_size = _choose_sizes(clips["height"], clips["width"], config)

    stride = np.ones_like(num_frames)
    if config.fps is not None:
        stride = np.maximum(1, np.floor(native_fps / config.fps + 0.5)).astype(np.int64)
        stride[is_still] = 1
    fps = native_fps / stride
    if config.fps is not None:
        fps[is_still] = config.fps  # a still has no rate of its own: let it look like its like

    # Row 0 is the length of stills, allowed to a longer clip only where `frames` has it.
    lengths = np.array(sorted({1, *config.frames}))
    tokens = np.array(
        [[geometry.num_tokens(int(t), *size) for size in config.sizes] for t in lengths]
    )
    shortest = np.where(is_still | (1 in config.frames), 0, 1)
    by_duration = np.searchsorted(lengths, 1 + (num_frames - 1) // stride, side="right") - 1
    by_budget = (tokens <= max_tokens).sum(axis=0)[size] - 1
    length = np.maximum(np.minimum(by_duration, by_budget), 0)

    refused = np.select(
        [~has_size, is_still & (not config.stills), by_duration < shortest, by_budget < shortest],
        ["too_small", "still", "too_short", "over_budget"],
        default="",
    )
    slack = num_frames - ((lengths[length] - 1) * stride + 1)
    crop = clip_hashes(seed, epoch, clips["clip_id"], "crop")
    flip = clip_hashes(seed, epoch, clips["clip_id"], "flip") >> np.uint64(63)
    sizes = np.array(config.sizes)
    return Views(
        first_frame=(crop % (np.maximum(slack, 0) + 1).astype(np.uint64)).astype(np.int64),
        stride=stride,
        num_frames=lengths[length],
        height=sizes[size, 0],
        width=sizes[size, 1],
        flip=(flip == 1) & config.flip,
        fps=fps.astype(np.float32),
        tokens=tokens[length, size],
        refused=refused,
    )


def stored_views(clips: Mapping[str, np.ndarray], geometry: Geometry, max_tokens: int) -> Views:
    """Each clip as it is, for clips that hold a view already; "over_budget" is refused."""
    shapes = [clips[name].astype(np.int64) for name in ("num_frames", "height", "width")]
    distinct, which = np.unique(np.stack(shapes), axis=1, return_inverse=True)
    counts = np.array([geometry.num_tokens(*shape) for shape in distinct.T.tolist()], np.int64)
    tokens = counts[which.reshape(-1)]
    return Views(
        first_frame=np.zeros_like(tokens),
        stride=np.ones_like(tokens),
        num_frames=shapes[0],
        height=shapes[1],
        width=shapes[2],
        flip=np.zeros(len(tokens), bool),
        fps=clips["fps"].astype(np.float32),
        tokens=tokens,
        refused=np.where(tokens > max_tokens, "over_budget", ""),
    )


def _choose_sizes(
    heights: np.ndarray, widths: np.ndarray, config: ViewConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) index of the best of `config.sizes`, and (n,) bool whether any is allowed."""
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    mismatches = []  # by size, (n,): how far the aspect ratios are apart, 1 for equal
    for height, width in config.sizes:
        ours, theirs = width * heights, height * widths
        mismatch = np.maximum(ours, theirs) / np.minimum(ours, theirs)
        allowed = (height <= heights * config.max_upscale) & (width <= widths * config.max_upscale)
        mismatches.append(np.where(allowed, mismatch, np.inf))
    nearest = np.min(mismatches, axis=0)
    best, best_area = np.zeros(len(heights), np.int64), np.zeros(len(heights), np.int64)
    for i, (height, width) in enumerate(config.sizes):
        better = (mismatches[i] <= nearest * SAME_ASPECT) & (height * width > best_area)
        best[better], best_area[better] = i, height * width
    return best, np.isfinite(nearest)
