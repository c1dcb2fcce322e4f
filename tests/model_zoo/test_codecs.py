from dataclasses import fields

import numpy as np
import pytest
import torch

from model_zoo.codecs.haar import HaarCodec, HaarConfig, _bands
from model_zoo.codecs.identity import IdentityConfig


def moving_disc(num_frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """A soft disc of radius 8 that moves 0.75 pixels a frame; (T, 3, H, W) in [-1, 1]."""
    y, x = np.mgrid[:height, :width] + 0.5
    centres = 14 + 0.75 * np.arange(num_frames)[:, None, None]
    alpha = np.clip(8.5 - np.hypot(y - 16, x - centres), 0, 1)[:, None]
    back, front = np.array([16, 24, 88]), np.array([240, 220, 50])
    frames = back[:, None, None] + alpha * (front - back)[:, None, None]
    return torch.tensor(frames / 127.5 - 1, dtype=torch.float32)


@pytest.fixture(scope="module")
def codec() -> HaarCodec:
    return HaarConfig().build()


def test_rows_are_orthogonal(codec):
    gram = codec._analysis @ codec._synthesis.T
    torch.testing.assert_close(gram, torch.eye(144), atol=1e-5, rtol=0)  # float32
    rows = codec._analysis / codec._analysis.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows @ rows.T, torch.eye(144), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 9, 16])
def test_round_trip(codec, num_frames):
    frames = moving_disc(num_frames)
    latents = codec.encode(frames)
    assert latents.shape == (144, -(-num_frames // 4), 4, 6)
    decoded = codec.decode(latents, num_frames)
    assert decoded.shape == frames.shape
    psnr = 10 * torch.log10(4 / (decoded - frames).square().mean())
    assert psnr > 26  # what the finest spatial level holds is gone
    # Encoding what was decoded changes nothing, in a block that no frame was cut off from.
    if num_frames % 4 == 0:
        torch.testing.assert_close(codec.encode(decoded), latents, atol=1e-3, rtol=1e-3)


def test_a_still_is_exact_in_smooth_places_and_has_no_motion(codec):
    frames = torch.full((1, 3, 8, 16), 0.25)
    latents = codec.encode(frames)
    torch.testing.assert_close(codec.decode(latents, 1), frames, atol=1e-4, rtol=0)
    alone = latents[:, 0] + codec._shift[:, None, None]
    assert (alone.abs().amax((1, 2)) > 1e-4).sum() <= 3  # one mean for each colour


def test_blocks_do_not_touch(codec):
    frames = moving_disc(8)
    changed = frames.clone()
    changed[4:, :, 8:16, 8:16] = 1.0
    moved = (codec.encode(frames) != codec.encode(changed)).any(0)  # (F, h, w)
    assert moved.nonzero().tolist() == [[1, 1, 1]]


def test_scales_are_those_of_the_docstring():
    std = HaarConfig().latent_std
    assert len(std) == HaarConfig().channels == 144
    assert min(std) == pytest.approx(0.308, abs=0.001)
    assert max(std) == pytest.approx(3.017, abs=0.001)


def test_fingerprint_is_stable():
    # Latents that were stored under this name must stay readable: change it only with the codec.
    assert HaarConfig().fingerprint == "haar-a9e3e64c72b859f0"


def test_sizes_that_do_not_fit_are_refused(codec):
    with pytest.raises(ValueError, match="try 40 x 48"):
        codec.encode(torch.zeros(4, 3, 36, 48))
    with pytest.raises(ValueError, match="num_frames=9"):
        codec.decode(torch.zeros(144, 2, 4, 4), 9)


def test_identity_keeps_pixels():
    codec, frames = IdentityConfig().build(), moving_disc(3)
    latents = codec.encode(frames)
    assert latents.shape == (3, 3, 32, 48)
    assert torch.equal(codec.decode(latents, 3), frames)
    assert torch.equal(codec.decode(latents, 2), frames[:2])
    with pytest.raises(ValueError, match="num_frames=4"):
        codec.decode(latents, 4)


@pytest.mark.parametrize("config", [HaarConfig(), IdentityConfig()])
def test_facts_are_those_of_the_latents_and_no_fields(config):
    latents = config.build().encode(torch.zeros(9, 3, 32, 48))
    assert latents.shape == (
        config.channels,
        -(-9 // config.temporal_stride),
        32 // config.spatial_stride,
        48 // config.spatial_stride,
    )
    assert len(config.latent_mean) == len(config.latent_std) == config.channels
    assert not fields(config)  # a fact is no choice: it must not count for a run's identity
    assert hash(config) == hash(type(config)())


def test_facts_may_be_asked_for_where_tensors_have_no_memory():
    _bands.cache_clear()
    with torch.device("meta"):
        assert max(HaarConfig().latent_std) == pytest.approx(3.017, abs=0.001)
    assert HaarConfig().build().encode(torch.zeros(1, 3, 8, 8)).device.type == "cpu"
