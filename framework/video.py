"""Bytes of a video or a still to frames, and frames to bytes: all that Longtake asks of FFmpeg.

Only this file imports PyAV. Everything runs on one thread, since the workers around it are many,
and with the scaler's bit-exact paths, so that one file gives the same pixels on every machine.

Frames are what a player shows: at even times, of square pixels, upright.

- Time. A video that shows n frames has n slots of equal length, from its first frame to its end;
  frame i is what is on screen in the middle of slot i. At a constant rate that is the i-th frame,
  though its time be rounded; at a variable one some frames come twice, and others not at all.
- Shape. Pixels that are not square grow to squares, in width or in height; none shrink. Then comes
  the rotation or mirroring that the file asks for (phones, EXIF). The first frame decides; one that
  has another size fits the same box. The two fields of an interlaced frame stay woven.
- Colour. The matrix and range that the file names. Else BT.709 from 1280 columns or 720 rows on and
  BT.601 below, of limited range. Alpha is dropped. Primaries and colour profiles are not converted,
  and PQ and HLG, which want tone mapping, are refused.

Invariant: whatever the bytes are, the caller sees a result or `VideoError`, and nothing stays open.
"""

import io
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count, islice
from typing import Any, Protocol

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

# A rate that stands for "one frame, no rate": above zero, so that durations stay finite.
STILL_FPS = 1.0

# Demuxers that read one self-contained file. Playlists (hls, concat, dash) are left out on purpose:
# the bytes come from strangers, and a playlist makes FFmpeg open other files and addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,png_pipe,jpeg_pipe,webp_pipe"
# 8K video has a quarter of it. Without a limit some kB of PNG take gigabytes. Chosen by hand.
_MAX_PIXELS = 1 << 27

# Values of the fields for matrix and transfer, ITU-T H.273.
_BT709, _UNSPECIFIED = 1, 2
_MATRICES = (0, _BT709, _UNSPECIFIED, 4, 5, 6, 7, 9)  # what the scaler converts; 0 is RGB itself
_HDR: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}

# FFmpeg 8 numbers the kinds of a frame's side data from 0 to 31 (libavutil/frame.h).
_SIDE_DATA_KINDS = 32
# PyAV 18.1's object of a side data entry frees the entry's metadata, which the frame frees too: the
# name of a PNG's ICC profile ends the process at some later garbage collection. The decoders of
# these codecs give no entry metadata, so that PyAV may list theirs. To have FFmpeg drop entries
# takes a tenth of the time of `probe`.
_WITHOUT_METADATA = ("h264", "hevc", "vp8", "vp9", "av1")

# Full chroma interpolation keeps coloured edges where they are in small frames; the other two make
# the result independent of the SIMD instructions of the machine.
_EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# Bilinear weights widen when shrinking, so there is no aliasing; bicubic would overshoot.
_SCALING = Interpolation.BILINEAR | _EXACT


class VideoError(ValueError):
    """These bytes are no video that can be read."""


class HeaderFile(Protocol):
    """A file whose payload need not be read to know its frames."""

    size_bytes: int

    def read(self, size: int = -1, /) -> bytes:
        """As of any file."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As of any file."""

    def tell(self) -> int:
        """As of any file."""

    def leave_out(self, ranges: Iterable[tuple[int, int]], /) -> None:
        """From now on these (offset, size) read as zeros."""


@dataclass(frozen=True)
class VideoInfo:
    """What the frames of a file are, as shown: upright, of square pixels."""

    num_frames: int
    fps: float  # num_frames by the duration in seconds; STILL_FPS where there is one frame
    height: int
    width: int


@dataclass(frozen=True)
class _Video:
    """An open file: its frames, and how they are to be shown."""

    frames: Iterator[VideoFrame]  # in the order of presentation
    times: list[int]  # of the frames, in ticks from the first
    slot: float  # in ticks
    fps: float
    size: tuple[int, int]  # height and width as coded
    aspect: Fraction  # width of a pixel by its height
    turned: bool  # columns are shown as rows, and then
    upside_down: bool
    mirrored: bool  # left and right

    def number(self, index: int) -> int:
        """Which of `frames` is on screen in the middle of slot `index`."""
        return bisect_right(self.times, (index + 0.5) * self.slot) - 1


def probe(data: bytes | HeaderFile) -> VideoInfo:
    """Number of frames, rate and size of a video, or of a still (PNG, JPEG, WebP: one frame).

    Frames are counted by walking the packets, which takes milliseconds: the container's own count
    is absent in some formats and wrong after a cut. Only the first frame is decoded, so that what
    cannot be decoded or converted fails here. Of a HeaderFile that is an MP4 or a MOV, whose header
    says where each packet lies, the payload beyond the first frame is not read. Raises VideoError.
    """
    with _open(data) as video:
        height, width = video.size
        # As HTML has it: one side grows, the other stays.
        if video.aspect > 1:
            width = round(width * video.aspect)
        else:
            height = round(height / video.aspect)
        if video.turned:
            height, width = width, height
        return VideoInfo(len(video.times), video.fps, height, width)


