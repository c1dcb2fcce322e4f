"""Footage as it comes: codecs, containers, colours, shapes and times, against known sources.

Each video is made here, of a picture whose colours and number are known: above, six patches;
below, the frame's number in six bits. Its RGB becomes YUV by the formulas of ITU-R BT.601, BT.709
and BT.2020 in this file, so that no colour conversion of FFmpeg's makes what it is tested on.
"""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from PIL import Image, ImageCms, ImageOps

from framework import video
from framework.data.shards.ranged_file import RangedFile
from framework.video import STILL_FPS, VideoError, VideoInfo, decode

BLOCK = 16
HEIGHT, WIDTH = 4 * BLOCK, 6 * BLOCK
PATCHES = [(220, 40, 40), (40, 200, 60), (50, 90, 240), (230, 220, 30), (255, 255, 255), (0, 0, 0)]

# A level of eight-bit YUV is up to two of RGB; quantisation at the qualities below adds one.
TOLERANCE = 3

SETTINGS = {
    "libx264": {"crf": "4", "preset": "veryfast"},
    "libx265": {"crf": "4", "preset": "veryfast", "x265-params": "log-level=none:pools=none"},
    "libvpx-vp9": {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    # Its faster presets lose whole blocks of this picture.
    "libsvtav1": {"crf": "4", "preset": "6", "svtav1-params": "lp=1"},
    "aac": {},
    "libopus": {},
}
# K_R and K_B of each matrix, and its number in ITU-T H.273.
BT601, BT709, BT2020 = (0.299, 0.114, 6), (0.2126, 0.0722, 1), (0.2627, 0.0593, 9)
LIMITED, FULL = 1, 2  # FFmpeg's numbers of the ranges


def probe(data: bytes) -> VideoInfo:
    """Of the whole, and by range, which must be the same."""
    by_range = RangedFile(lambda offset, size: data[offset : offset + size], len(data))
    info = video.probe(data)
    assert video.probe(by_range) == info
    return info


def picture(number: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Six patches above the bits of `number`, (height, width, 3) uint8 RGB."""
    bits = [(255 * (number >> bit & 1),) * 3 for bit in range(6)]
    blocks = np.array([PATCHES, bits], np.uint8)  # (2, 6, 3)
    rows, columns = (np.arange(n) * k // n for n, k in ((height, 2), (width, 6)))
    return blocks[rows][:, columns]


def blocks_of(image: np.ndarray) -> np.ndarray:
    """The colours in the middle of the blocks, (2, 6, 3), of a picture of any size."""
    height, width, _ = image.shape
    return image[height // 4 :: height // 2][:2, width // 12 :: width // 6][:, :6].astype(int)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of pictures, read from their bits."""
    return [int((blocks_of(frame)[1, :, 1] > 127) @ (1 << np.arange(6))) for frame in frames]


def assert_shows(image: np.ndarray, expected: np.ndarray, tolerance: int = TOLERANCE) -> None:
    assert image.shape == expected.shape
    np.testing.assert_allclose(blocks_of(image), blocks_of(expected), rtol=0, atol=tolerance)


def to_frame(rgb: np.ndarray, pix_fmt: str, matrix: tuple, color_range: int) -> av.VideoFrame:
    """(H, W, 3) RGB as a planar YUV frame."""
    red, green, blue = np.moveaxis(rgb / 255, -1, 0)
    k_red, k_blue, _ = matrix
    luma = k_red * red + (1 - k_red - k_blue) * green + k_blue * blue
    chroma = [(blue - luma) / (2 - 2 * k_blue), (red - luma) / (2 - 2 * k_red)]
    bits = 10 if "10" in pix_fmt else 8
    if color_range == FULL:
        top = 2**bits - 1
        planes = [luma * top, *(c * top + 2 ** (bits - 1) for c in chroma)]
    else:
        unit = 2 ** (bits - 8)
        planes = [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], pix_fmt)
    step = 2 if "420" in pix_fmt else 1
    for target, values, every in zip(frame.planes, planes, (1, step, step), strict=True):
        dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)
        lines = np.zeros((target.height, target.line_size // dtype.itemsize), dtype)
        values = values[::every, ::every].round().clip(0, 2**bits - 1)
        lines[:, : values.shape[1]] = values
        target.update(lines.tobytes())
    return frame


def footage(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    pictures: Sequence[np.ndarray] | None = None,
    times: Sequence[int] = range(12),
    tick: Fraction = Fraction(1, 25),
    rate: Fraction | None = None,
    pix_fmt: str = "yuv420p",
    matrix: tuple = BT709,
    color_range: int = LIMITED,
    tagged: bool = True,
    transfer: int | None = None,
    aspect: Fraction | None = None,
    rotation: tuple = (),
    sound: str | None = None,
    delay: int = 0,
    start: int = 0,
    last_for: int = 1,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """A video of numbered pictures, or of `pictures`, shown at `times` and `last_for` in the end.

    Times are in ticks; `rate` is what the file says of it. `delay` is added to all of them, without
    the frames before `start`, in the order of coding. `options` are the codec's.
    """
    # x265 counts dts back from a time that it reads of the third frame: of fewer it makes noise.
    assert codec != "libx265" or len(times) > 2
    rate = rate or 1 / tick
    pictures = pictures or [picture(number % 64) for number in range(len(times))]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options=muxer or {}) as target:
        stream = target.add_stream(codec, rate=rate, options=SETTINGS[codec] | options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, tick
        tags = {"color_trc": transfer} if transfer else {}
        if tagged:
            tags |= {"colorspace": matrix[2], "color_range": color_range}
        frames = [to_frame(rgb, pix_fmt, matrix, color_range) for rgb in pictures]
        for frame, time in zip(frames, times, strict=True):
            frame.pts, frame.time_base = time, tick
        for tagged_thing in (stream.codec_context, *frames):
            for name, value in tags.items():
                setattr(tagged_thing, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(*rotation)
        speaker = target.add_stream(sound, rate=48000) if sound else None
        packets = [packet for frame in (*frames, None) for packet in stream.encode(frame)][start:]
        max(packets, key=lambda packet: packet.pts).duration = last_for
        for packet in packets:
            packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
        if speaker:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
            silence.sample_rate = 48000
            packets += speaker.encode(silence) + speaker.encode(None)
        target.mux(packets)
    return buffer.getvalue()


FORMATS = {
    "h264-mp4": ("libx264", "mp4", {}),
    "h264-mp4-fragmented": ("libx264", "mp4", {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264-mp4-sound": ("libx264", "mp4", {"sound": "aac"}),
    "h264-mp4-without-b-frames": ("libx264", "mp4", {"bf": "0"}),
    "h264-mp4-interlaced": ("libx264", "mp4", {"x264-params": "tff=1"}),
    "h264-mov": ("libx264", "mov", {}),
    "h264-mov-sound": ("libx264", "mov", {"sound": "aac"}),
    "h264-mkv": ("libx264", "matroska", {}),
    "h264-mkv-sound": ("libx264", "matroska", {"sound": "libopus"}),
    "h264-10-bit-mp4": ("libx264", "mp4", {"pix_fmt": "yuv420p10le"}),
    "h264-444-mp4": ("libx264", "mp4", {"pix_fmt": "yuv444p"}),
    "hevc-mp4": ("libx265", "mp4", {}),
    "hevc-mov": ("libx265", "mov", {}),
    "hevc-mkv": ("libx265", "matroska", {}),
    "hevc-10-bit-mp4": ("libx265", "mp4", {"pix_fmt": "yuv420p10le"}),
    "vp9-webm": ("libvpx-vp9", "webm", {}),
    "vp9-webm-sound": ("libvpx-vp9", "webm", {"sound": "libopus"}),
    "vp9-webm-hidden-frames": ("libvpx-vp9", "webm", {"deadline": "good", "lag-in-frames": "12"}),
    "vp9-mp4": ("libvpx-vp9", "mp4", {}),
    "vp9-mkv": ("libvpx-vp9", "matroska", {}),
    "av1-mp4": ("libsvtav1", "mp4", {}),
    "av1-webm": ("libsvtav1", "webm", {}),
    "av1-mkv": ("libsvtav1", "matroska", {}),
    "av1-10-bit-mp4": ("libsvtav1", "mp4", {"pix_fmt": "yuv420p10le"}),
}


@pytest.mark.parametrize(("codec", "container", "options"), FORMATS.values(), ids=FORMATS)
def test_codec_and_container(codec: str, container: str, options: dict) -> None:
    data = footage(codec, container, **options)
    assert probe(data) == VideoInfo(12, 25.0, HEIGHT, WIDTH)
    indices = [7, 0, 11, 3, 3, 10, 1, 2, 4, 5, 6, 8, 9]
    frames = decode(data, indices, HEIGHT, WIDTH)
    assert numbers(frames) == indices
    for index, frame in zip(indices, frames, strict=True):
        assert_shows(frame, picture(index))


SMALL, WIDE, TALL = (HEIGHT, WIDTH), (HEIGHT, 1280), (720, WIDTH)
COLOURS = {
    "bt601": (BT601, LIMITED, True, SMALL, {}),
    "bt601-full": (BT601, FULL, True, SMALL, {}),
    "bt601-large": (BT601, LIMITED, True, WIDE, {}),
    "bt709": (BT709, LIMITED, True, SMALL, {}),
    "bt709-full": (BT709, FULL, True, SMALL, {}),
    "bt709-full-10-bit": (BT709, FULL, True, SMALL, {"pix_fmt": "yuv420p10le"}),
    "bt2020-10-bit": (BT2020, LIMITED, True, SMALL, {"pix_fmt": "yuv420p10le", "transfer": 14}),
    "untagged-small-is-bt601": (BT601, LIMITED, False, SMALL, {}),
    "untagged-1280-columns-is-bt709": (BT709, LIMITED, False, WIDE, {}),
    "untagged-720-rows-is-bt709": (BT709, LIMITED, False, TALL, {}),
}


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize(
    ("matrix", "color_range", "tagged", "size", "options"), COLOURS.values(), ids=COLOURS
)
def test_colours(
    codec: str, matrix: tuple, color_range: int, tagged: bool, size: tuple, options: dict
) -> None:
    # Matroska says of colours only what it is told; MP4 would store a guess.
    data = footage(
        codec,
        "matroska",
        pictures=[picture(21, *size)] * 3,
        times=range(3),
        matrix=matrix,
        color_range=color_range,
        tagged=tagged,
        **options,
    )
    for frame in decode(data, range(3), *size):
        assert_shows(frame, picture(21, *size))


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), 50, 120, 240])
def test_constant_rate_gives_every_frame(codec: str, container: str, rate: Fraction) -> None:
    """Matroska rounds times to milliseconds, a quarter of a frame's 4.2 at 240 a second."""
    data = footage(codec, container, times=range(150), tick=1 / Fraction(rate))
    info = probe(data)
    assert info.num_frames == 150
    assert info.fps == pytest.approx(float(rate), rel=1e-4)
    assert numbers(decode(data, range(150), HEIGHT, WIDTH)) == [n % 64 for n in range(150)]


def test_jitter_is_constant_rate() -> None:
    """QuickTime counts in 600ths of a second, and cameras are a few of them early or late."""
    jitter = np.random.default_rng(0).integers(-4, 5, 100)
    times = [0, *(20 * np.arange(1, 100) + jitter[1:]).tolist()]
    data = footage(times=times, tick=Fraction(1, 600), rate=Fraction(30), last_for=20)
    assert numbers(decode(data, range(100), HEIGHT, WIDTH)) == [n % 64 for n in range(100)]
    assert probe(data).fps == pytest.approx(30, rel=0.01)


# In milliseconds. Each ends 40 after its last frame, since Matroska has one duration for all.
VARIABLE = {
    "slow-then-fast": [0, 200, 400, 600, 800, 1000, 1040, 1080, 1120, 1160, 1200, 1240],
    "fast-then-slow": [0, 40, 80, 120, 160, 200, 240, 500, 750, 1000, 1250],
    "lost-frames": [0, 40, 80, 120, 160, 320, 360, 400, 600, 640, 680, 720, 760, 800],
    "one-pause": [0, 40, 80, 2000, 2040, 2080],
    "random": np.random.default_rng(0).integers(10, 200, 40).cumsum().tolist(),
}
VARIABLE_IN = {
    "h264-mp4": ("libx264", "mp4", {}),
    "h264-mp4-without-b-frames": ("libx264", "mp4", {"bf": "0"}),
    "h264-mp4-late-start": ("libx264", "mp4", {"delay": 500}),
    "h264-mkv": ("libx264", "matroska", {}),
    "hevc-mov": ("libx265", "mov", {}),
    "vp9-webm": ("libvpx-vp9", "webm", {}),
    "av1-mp4": ("libsvtav1", "mp4", {}),
}


@pytest.mark.parametrize("times", VARIABLE.values(), ids=VARIABLE)
@pytest.mark.parametrize(("codec", "container", "options"), VARIABLE_IN.values(), ids=VARIABLE_IN)
def test_variable_rate_gives_what_is_on_screen(
    codec: str, container: str, options: dict, times: list[int]
) -> None:
    tick, rate = Fraction(1, 1000), Fraction(25)
    data = footage(codec, container, times=times, tick=tick, rate=rate, last_for=40, **options)
    info = probe(data)
    duration = times[-1] + 40 - times[0]
    assert info.num_frames == len(times)
    # The container rounds, some to milliseconds.
    assert info.num_frames / info.fps == pytest.approx(duration / 1000, abs=0.002)
    expected = []
    for index in range(len(times)):
        middle = times[0] + (index + 0.5) * duration / len(times)
        expected.append(max(n for n, time in enumerate(times) if time <= middle))
    assert numbers(decode(data, range(len(times)), HEIGHT, WIDTH)) == expected
    assert numbers(decode(data, [len(times) - 1, 2], HEIGHT, WIDTH)) == [expected[-1], expected[2]]
    with pytest.raises(VideoError, match=f"ends after {len(times)}"):
        decode(data, [len(times)], HEIGHT, WIDTH)


def test_variable_rate_is_that_of_ffmpegs_fps_filter() -> None:
    times = VARIABLE["random"]
    data = footage(times=times, tick=Fraction(1, 1000), rate=Fraction(25), last_for=40)
    info = probe(data)
    graph = Graph()
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        source = graph.add_buffer(template=stream, time_base=stream.time_base)
        rate = Fraction(info.fps).limit_denominator(10**6)
        from_zero, fps = graph.add("setpts", "PTS-STARTPTS"), graph.add("fps", f"{rate}")
        graph.link_nodes(source, from_zero, fps, graph.add("buffersink")).configure()
        for frame in container.decode(stream):
            graph.push(frame)
        graph.push(None)
        expected = [graph.vpull().to_ndarray(format="rgb24") for _ in times]
    assert numbers(decode(data, range(info.num_frames), HEIGHT, WIDTH)) == numbers(expected)


def test_a_last_frame_that_stays_counts() -> None:
    data = footage(times=range(10), last_for=11, bf="0")
    assert probe(data) == VideoInfo(10, pytest.approx(10 / (20 / 25)), HEIGHT, WIDTH)
    frames = decode(data, range(10), HEIGHT, WIDTH)
    assert numbers(frames) == [1, 3, 5, 7, 9, 9, 9, 9, 9, 9]


def cut_end(data: bytes, duration_ms: int) -> bytes:
    """An MP4 whose edit list ends after `duration_ms`; its frames stay."""
    at = data.index(b"elst") + 12  # behind name, version, flags and count: the edit's duration
    return data[:at] + struct.pack(">I", duration_ms) + data[at + 4 :]


# Of what is left, frame 6 comes first; frame 5, which leans on what is cut away, second.
OPEN_GOP = {
    "times": range(24),
    "start": 5,
    "g": "6",
    "bf": "2",
    "preset": "medium",
    "x264-params": "open-gop=1:scenecut=0",
}
EDITS = {
    "b-frames-first-h264": (footage, {}, range(12)),
    "b-frames-first-hevc": (footage, {"codec": "libx265"}, range(12)),
    "b-frames-first-without-edit-list": (footage, {"muxer": {"use_editlist": "0"}}, range(12)),
    "b-frames-first-negative-offsets": (
        footage,
        {"muxer": {"movflags": "negative_cts_offsets"}},
        range(12),
    ),
    "late-start": (footage, {"delay": 10}, range(12)),
    "late-start-with-sound": (footage, {"delay": 10, "sound": "aac"}, range(12)),
    "cut-start-h264": (footage, {"delay": -5}, range(5, 12)),
    "cut-start-hevc": (footage, {"delay": -5, "codec": "libx265"}, range(5, 12)),
    "cut-start-vp9": (footage, {"delay": -5, "codec": "libvpx-vp9"}, range(5, 12)),
    "cut-start-av1": (footage, {"delay": -5, "codec": "libsvtav1"}, range(5, 12)),
    "cut-end": (lambda: cut_end(footage(), 280), {}, range(7)),
    "cut-both": (lambda: cut_end(footage(delay=-3), 160), {}, range(3, 7)),
    "cut-in-an-open-gop-mp4": (footage, OPEN_GOP, range(6, 24)),
    "cut-in-an-open-gop-mkv": (footage, OPEN_GOP | {"container": "matroska"}, range(6, 24)),
}


@pytest.mark.parametrize(("make", "options", "expected"), EDITS.values(), ids=EDITS)
def test_edits_and_offsets(make, options: dict, expected: range) -> None:
    data = make(**options)
    info = probe(data)
    assert numbers(decode(data, range(info.num_frames), HEIGHT, WIDTH)) == list(expected)
    assert info.fps == pytest.approx(25, abs=0.01)
    with pytest.raises(VideoError, match=f"ends after {len(expected)}"):
        decode(data, [len(expected)], HEIGHT, WIDTH)


ROTATIONS = [(turn, mirror) for mirror in (False, True) for turn in (0, 90, 180, 270)]


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize(("turn", "mirror"), ROTATIONS)
def test_rotation_and_mirroring(container: str, turn: int, mirror: bool) -> None:
    data = footage(container=container, rotation=(turn, mirror))
    expected = np.rot90(picture(5), turn // 90)
    expected = expected[:, ::-1] if mirror else expected
    info = probe(data)
    assert (info.height, info.width) == expected.shape[:2]
    for flip in (False, True):
        shown = decode(data, [5], *expected.shape[:2], flip=flip)[0]
        wanted = expected[:, ::-1] if flip else expected
        np.testing.assert_allclose(shown[8::16, 8::16], wanted[8::16, 8::16], atol=TOLERANCE)


ASPECTS = {
    "dv-pal-wide": (Fraction(64, 45), (64, 137)),
    "hdv": (Fraction(4, 3), (64, 128)),
    "ntsc": (Fraction(8, 9), (72, 96)),
    "half": (Fraction(1, 2), (128, 96)),
    "square": (Fraction(1), (64, 96)),
}
ASPECT_IN = [
    ("libx264", "mp4"),
    ("libx264", "matroska"),
    ("libx265", "mov"),
    ("libvpx-vp9", "mp4"),
    ("libsvtav1", "mp4"),
]


@pytest.mark.parametrize(("codec", "container"), ASPECT_IN)
@pytest.mark.parametrize(("aspect", "size"), ASPECTS.values(), ids=ASPECTS)
def test_pixels_become_square(codec: str, container: str, aspect: Fraction, size: tuple) -> None:
    data = footage(codec, container, aspect=aspect)
    info = probe(data)
    assert (info.height, info.width) == size
    assert_shows(decode(data, [5], *size)[0], picture(5, *size))
    # A central square, against the scale and crop of FFmpeg's filters.
    graph = Graph()
    with av.open(io.BytesIO(data)) as opened:
        stream = opened.streams.video[0]
        source = graph.add_buffer(template=stream, time_base=stream.time_base)
        steps = [
            graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear+accurate_rnd"),
            graph.add("crop", f"{min(size)}:{min(size)}:exact=1"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(source, *steps).configure()
        graph.push(next(opened.decode(stream)))
        expected = graph.vpull().to_ndarray(format="rgb24")
    square = decode(data, [0], min(size), min(size))[0]
    # The crop may be off by one pixel of chroma: all but the edges of the patches agree.
    assert np.median(np.abs(square.astype(int) - expected)) <= TOLERANCE
    assert np.mean(np.abs(square.astype(int) - expected).max(axis=-1) > 40) < 0.1


def test_the_display_size_of_webm_applies() -> None:
    data = footage("libvpx-vp9", "webm")
    # Matroska's IDs: the element Colour is 11 bytes; in its place DisplayWidth, -Height and Void.
    before = bytes.fromhex("55b088 55b18101 55b98101")
    after = bytes.fromhex("54b081") + bytes([128]) + bytes.fromhex("54ba81") + bytes([HEIGHT])
    assert data.count(before) == 1
    data = data.replace(before, after + bytes.fromhex("ec8100"))
    assert probe(data) == VideoInfo(12, 25.0, HEIGHT, 128)
    assert_shows(decode(data, [5], HEIGHT, 128)[0], picture(5, HEIGHT, 128))


def test_aspect_applies_before_rotation() -> None:
    data = footage(aspect=Fraction(4, 3), rotation=(90, False))
    assert probe(data) == VideoInfo(12, 25.0, 128, 64)
    np.testing.assert_allclose(
        decode(data, [3], 128, 64)[0][8::16, 8::16],
        np.rot90(picture(3, 64, 128))[8::16, 8::16],
        atol=TOLERANCE,
    )


ODD = {
    "vp9-webm": ("libvpx-vp9", "webm", {}),
    "h264-444-mp4": ("libx264", "mp4", {"pix_fmt": "yuv444p"}),
    "hevc-444-mkv": ("libx265", "matroska", {"pix_fmt": "yuv444p"}),
}


@pytest.mark.parametrize(("codec", "container", "options"), ODD.values(), ids=ODD)
@pytest.mark.parametrize(("height", "width"), [(65, 97), (63, 96), (64, 101)])
def test_odd_sizes(codec: str, container: str, options: dict, height: int, width: int) -> None:
    pictures = [picture(number, height, width) for number in range(3)]
    data = footage(codec, container, pictures=pictures, times=range(3), **options)
    assert probe(data) == VideoInfo(3, 25.0, height, width)
    for shown, expected in zip(decode(data, range(3), height, width), pictures, strict=True):
        assert_shows(shown, expected)


def test_frames_that_change_size_fit_the_same_box() -> None:
    big = footage("libvpx-vp9", "webm", times=range(3))
    small = footage(
        "libvpx-vp9",
        "webm",
        pictures=[picture(number, HEIGHT // 2, WIDTH // 2) for number in (3, 4, 5)],
        times=range(3),
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as target:
        for part, delay in ((big, 0), (small, 120)):
            with av.open(io.BytesIO(part)) as source:
                if part is big:
                    stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
                        packet.stream = stream
                        target.mux(packet)
    data = buffer.getvalue()
    assert probe(data) == VideoInfo(6, 25.0, HEIGHT, WIDTH)
    frames = decode(data, range(6), HEIGHT, WIDTH)
    assert numbers(frames) == list(range(6))
    for number, frame in enumerate(frames):
        assert_shows(frame, picture(number))


def still(kind: str, mode: str = "RGB", **options) -> bytes:
    image = Image.fromarray(picture(21))
    if mode == "RGBA":
        image.putalpha(128)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = {"quality": 95}
STILLS = {
    "png": ("PNG", "RGB", {}),
    "png-alpha": ("PNG", "RGBA", {}),
    "png-grey": ("PNG", "L", {}),
    "png-grey-alpha": ("PNG", "LA", {}),
    "png-grey-16-bit": ("PNG", "I;16", {}),
    "png-palette": ("PNG", "P", {}),
    "png-palette-transparent": ("PNG", "P", {"transparency": 0}),
    "png-1-bit": ("PNG", "1", {}),
    "jpeg": ("JPEG", "RGB", GOOD),
    "jpeg-444": ("JPEG", "RGB", GOOD | {"subsampling": 0}),
    "jpeg-progressive": ("JPEG", "RGB", GOOD | {"progressive": True}),
    "jpeg-grey": ("JPEG", "L", GOOD),
    "jpeg-cmyk": ("JPEG", "CMYK", GOOD),
    "jpeg-rgb": ("JPEG", "RGB", GOOD | {"keep_rgb": True}),
    "jpeg-uneven-density": ("JPEG", "RGB", GOOD | {"dpi": (72, 144)}),
    "webp": ("WEBP", "RGB", GOOD),
    "webp-alpha": ("WEBP", "RGBA", GOOD),
    "webp-lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp-lossless-alpha": ("WEBP", "RGBA", {"lossless": True}),
}


def assert_as_pillow_shows(data: bytes) -> None:
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if shown.mode == "I;16":
        shown = Image.fromarray((np.asarray(shown) >> 8).astype(np.uint8))
    expected = np.asarray(shown.convert("RGB"))
    height, width, _ = expected.shape
    assert probe(data) == VideoInfo(1, STILL_FPS, height, width)
    image = decode(data, [0], height, width)[0]
    # Lossy stills round in YUV; every other decoder rounds in its own way.
    np.testing.assert_allclose(
        image[8::16, 8::16].astype(int), expected[8::16, 8::16], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize(("kind", "mode", "options"), STILLS.values(), ids=STILLS)
def test_stills(kind: str, mode: str, options: dict) -> None:
    assert_as_pillow_shows(still(kind, mode, **options))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # EXIF 2.32, 4.6.4: Orientation
    exif[0x010F] = "a camera"
    assert_as_pillow_shows(still(kind, exif=exif, quality=95))


COLLECTED = """
import gc, sys
from framework.video import decode, probe
for line in sys.stdin:
    data = bytes.fromhex(line)
    for _ in range(3):
        info = probe(data)
        gc.collect()
        decode(data, [0], info.height, info.width)
        gc.collect()
    print(info.height, info.width, flush=True)
"""


def test_an_icc_profile_leaves_the_process_alive() -> None:
    """PyAV 18.1 frees some side data twice, at a garbage collection: in a process of its own."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stills, sizes = [], []
    for kind in ("PNG", "WEBP", "JPEG"):
        for orientation in (None, *range(1, 9)):
            exif = Image.Exif()
            if orientation is not None:
                exif[0x0112] = orientation
            data = still(kind, exif=exif, quality=95, icc_profile=profile)
            assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile
            height, width = (WIDTH, HEIGHT) if (orientation or 1) > 4 else (HEIGHT, WIDTH)
            stills.append(data)
            sizes.append(f"{height} {width}")
    in_mov = io.BytesIO()
    with av.open(io.BytesIO(stills[0])) as source, av.open(in_mov, "w", format="mov") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packet = next(source.demux(video=0))
        packet.stream = stream
        target.mux(packet)
    files = [in_mov.getvalue(), *stills]
    child = subprocess.run(
        [sys.executable, "-c", COLLECTED],
        input="\n".join(data.hex() for data in files),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [sizes[0], *sizes]
    for data in stills:  # it lives, so that this process may read them too
        assert_as_pillow_shows(data)


def huge_png() -> bytes:
    """A few hundred bytes that are 16 gigapixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 1 << 17, 1 << 17, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 18))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def overlapping_packets() -> bytes:
    """An MP4 of 20 packets, each of which is nearly half of the file."""
    movflags = "frag_every_frame+empty_moov+default_base_moof"
    data = bytearray(footage(times=range(60), bf="0", muxer={"movflags": movflags}))
    at = 0
    for _ in range(20):
        # ISO 14496-12, 8.8.7: flags, track, default duration, and the default size of a sample.
        at = data.index(b"tfhd", at) + 4
        assert data[at : at + 4] == bytes.fromhex("00020038")
        struct.pack_into(">I", data, at + 12, len(data) // 2)
    return bytes(data)


REFUSED = {
    "pq": (footage, {"codec": "libx265", "pix_fmt": "yuv420p10le", "transfer": 16}, "PQ"),
    "hlg": (footage, {"codec": "libx265", "pix_fmt": "yuv420p10le", "transfer": 18}, "HLG"),
    "ycgco": (footage, {"matrix": (0.25, 0.25, 8)}, "matrix"),
    "ictcp": (footage, {"matrix": (*BT2020[:2], 14)}, "matrix"),
    "huge-png": (huge_png, {}, "Invalid"),
    "overlapping-packets": (overlapping_packets, {}, "more than the file"),
    "animated-webp": (
        still,
        {"kind": "WEBP", "save_all": True, "append_images": [Image.new("RGB", (96, 64))]},
        "Invalid",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_a_video_error(make, options: dict, message: str) -> None:
    data = make(**options)
    with pytest.raises(VideoError, match=message):
        probe(data)
    with pytest.raises(VideoError, match=message):
        decode(data, [0], 16, 16)


def test_a_sliver_is_not_blown_up() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (60_000, 1)).save(buffer, "PNG")
    with pytest.raises(VideoError, match="too narrow"):
        decode(buffer.getvalue(), [0], 256, 256)


@pytest.mark.parametrize(("codec", "container", "options"), FORMATS.values(), ids=FORMATS)
def test_damage_gives_a_result_or_a_video_error(codec: str, container: str, options: dict) -> None:
    whole = footage(codec, container, **options)
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
        for read in (probe, lambda data: decode(data, [0, 11], 16, 16)):
            try:
                read(bytes(data))
            except VideoError:
                failed += 1
    assert failed
