"""Bytes of a video or a still to frames, and frames to bytes: all that Longtake asks of FFmpeg.

Only this file imports PyAV. Everything runs on one thread, since the workers around it are many,
and with the scaler's bit-exact paths, so that one file gives the same pixels on every machine.
Pixels are taken as square. A rotation that the file asks for (phones do) is applied.

Invariant: whatever the bytes are, the caller sees a result or `VideoError`, and nothing stays open.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

# A rate that stands for "one frame, no rate": above zero, so that durations stay finite.
STILL_FPS = 1.0

# Demuxers that read one self-contained file. Playlists (hls, concat, dash) are left out on purpose:
# the bytes come from strangers, and a playlist makes FFmpeg open other files and addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,png_pipe,jpeg_pipe,webp_pipe"

# Full chroma interpolation keeps coloured edges where they are in small frames; the other two make
# the result independent of the SIMD instructions of the machine.
_EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# Bilinear weights widen when shrinking, so there is no aliasing; bicubic would overshoot.
_SCALING = Interpolation.BILINEAR | _EXACT
_BT709 = 1  # the value of BT.709 in H.264's primaries, transfer and matrix fields (ITU-T H.273)


class VideoError(ValueError):
    """These bytes are no video that can be read."""


@dataclass(frozen=True)
class VideoInfo:
    """What the frames of a file are, as shown (rotation applied)."""

    num_frames: int
    fps: float  # frames a second; STILL_FPS where there is one frame
    height: int
    width: int


@contextmanager
def _open(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container of `data` and its main video stream; FFmpeg's errors become VideoError."""
    try:
        options = {"format_whitelist": _FORMATS}
        with av.open(
            io.BytesIO(data), container_options=options, metadata_errors="ignore"
        ) as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError("The bytes hold no video stream of a known codec.")
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            # Without it a JPEG that is cut off comes out half grey instead of failing.
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except av.error.FFmpegError as error:
        raise VideoError(
            f"FFmpeg cannot read these {len(data)} bytes: {error.strerror}."
        ) from error


def _quarter_turns(frame: VideoFrame) -> int:
    """How many times the frame is to be turned by 90 degrees counter-clockwise."""
    return round(frame.rotation / 90) % 4


def probe(data: bytes) -> VideoInfo:
    """Number of frames, rate and size of a video, or of a still (PNG, JPEG, WebP: one frame).

    Frames are counted by walking the packets, which decodes nothing and takes milliseconds: the
    container's own count is absent in some formats and wrong after a cut. The first frame is
    decoded, so that a file without a usable decoder fails here. Raises VideoError.
    """
    num_frames, first = 0, None
    with _open(data) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(f"Packet {num_frames} is cut off or damaged.")
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:
                num_frames += 1
        rate = stream.average_rate or stream.guessed_rate
    if first is None or num_frames == 0:
        raise VideoError("The video holds no frame that can be decoded.")
    if num_frames > 1 and not rate:
        raise VideoError(f"The video has {num_frames} frames but no frame rate.")
    fps = float(rate) if rate and num_frames > 1 else STILL_FPS
    size = (first.height, first.width)
    height, width = size[::-1] if _quarter_turns(first) % 2 else size
    return VideoInfo(num_frames, fps, height, width)


def decode(
    data: bytes, indices: Sequence[int], height: int, width: int, flip: bool = False
) -> np.ndarray:
    """The frames at `indices` (presentation order, from 0), (T, height, width, 3) uint8 RGB.

    Each frame is scaled, keeping its aspect ratio, until it just covers the box, and what stands
    over is cut off evenly on both sides. `flip` mirrors left and right. Indices may come in any
    order and more than once. Raises VideoError, also where the video ends before an index.
    """
    if len(indices) == 0 or min(indices) < 0:
        raise ValueError(f"indices={list(indices)} must be one or more numbers from 0")
    if height < 1 or width < 1:
        raise ValueError(f"height={height} and width={width} must be at least 1")
    last, wanted = max(indices), set(indices)
    found: dict[int, np.ndarray] = {}
    num_frames = 0
    scaler = VideoReformatter()
    with _open(data) as (container, stream):
        for frame in container.decode(stream):
            if num_frames in wanted:
                found[num_frames] = _fit(frame, scaler, height, width)
            num_frames += 1
            if num_frames > last:
                break
    if num_frames <= last:
        raise VideoError(f"Frame {last} was asked for, but the video ends after {num_frames}.")
    frames = np.stack([found[index] for index in indices])
    return np.ascontiguousarray(frames[:, :, ::-1]) if flip else frames


def _fit(frame: VideoFrame, scaler: VideoReformatter, height: int, width: int) -> np.ndarray:
    """One frame scaled to cover (height, width) and centre-cropped, (height, width, 3) uint8."""
    turns = _quarter_turns(frame)
    if turns % 2:
        height, width = width, height
    # Written with integers: the covering side is exact, the other rounds to nearest.
    if height * frame.width >= width * frame.height:
        tall, wide = height, max(width, round(frame.width * height / frame.height))
    else:
        tall, wide = max(height, round(frame.height * width / frame.width)), width
    rgb = scaler.reformat(
        frame,
        width=wide,
        height=tall,
        format="rgb24",
        interpolation=_SCALING,
        threads=1,
    ).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.rot90(rgb[top : top + height, left : left + width], turns)


def encode(frames: np.ndarray, fps: float, crf: int = 20) -> bytes:
    """Frames (T, H, W, 3) uint8 RGB, T >= 1, H and W even, as an H.264 MP4 (yuv420p, BT.709).

    `fps` may be fractional; `crf` is x264's quality, lower is better. The same arguments give the
    same bytes. Raises ValueError where the frames do not fit.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(
            f"frames of {frames.dtype} {frames.shape} must be uint8 (T, H, W, 3) with T >= 1"
        )
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"height={height} and width={width} must be even for yuv420p; "
            f"pad or crop to {height + height % 2} and {width + width % 2}"
        )
    if not 0 < fps < 1000:
        raise ValueError(f"fps={fps} must be above 0 and below 1000")
    # 1001 covers 30000/1001 and its kin.
    rate = Fraction(fps).limit_denominator(1001)
    scaler = VideoReformatter()
    buffer = io.BytesIO()
    # bitexact: without the version of the muxer in the metadata.
    options = {"fflags": "+bitexact"}
    with av.open(buffer, "w", format="mp4", container_options=options) as container:
        # x264's output depends on the number of threads.
        x264 = {"preset": "veryfast", "crf": str(crf), "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=x264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        for index, pixels in enumerate(frames):
            frame = scaler.reformat(
                VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BILINEAR | _EXACT,
                threads=1,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
