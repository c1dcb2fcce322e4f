"""Captioned clips of one moving shape: the data of the demo, of tests and of benchmarks.

"a red circle moves left quickly over grey" is a clip of 8 to 48 frames at 8 frames a second, in
one of three aspect ratios; a share is a still ("a red circle over grey"), and a share is rendered
at twice the size, so that the pipeline has something to resize. Bytes are real H.264 MP4, or PNG
for some of the stills.

Motion is a straight line at constant speed that never leaves the frame by more than OVERHANG:
nothing wraps or bounces, so that every single frame shows a whole shape and every pair of frames
shows the direction. A frame of 32 pixels has little room for that, so what fits decides: a caption
is drawn first, then a size and a duration together among those in which the path of that caption
fits, then a radius that leaves the room. So quick clips last 1 to 3 s (two at most along a short
side), slow ones up to 4 s, and 6 s along the long side of a frame. Bending the speed to the
duration instead would make "slowly" and "quickly" mean nothing in pixels.

An eighth of the moving captions is never drawn for a clip: `held_out_prompts` draws from those.

Invariant: a clip is a pure function of (config.seed, index), to the byte for `render`.
"""

import io
import json
import math
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

from framework.data.config import SyntheticConfig
from framework.data.shards.tar import write_shards
from framework.seeding import draws, hash64
from framework.storage import Store
from framework.video import encode

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 50),
    "purple": (170, 60, 220),
    "cyan": (50, 220, 230),
}
BACKGROUNDS = {"black": (0, 0, 0), "grey": (90, 90, 90), "navy": (16, 24, 88)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)
SPEEDS = {"slowly": 0.6, "quickly": 1.5}  # pixels a frame where the short side has 32
SIZES = ((32, 32), (32, 48), (48, 32))  # (height, width)
# Weights of the durations among those that fit; few captions fit the long ones, hence their weight.
NUM_FRAMES = {8: 0.2, 12: 0.2, 16: 0.2, 24: 0.2, 32: 0.3, 48: 0.4}
# Large shapes are easier to learn: at 7 to 9.5 pixels a model of the demo's size drew blobs. With
# more than 12 too few paths fit.
RADIUS = (9.5, 12.0)
OVERHANG = 1.0  # pixels by which a shape may leave the frame at the ends of its path
HELD_OUT_ONE_IN = 8

# By shape, in units of the radius: reach of the shape up, down and to either side of its centroid.
# Shapes of one radius have about one area, and are far apart: no two of one area and centroid
# overlap by more than 0.7 (IoU). A square and a circle do by 0.83, and a model of the demo's size
# takes long to draw the difference. The triangle is equilateral, its tip up; were it less, a codec
# that keeps blocks of 2 x 2 pixels would leave too little of its corners to be read.
_CROSS, _ARM = 1.2, 0.4  # reach and half the width of a bar
_TRIANGLE = 1.5
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "cross": (_CROSS, _CROSS, _CROSS),
    "triangle": (_TRIANGLE, _TRIANGLE / 2, _TRIANGLE * math.sqrt(0.75)),
}
SHAPES = tuple(REACH)
# By shape: area for radius 1.
AREA = {
    "circle": math.pi,
    "cross": 8 * _CROSS * _ARM - 4 * _ARM**2,
    "triangle": 0.75 * math.sqrt(3) * _TRIANGLE**2,
}


@dataclass(frozen=True)
class ClipSpec:
    """All there is to know of a clip; lengths in pixels, `start` the centroid (y, x) in frame 0."""

    shape: str
    colour: str
    background: str
    direction: str | None  # None in a still
    speed: str | None  # None in a still
    num_frames: int
    height: int
    width: int
    radius: float
    start: tuple[float, float]

    @property
    def scale(self) -> float:
        """How much larger than the smallest clips it is; speeds grow with it."""
        return min(self.height, self.width) / 32


def caption(spec: ClipSpec) -> str:
    """The sentence that describes a clip."""
    if spec.direction is None:
        return f"a {spec.colour} {spec.shape} over {spec.background}"
    return (
        f"a {spec.colour} {spec.shape} moves {spec.direction} {spec.speed} over {spec.background}"
    )