def decode(
    data: bytes, indices: Sequence[int], height: int, width: int, flip: bool = False
) -> np.ndarray:
    """The frames in the slots `indices` (from 0), (T, height, width, 3) uint8 RGB.

    Each frame is scaled, keeping its aspect ratio, until it just covers the box, and what stands
    over is cut off evenly on both sides. `flip` mirrors left and right. Indices may come in any
    order and more than once. Raises VideoError, also where the video ends before an index.
    """
    if len(indices) == 0 or min(indices) < 0:
        raise ValueError(f"indices={list(indices)} must be one or more numbers from 0")
    if height < 1 or width < 1:
        raise ValueError(f"height={height} and width={width} must be at least 1")
    with _open(data) as video:
        last, end = max(indices), len(video.times)
        if last >= end:
            raise VideoError(f"Frame {last} was asked for, but the video ends after {end}.")
        rows: dict[int, list[int]] = defaultdict(list)
        for row, index in enumerate(indices):
            rows[video.number(index)].append(row)
        box = (width, height) if video.turned else (height, width)
        pixels = np.empty((len(indices), *box, 3), np.uint8)
        scaler = VideoReformatter()
        for number, frame in enumerate(video.frames):
            if number in rows:
                picture = _fit(frame, video.aspect, scaler, *box)
                for row in rows.pop(number):
                    pixels[row] = picture
                if not rows:
                    break
    if rows:
        raise VideoError(f"Frame {min(rows)} was asked for, but the video ends after {number + 1}.")
    if video.turned:
        pixels = pixels.swapaxes(1, 2)
    vertical = -1 if video.upside_down else 1
    horizontal = -1 if video.mirrored != flip else 1
    return np.ascontiguousarray(pixels[:, ::vertical, ::horizontal])


@contextmanager
def _open(data: bytes | HeaderFile) -> Iterator[_Video]:
    """The main video of `data`; FFmpeg's errors become VideoError."""
    options = {"format_whitelist": _FORMATS, "max_pixels": str(_MAX_PIXELS)}
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    size_bytes = len(data) if isinstance(data, bytes) else data.size_bytes
    try:
        with av.open(file, options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError("The bytes hold no video stream of a known codec.")
            yield _read(container, stream, size_bytes, None if isinstance(data, bytes) else data)
    except av.error.FFmpegError as error:
        raise VideoError(
            f"FFmpeg cannot read these {size_bytes} bytes: {error.strerror}."
        ) from error


def _read(
    container: InputContainer, stream: VideoStream, size_bytes: int, file: HeaderFile | None
) -> _Video:
    """Look at the first frame, and fetch all packets, which is little beside decoding them."""
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    # Without err_detect a JPEG that is cut off comes out half grey instead of failing.
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(_MAX_PIXELS)}

    source = _packets(container, stream, size_bytes)
    packets: list[Packet] = []  # those fetched so far
    if file is None:  # they cost nothing
        packets.extend(source)

    def upcoming() -> Iterator[Packet | None]:
        for number in count():
            if number == len(packets):
                packets.extend(islice(source, 1))
            if number == len(packets):
                break
            yield packets[number]
        yield None

    frames = (frame for packet in upcoming() for frame in stream.decode(packet))
    first = next(frames, None)
    if first is None:
        raise VideoError("The video holds no frame that can be decoded.")
    if file is not None and "mp4" in container.format.name:
        entries = (entry for other in container.streams for entry in other.index_entries)
        file.leave_out((entry.pos, entry.size) for entry in entries)
    packets.extend(source)
    if first.color_trc in _HDR:
        raise VideoError(f"The video is {_HDR[first.color_trc]} (HDR); convert it to SDR.")
    if first.colorspace not in _MATRICES:
        raise VideoError(f"The video's colour matrix ({first.colorspace}) is not supported.")
    times, slot, fps = _timeline(stream, packets, first)
    is_still = container.format.name.endswith("_pipe")  # whose density is meant for printers
    return _Video(
        chain([first], frames),
        times,
        slot,
        fps,
        (first.height, first.width),
        (not is_still and stream.sample_aspect_ratio) or Fraction(1),
        *_orientation(first, stream.codec_context.codec.canonical_name),
    )


def _packets(container: InputContainer, stream: VideoStream, size_bytes: int) -> Iterator[Packet]:
    budget = 2 * size_bytes  # Matroska may keep headers that all packets share in one place
    for number, packet in enumerate(container.demux(stream)):
        if packet.is_corrupt:
            raise VideoError(f"Packet {number} is cut off or damaged.")
        budget -= packet.size
        if budget < 0:
            raise VideoError(f"The packets have more than the file's {size_bytes} bytes.")
        if packet.size:  # an empty one means the end to a decoder
            yield packet


