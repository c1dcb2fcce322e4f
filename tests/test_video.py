import io

import av
import numpy as np
import pytest
from PIL import Image

from framework.video import STILL_FPS, VideoError, VideoInfo, decode, encode, probe

COLOURS = [(220, 40, 40), (40, 200, 60), (50, 90, 240), (0, 0, 0), (255, 255, 255), (90, 90, 90)]


def flat(colours, height=32, width=48):
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def still(kind, height=33, width=50):
    buffer = io.BytesIO()
    Image.fromarray(flat([(220, 40, 40)], height, width)[0]).save(buffer, kind)
    return buffer.getvalue()


def numbered(num_frames):
    """A video in which the brightness of a frame is ten times its index."""
    return encode(flat([(10 * i,) * 3 for i in range(num_frames)]), fps=8)


def remux(data, change=lambda packets: None, stream_change=lambda stream: None):
    """The same coded frames in another MP4, with a change to packets or stream."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream_change(stream)
        packets = [packet for packet in source.demux(video=0) if packet.size]
        change(packets)
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    return buffer.getvalue()


def test_colours_survive_the_round_trip():
    frames = flat(COLOURS)
    decoded = decode(encode(frames, fps=8), range(len(frames)), 32, 48)
    # Eight-bit YUV of limited range and H.264 at CRF 20 leave a few levels on flat colours.
    assert np.abs(decoded.astype(int) - frames).max() <= 4


def test_colour_tags_are_written():
    with av.open(io.BytesIO(encode(flat(COLOURS), fps=8))) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (
        1,  # BT.709, thrice, and limited range
        1,
        1,
        1,
    )


def test_equal_frames_give_equal_bytes():
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    assert encode(frames, fps=8) == encode(frames, fps=8)


@pytest.mark.parametrize("fps", [8.0, 12.5, 30000 / 1001, 60])
def test_probe_reads_rate_and_size(fps):
    info = probe(encode(flat(COLOURS), fps=fps))
    assert info == VideoInfo(num_frames=6, fps=pytest.approx(fps, rel=1e-6), height=32, width=48)


def test_a_video_of_one_frame_is_a_still():
    data = encode(flat(COLOURS[:1]), fps=8)
    assert probe(data) == VideoInfo(num_frames=1, fps=STILL_FPS, height=32, width=48)
    assert decode(data, [0], 32, 48).shape == (1, 32, 48, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_stills(kind):
    data = still(kind)
    assert probe(data) == VideoInfo(num_frames=1, fps=STILL_FPS, height=33, width=50)
    pixel = decode(data, [0], 16, 16)[0, 8, 8].astype(int)
    assert np.abs(pixel - (220, 40, 40)).max() <= 4  # lossy stills round in YUV


def test_frames_are_chosen_by_index():
    indices = [17, 0, 3, 3, 24, 9]
    means = decode(numbered(25), indices, 16, 16).mean(axis=(1, 2, 3))
    assert np.round(means / 10).astype(int).tolist() == indices


@pytest.mark.parametrize("index", [25, 1000])
def test_an_index_beyond_the_end_is_an_error(index):
    with pytest.raises(VideoError, match="ends after 25"):
        decode(numbered(25), [0, index], 16, 16)


def test_cut_video_counts_the_frames_that_are_shown():
    """A cut that keeps the coded frames leaves frames that no player shows (an edit list)."""

    def start_later(packets):
        for packet in packets:
            packet.pts -= 5 * packet.duration
            packet.dts -= 5 * packet.duration

    data = remux(numbered(20), start_later)
    info = probe(data)
    shown = decode(data, range(info.num_frames), 8, 8).mean(axis=(1, 2, 3))
    assert np.round(shown / 10).astype(int).tolist() == list(range(5, 20))
    with pytest.raises(VideoError):
        decode(data, [info.num_frames], 8, 8)


def test_rotation_is_applied():
    frames = flat([(0, 0, 0)] * 3, 32, 64)
    frames[:, :, :32] = (220, 40, 40)  # left half
    data = remux(encode(frames, 8), stream_change=lambda s: s.set_display_rotation(90))
    info = probe(data)
    assert (info.height, info.width) == (64, 32)
    turned = decode(data, [1], 64, 32)[0]
    # Counter-clockwise by 90 degrees, the left half comes to lie below.
    assert turned[56, 16, 0] > 200
    assert turned[8, 16, 0] < 20


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (24, 16), (64, 48), (33, 17)])
def test_crop_is_central_and_keeps_the_aspect_ratio(height, width):
    frames = flat([(0, 0, 0)], 64, 96)
    frames[:, 16:48, 32:64] = 255  # a square in the middle
    image = decode(encode(frames, 8), [0], height, width)[0, :, :, 0].astype(float) / 255
    assert image.shape == (height, width)
    side = 32 * max(height / 64, width / 96)
    expected_rows, expected_columns = min(side, height), min(side, width)
    # Half a pixel of rounding at either edge.
    assert image[:, width // 2].sum() == pytest.approx(expected_rows, abs=1)
    assert image[height // 2].sum() == pytest.approx(expected_columns, abs=1)
    # Off centre by less than one pixel, where an odd margin cannot be halved.
    rows = image.mean(axis=1) @ (np.arange(height) + 0.5) / image.mean(axis=1).sum()
    columns = image.mean(axis=0) @ (np.arange(width) + 0.5) / image.mean(axis=0).sum()
    assert rows == pytest.approx(height / 2, abs=0.8)
    assert columns == pytest.approx(width / 2, abs=0.8)


def test_flip_mirrors_left_and_right():
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    data = encode(frames, 8)
    straight, flipped = (decode(data, [0, 1], 16, 16, flip=flip) for flip in (False, True))
    np.testing.assert_array_equal(flipped, straight[:, :, ::-1])


def _damaged():
    video = numbered(25)
    middle = len(video) // 2
    yield "empty", b""
    yield "text", b"not a video, whatever its name says" * 10
    yield "zeros", bytes(4096)
    yield "truncated video", video[:middle]
    yield "truncated png", still("PNG")[:-40]
    yield "truncated jpeg", still("JPEG")[:-40]
    yield "playlist", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    yield "sound only", _sound()


def _sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "data"), _damaged())
def test_bad_bytes_are_a_video_error(name, data):
    with pytest.raises(VideoError, match=r"[.]$"):
        probe(data)
    with pytest.raises(VideoError, match=r"[.]$"):
        decode(data, [0], 16, 16)


def test_no_damage_raises_anything_else():
    """Bytes overwritten at random: a result or VideoError, nothing else."""
    rng = np.random.default_rng(0)
    whole = [numbered(12), still("PNG"), still("JPEG"), still("WEBP")]
    failed = 0
    for trial in range(300):
        data = bytearray(whole[trial % len(whole)])
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
        for read in (probe, lambda data: decode(data, [0], 16, 16)):
            try:
                read(bytes(data))
            except VideoError:
                failed += 1
    assert failed > 50


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), 8, "must be even"),
        (np.zeros((0, 32, 32, 3), np.uint8), 8, "T >= 1"),
        (np.zeros((2, 32, 32, 3), np.float32), 8, "uint8"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "fps=0"),
    ],
)
def test_encode_refuses(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        encode(frames, fps)


@pytest.mark.parametrize(("indices", "height"), [([], 16), ([-1], 16), ([0], 0)])
def test_decode_refuses(indices, height):
    with pytest.raises(ValueError, match="must be"):
        decode(b"", indices, height, 16)