def coverage(
    shape: str, y: np.ndarray, x: np.ndarray, radius: float | np.ndarray, height: int, width: int
) -> np.ndarray:
    """How much of each pixel a shape covers, (T, height, width) float32 from 0 to 1.

    y, x: (T,) centroid in each frame, where pixel i reaches from i to i + 1; radius: one or (T,).
    Edges are smoothed over one pixel by the distance to the outline.
    """
    r = np.broadcast_to(np.asarray(radius, np.float32), y.shape)[:, None, None]
    dy = (np.arange(height) + 0.5)[None, :, None] - y[:, None, None]
    dx = np.abs((np.arange(width) + 0.5)[None, None, :] - x[:, None, None])
    dy, dx = dy.astype(np.float32), dx.astype(np.float32)
    if shape == "circle":
        inside = r - np.sqrt(dy * dy + dx * dx)
    elif shape == "cross":
        long, short = np.maximum(np.abs(dy), dx), np.minimum(np.abs(dy), dx)
        inside = np.minimum(np.float32(_CROSS) * r - long, np.float32(_ARM) * r - short)
    elif shape == "triangle":
        half = np.float32(_TRIANGLE / 2) * r  # the inner radius: distance of an edge
        slope = np.float32(math.sqrt(0.75))
        inside = half - np.maximum(dy, slope * dx - np.float32(0.5) * dy)
    else:
        raise ValueError(f"shape={shape!r} must be one of {', '.join(SHAPES)}")
    return np.clip(inside + np.float32(0.5), 0, 1)


def render(spec: ClipSpec) -> np.ndarray:
    """The frames of a clip, (T, height, width, 3) uint8 RGB."""
    travelled = np.arange(spec.num_frames) * (_speed(spec.speed) * spec.scale)
    step_y, step_x = DIRECTIONS[spec.direction] if spec.direction else (0, 0)
    y, x = spec.start[0] + step_y * travelled, spec.start[1] + step_x * travelled
    alpha = coverage(spec.shape, y, x, spec.radius, spec.height, spec.width)[..., None]
    back = np.array(BACKGROUNDS[spec.background], np.float32)
    front = np.array(COLOURS[spec.colour], np.float32)
    return np.rint(back + alpha * (front - back)).astype(np.uint8)


def clip_spec(config: SyntheticConfig, index: int) -> ClipSpec:
    """What clip `index` shows."""
    u = draws(config.seed, 0, index, "synthetic").uniform(8)
    if u[0] < config.still_share:
        shape, colour, background = _pick(list(product(REACH, COLOURS, BACKGROUNDS)), u[1])
        attributes = (shape, colour, background, None, None)
    else:
        attributes = _pick(_moving(config.seed)[0], u[1])
    return _place(attributes, u[2:7], max(NUM_FRAMES), 2 if u[7] < config.large_share else 1)


def held_out_prompts(
    config: SyntheticConfig, count: int = 200, max_frames: int = 24
) -> list[ClipSpec]:
    """Moving clips of up to `max_frames` frames, whose captions no clip of `config` has."""
    specs = []
    for index in range(count):
        u = draws(config.seed, 0, index, "synthetic held out").uniform(6)
        attributes = _pick(_moving(config.seed)[1], u[0])
        specs.append(_place(attributes, u[1:], max_frames, 1))
    return specs