def _timeline(
    stream: VideoStream, packets: list[Packet], first: VideoFrame
) -> tuple[list[int], float, float]:
    """When each frame is shown, in ticks from the first; the ticks of a slot; frames a second."""
    shown = [packet for packet in packets if not packet.is_discard]  # an edit list cuts the others
    stamps = sorted((p.pts, p.duration or 0) for p in shown if p.pts is not None)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if len(stamps) < len(shown) or first.pts is None or stamps[-1][0] <= first.pts:  # no times
        if len(shown) > 1 and not rate:
            raise VideoError(f"The video has {len(shown)} frames but no frame rate.")
        return list(range(len(shown))), 1.0, rate if len(shown) > 1 else STILL_FPS

    # Frames before the first lean on others that were cut away, and cannot be decoded.
    times = [stamp - first.pts for stamp, _ in stamps if stamp >= first.pts]
    last, duration = stamps[-1]
    # In MP4 durations of packets are in the order of decoding, so that the whole knows better.
    whole = (stream.start_time or 0) + (stream.duration or 0)
    duration = whole - last if whole > last else duration
    slot = mean = times[-1] / max(1, len(times) - 1)
    is_even = all(abs(time - number * mean) < mean / 2 for number, time in enumerate(times))
    if duration > 0 and not (is_even and duration < 1.5 * mean):
        slot = (times[-1] + duration) / len(times)
    tick = float(stream.time_base or 1)
    # The nominal rate is the exact one where it fits the times, which are rounded to ticks.
    if rate and abs(1 / rate - slot * tick) * len(times) <= 2 * tick:
        return times, slot, rate
    return times, slot, 1 / (slot * tick)


def _orientation(frame: VideoFrame, codec: str) -> tuple[bool, bool, bool]:
    """Whether columns are shown as rows, and then upside down, and left as right."""
    side_data: Any = None
    if codec in _WITHOUT_METADATA:
        # PyAV 18.1 has no names for the kinds from 28 on, and lists nothing where there is one.
        with suppress(ValueError):
            side_data = frame.side_data
    if side_data is None:
        # FFmpeg drops all but the matrix. Most have none, and to ask costs less than to drop.
        if _through_sidedata(frame, "mode=select:type=DISPLAYMATRIX") is None:
            return False, False, False
        others = (kind for kind in range(_SIDE_DATA_KINDS) if kind != Type.DISPLAYMATRIX.value)
        clean = _through_sidedata(frame, *(f"mode=delete:type={kind}" for kind in others))
        assert clean is not None
        side_data = clean.side_data
    if "DISPLAYMATRIX" not in side_data:
        return False, False, False
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(side_data["DISPLAYMATRIX"], np.int32, 5).tolist()
    turned = abs(b) > abs(a)
    right, down = (c, b) if turned else (a, d)
    return turned, down < 0, right < 0


def _through_sidedata(frame: VideoFrame, *filters: str) -> VideoFrame | None:
    """What FFmpeg's `sidedata` filters with these arguments let through: the frame, or nothing."""
    graph = Graph()
    graph.threads = 1  # a pool of threads takes longer to start than all else here
    source = graph.add_buffer(None, frame.width, frame.height, frame.format, None, Fraction(1))
    nodes = [graph.add("sidedata", arguments) for arguments in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    graph.vpush(frame)
    try:
        return graph.vpull()
    except av.error.BlockingIOError:
        return None


def _fit(
    frame: VideoFrame, aspect: Fraction, scaler: VideoReformatter, height: int, width: int
) -> np.ndarray:
    """One frame scaled to cover (height, width) and centre-cropped, (height, width, 3) uint8."""
    # Written with integers: the covering side is exact, the other rounds to nearest.
    rows, columns = frame.height * aspect.denominator, frame.width * aspect.numerator
    if height * columns >= width * rows:
        tall, wide = height, max(width, round(columns * height / rows))
    else:
        tall, wide = max(height, round(rows * width / columns)), width
    if tall * wide > _MAX_PIXELS:
        raise VideoError(f"A frame of {rows}:{columns} is too narrow for {height}x{width}.")
    matrix = None
    if frame.colorspace == _UNSPECIFIED:
        is_large = frame.width >= 1280 or frame.height >= 720
        matrix = Colorspace.ITU709 if is_large else Colorspace.ITU601
    plane = scaler.reformat(
        frame,
        width=wide,
        height=tall,
        format="rgb24",
        src_colorspace=matrix,
        interpolation=_SCALING,
        threads=1,
    ).planes[0]
    top, left = (tall - height) // 2, (wide - width) // 2
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(tall, plane.line_size)
    return lines[top : top + height, 3 * left : 3 * (left + width)].reshape(height, width, 3)


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
        # x264's output depends on the number of threads; and its macroblock tree gave up to 13
        # outputs for one small clip in 60 runs on one machine.
        x264 = {"preset": "veryfast", "crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
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
