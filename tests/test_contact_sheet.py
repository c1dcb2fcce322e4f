import io

import numpy as np
import pytest
from PIL import Image

from framework.contact_sheet import contact_sheet


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_frames_run_from_first_to_last_with_square_pixels():
    video = np.zeros((20, 16, 16, 3), np.uint8)
    video[..., 0] = np.arange(20)[:, None, None] * 10 + 5
    video[:, :8, :, 2] = 200
    sheet = picture(contact_sheet([video], ["x"], num_frames=5, tile_size=96))
    blue_half = (sheet[..., 2] == 200) & (sheet[..., 1] == 0)
    assert blue_half.sum() == 5 * 48 * 96  # 16 pixels grew sixfold, without any blending
    shown = np.unique(sheet[blue_half][:, 0])
    assert shown.tolist() == [10 * i + 5 for i in (0, 5, 10, 14, 19)]


def test_mixed_sizes_and_long_captions_fit():
    videos = [
        np.full((1, 32, 32, 3), 60, np.uint8),
        np.full((24, 90, 160, 3), 90, np.uint8),
        np.full((8, 64, 40, 3), 120, np.uint8),
    ]
    captions = ["", "a caption of many words " * 20, "short"]
    sheet = picture(contact_sheet(videos, captions, title="step 100"))
    for video in videos:
        assert (sheet == video[0, 0, 0]).all(axis=-1).any()
    border = np.concatenate([sheet[:4].reshape(-1, 3), sheet[-4:].reshape(-1, 3), sheet[:, -1]])
    assert len(np.unique(border, axis=0)) == 1  # nothing is cut off


def test_each_video_needs_a_caption():
    with pytest.raises(ValueError, match="1 videos and 2 captions"):
        contact_sheet([np.zeros((1, 8, 8, 3), np.uint8)], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], [])
