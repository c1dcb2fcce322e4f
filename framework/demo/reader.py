"""Read colour, shape and direction back from the pixels of a synthetic clip: prompt following.

The reader is strict, since a loose one is fooled: a fill ratio and a mean drift find a direction
in most amorphous blobs. It looks at pixels alone and refuses (None) what it cannot see for sure:

- colour: the median of a foreground of one colour lies near one of the palette;
- shape: the median over frames of the overlap (IoU) with the best-fitting ideal shape, centred and
  scaled to the foreground, is at least MIN_IOU;
- direction: at least MIN_STEADY of the steps from frame to frame are within MAX_WOBBLE of the
  median step, that step lies along an axis, and start and end of the clip agree with it.

Lengths in pixels hold for clips whose short side has 32, and grow with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from framework.demo.clips.moving_shapes import (
    AREA,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    ClipSpec,
    coverage,
)

# The first three are those of the experiment in which a model first learnt this; the others were
# chosen by hand, with a look at clips that are right and clips that are wrong.
MIN_IOU = 0.8
MIN_STEADY = 0.8  # share of steps
MAX_WOBBLE = 1.5  # pixels
MIN_STEP = 0.5 * min(SPEEDS.values())  # pixels a frame; slower is standing still
MIN_CONTRAST = 60.0  # distance in RGB from the background; the least of our pairs has 124
MAX_COLOUR_ERROR = 80.0  # distance in RGB; the nearest two of the palette are 125 apart
NOISE_ALPHA = 0.15  # below it a pixel is background, whatever its noise
AREAS = (0.03, 0.6)  # share of the frame that one shape may fill


@dataclass(frozen=True)
class Reading:
    """What was seen; None where it could not be seen for sure."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    iou: float = 0.0  # median overlap with the best shape
    step: tuple[float, float] = (0.0, 0.0)  # median motion (y, x) in pixels a frame


@dataclass(frozen=True)
class Rate:
    """A share of successes with its Wilson 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptScores:
    """Shares of clips in which an attribute was read as asked for."""

    count: int
    colour: Rate
    shape: Rate
    direction: Rate
    all_three: Rate


def read_shape(frames: np.ndarray) -> Reading:
    """Read one clip, (T, H, W, 3) uint8 RGB with T >= 1."""
    pixels = frames.astype(np.float32)
    alpha, front = _foreground(pixels)
    mask = alpha > 0.5  # (T, H, W), pixels nearer to the shape's colour than to the background's
    area = mask.sum(axis=(1, 2))  # (T,)
    size = mask.shape[1] * mask.shape[2]
    seen = (area >= AREAS[0] * size) & (area <= AREAS[1] * size)
    if np.mean(seen) < MIN_STEADY:
        return Reading()
    centre = _centroids(alpha)  # (T, 2)
    shape, iou = _best_shape(alpha, centre)
    step, steady = _motion(centre, seen, scale=min(mask.shape[1:]) / 32)
    return Reading(
        colour=_nearest_colour(front, pixels[mask]),
        shape=shape if iou >= MIN_IOU else None,
        direction=_direction(step, scale=min(mask.shape[1:]) / 32) if steady else None,
        iou=iou,
        step=(float(step[0]), float(step[1])),
    )


def score(clips: Sequence[np.ndarray], specs: Sequence[ClipSpec]) -> PromptScores:
    """How often clips, each (T, H, W, 3) uint8, show what their specs ask for.

    A still has no direction, and is right in it where none is read.
    """
    if len(clips) != len(specs) or not specs:
        raise ValueError(f"{len(clips)} clips for {len(specs)} specs; give one or more of each")
    readings = [read_shape(frames) for frames in clips]
    hits = np.array(
        [
            (r.colour == s.colour, r.shape == s.shape, r.direction == s.direction)
            for r, s in zip(readings, specs, strict=True)
        ]
    )
    count = len(specs)
    colour, shape, direction = (wilson(int(n), count) for n in hits.sum(axis=0))
    return PromptScores(count, colour, shape, direction, wilson(int(hits.all(1).sum()), count))


def wilson(hits: int, count: int) -> Rate:
    """The share `hits / count` with its 95 % score interval (Wilson 1927)."""
    z = 1.959964  # the normal's 97.5 % point
    p = hits / count
    centre = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Rate(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def _foreground(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, H, W, 3) -> alpha (T, H, W) from background 0 to shape 1, and the shape's colour (3,)."""
    edges = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
    back = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    pixels = pixels - back
    alpha = (np.linalg.norm(pixels, axis=-1) > MIN_CONTRAST).astype(np.float32)
    front = np.zeros(3, np.float32)
    for _ in range(2):  # the second look leaves the smoothed edges out of the median
        if (alpha > 0.5).any():
            front = np.median(pixels[alpha > 0.5], axis=0)
            alpha = np.clip(pixels @ front / max(front @ front, 1.0), 0, 1)
    return alpha, front + back


