"""Many videos at a glance: one row a video, its caption on the left, frames from first to last."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Chosen by hand, for a sheet that reads well on a laptop's screen.
_BACKGROUND = (250, 250, 248)
_INK = (32, 33, 36)
_FAINT = (128, 130, 134)
_MARGIN, _GAP = 20, 6
_CAPTION_WIDTH = 230
_FONT_SIZE, _SMALL_SIZE = 16, 12
_LINE = 21


def contact_sheet(
    videos: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    num_frames: int = 8,
    tile_size: int = 96,
    title: str = "",
) -> bytes:
    """A PNG of `videos`, each uint8 (T, H, W, 3) of any size and duration, with their captions.

    Up to num_frames evenly spaced frames of each, the first and the last included, and the longer
    side of a frame is about tile_size pixels: tiny frames grow by whole factors, so that their
    pixels stay square, large ones shrink. ValueError where captions and videos do not pair up.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions: give one caption for each video, "
            "and at least one"
        )
    rows = [
        [_tile(video[i], tile_size) for i in _spaced(len(video), num_frames)] for video in videos
    ]
    wrapped = [textwrap.wrap(c, width=26, max_lines=4, placeholder=" …") for c in captions]
    pitch = max(tile.width for row in rows for tile in row) + _GAP  # columns line up
    heights = [
        max(row[0].height, len(lines) * _LINE + _LINE) + 2 * _GAP
        for row, lines in zip(rows, wrapped, strict=True)
    ]
    top = _MARGIN + (_LINE + 2 * _GAP if title else 0)
    left = _MARGIN + _CAPTION_WIDTH
    columns = max(len(row) for row in rows)
    size = (left + columns * pitch - _GAP + _MARGIN, top + sum(heights) + _MARGIN - _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_SMALL_SIZE)
    if title:
        draw.text((_MARGIN, _MARGIN), title, font=font, fill=_INK)
    for video, row, lines, height in zip(videos, rows, wrapped, heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((_MARGIN, top + i * _LINE), line, font=font, fill=_INK)
        frames, high, wide, _ = video.shape
        facts = f"{frames} frame{'s' * (frames > 1)}, {wide} x {high}"
        draw.text((_MARGIN, top + len(lines) * _LINE + 2), facts, font=small, fill=_FAINT)
        for i, tile in enumerate(row):
            sheet.paste(tile, (left + i * pitch, top))
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _spaced(count: int, limit: int) -> list[int]:
    """At most `limit` indices below `count`, evenly spaced from the first to the last."""
    return [round(i) for i in np.linspace(0, count - 1, min(count, limit))]


def _tile(frame: np.ndarray, tile_size: int) -> Image.Image:
    """(H, W, 3) uint8 as a picture whose longer side is about tile_size."""
    picture = Image.fromarray(np.ascontiguousarray(frame))
    scale = tile_size / max(picture.size)
    if scale >= 1:
        factor = round(scale)
        return picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)