def num_shards(config: SyntheticConfig) -> int:
    """How many shards the clips fill."""
    return -(-config.num_clips // config.clips_per_shard)


def shard_samples(config: SyntheticConfig, shard_index: int) -> Iterator[dict[str, Any]]:
    """The samples of one shard, for `write_shards(..., first_shard=shard_index)`."""
    if not 0 <= shard_index < num_shards(config):
        raise ValueError(f"shard_index={shard_index} must be below num_shards={num_shards(config)}")
    first = shard_index * config.clips_per_shard
    return write_clips(config, range(first, min(first + config.clips_per_shard, config.num_clips)))


def write_clips(config: SyntheticConfig, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Samples for a webdataset: "__key__", bytes under "mp4" or "png", and a dict under "json"."""
    for index in indices:
        spec = clip_spec(config, index)
        frames = render(spec)
        as_png = draws(config.seed, 0, index, "synthetic png").uniform(1)[0] < config.png_share
        if spec.num_frames == 1 and as_png:
            buffer = io.BytesIO()
            Image.fromarray(frames[0]).save(buffer, "PNG")
            payload = {"png": buffer.getvalue()}
        else:
            payload = {"mp4": encode(frames, config.fps, config.crf)}
        yield {
            "__key__": f"clip-{index:06d}",
            **payload,
            "json": {
                "caption": caption(spec),
                "source": "synthetic",
                "fps": config.fps,
                "spec": asdict(spec),
            },
        }


_Attributes = tuple[str, str, str, str | None, str | None]


@lru_cache
def _moving(seed: int) -> tuple[list[_Attributes], list[_Attributes]]:
    """The attributes of all moving captions: for clips, and held out."""
    captions: list[_Attributes] = sorted(
        product(REACH, COLOURS, BACKGROUNDS, DIRECTIONS, SPEEDS),
        key=lambda attributes: hash64(seed, "held out", *map(str, attributes)),
    )
    num_held_out = len(captions) // HELD_OUT_ONE_IN
    return captions[num_held_out:], captions[:num_held_out]


def _speed(speed: str | None) -> float:
    return SPEEDS[speed] if speed else 0.0


def _pick(choices: list[Any], u: float) -> Any:
    return choices[int(u * len(choices))]


def _place(attributes: _Attributes, u: np.ndarray, max_frames: int, scale: int) -> ClipSpec:
    """Choose size, duration, radius and start for a caption by u, (5,) uniforms."""
    shape, colour, background, direction, speed = attributes
    axis = 0 if direction in ("up", "down") else 1
    up, down, side = REACH[shape]
    reach = ((up, down), (side, side))  # by axis: towards zero, away from zero
    lengths = {t: p for t, p in NUM_FRAMES.items() if t <= max_frames} if direction else {1: 1.0}

    # How far a shape of radius 1 less can travel: (extent + 2 OVERHANG - path) / sum(reach) is the
    # largest radius that fits.
    choices, weights, largest = [], [], []
    for size, (num_frames, weight) in product(SIZES, lengths.items()):
        path = _speed(speed) * (num_frames - 1)
        room = (size[axis] + 2 * OVERHANG - path) / sum(reach[axis])
        if room >= RADIUS[0]:
            choices.append((size, num_frames, path))
            weights.append(weight)
            largest.append(min(room, RADIUS[1]))
    edges = np.cumsum(weights)
    choice = min(int(np.searchsorted(edges, u[0] * edges[-1], side="right")), len(choices) - 1)
    size, num_frames, path = choices[choice]
    radius = RADIUS[0] + u[1] * (largest[choice] - RADIUS[0])

    start = [0.0, 0.0]
    for i in range(2):
        low, high = reach[i][0] * radius, size[i] - reach[i][1] * radius
        if direction and i == axis:
            low, high = low - OVERHANG, high + OVERHANG
            forward = sum(DIRECTIONS[direction]) > 0
            low, high = (low, high - path) if forward else (low + path, high)
        start[i] = float(low + u[2 + i] * (high - low))
    return ClipSpec(
        shape=shape,
        colour=colour,
        background=background,
        direction=direction,
        speed=speed,
        num_frames=num_frames,
        height=size[0] * scale,
        width=size[1] * scale,
        radius=float(radius * scale),
        start=(start[0] * scale, start[1] * scale),
    )


def write_dataset(config: SyntheticConfig, shards_url: str, processes: int = 1) -> str:
    """Write all clips as shards, unless they are there already; says in a sentence what it did.

    ValueError where the folder holds clips of another config.
    """
    store, marker = Store(shards_url), "synthetic.json"
    wanted = json.dumps(asdict(config), indent=1).encode()
    if store.exists(marker):
        if store.read(marker) != wanted:
            raise ValueError(
                f"{store.url} holds clips of another config ({marker} says which); "
                "choose another data.shards, or delete that folder"
            )
        return f"{config.num_clips:,} clips are in {store.url} already"
    count = num_shards(config)
    # spawn: a fork would copy the threads' locks of whatever the caller has loaded.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_shard, [config] * count, [shards_url] * count, range(count)))
    store.write(marker, wanted)
    return f"{config.num_clips:,} clips in {count} shards written to {store.url}"


def _write_shard(config: SyntheticConfig, shards_url: str, index: int) -> None:
    samples = shard_samples(config, index)
    write_shards(Store(shards_url), samples, config.clips_per_shard, first_shard=index)