def _centroids(alpha: np.ndarray) -> np.ndarray:
    """(T, H, W) weights -> (T, 2) centroid (y, x), pixel i reaching from i to i + 1.

    Edge pixels count by their alpha: that of a mask would jump by half pixels, at slow motion.
    """
    weight = np.where(alpha >= NOISE_ALPHA, alpha, 0)
    total = np.maximum(weight.sum(axis=(1, 2)), 1)
    y = weight.sum(axis=2) @ (np.arange(weight.shape[1]) + 0.5) / total
    x = weight.sum(axis=1) @ (np.arange(weight.shape[2]) + 0.5) / total
    return np.stack([y, x], axis=1)


def _best_shape(alpha: np.ndarray, centre: np.ndarray) -> tuple[str, float]:
    """The ideal shape that is least different, median over the frames, and its median IoU.

    The difference is taken with smooth edges, which say more than masks where a shape has few
    pixels; the IoU is of masks.
    """
    mask = alpha > 0.5
    area = mask.sum(axis=(1, 2))
    differences, ious = {}, {}
    for shape in SHAPES:
        radius = np.sqrt(area / AREA[shape])
        ideal = coverage(shape, centre[:, 0], centre[:, 1], radius, *mask.shape[1:])
        differences[shape] = np.median(np.square(alpha - ideal).sum(axis=(1, 2)))
        both, either = mask & (ideal > 0.5), mask | (ideal > 0.5)
        ious[shape] = np.median(both.sum(axis=(1, 2)) / np.maximum(either.sum(axis=(1, 2)), 1))
    best = min(SHAPES, key=lambda shape: float(differences[shape]))
    return best, float(ious[best])


def _motion(centre: np.ndarray, seen: np.ndarray, scale: float) -> tuple[np.ndarray, bool]:
    """The median step (y, x) of the centroid, and whether the clip keeps to it."""
    steps = np.diff(centre, axis=0)  # (T-1, 2)
    valid = seen[1:] & seen[:-1]
    if not valid.any():
        return np.zeros(2), False
    median = np.median(steps[valid], axis=0)
    near = np.linalg.norm(steps - median, axis=1) <= MAX_WOBBLE * scale
    # A clip whose frames are in disorder can have a steady median by chance; its ends differ.
    shown = np.flatnonzero(seen)
    travelled = centre[shown[-1]] - centre[shown[0]]
    agrees = travelled @ median >= 0.5 * (median @ median) * (shown[-1] - shown[0])
    return median, bool(np.mean(near & valid) >= MIN_STEADY and agrees)


def _direction(step: np.ndarray, scale: float) -> str | None:
    """The direction of a step (y, x) that lies along one axis and is large enough, else None."""
    along, across = np.sort(np.abs(step))[::-1]
    if along < MIN_STEP * scale or across > 0.5 * along:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], step)))


def _nearest_colour(front: np.ndarray, foreground: np.ndarray) -> str | None:
    """The palette's colour next to `front` (3,), the median of foreground (n, 3), or None.

    None where all are far, or where half of the foreground is far from its own median (noise).
    """
    if np.median(np.linalg.norm(foreground - front, axis=1)) > MAX_COLOUR_ERROR:
        return None
    errors = {name: float(np.linalg.norm(front - np.array(rgb))) for name, rgb in COLOURS.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= MAX_COLOUR_ERROR else None
