"""Frozen networks as functions: built once, handed float32, picklable, their results on the CPU."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from framework.encoders import CaptionEncoder, Encoders, Patchifier, Tokenizer, build_once
from model_zoo.codecs.haar import HaarConfig
from model_zoo.codecs.identity import IdentityConfig
from model_zoo.text.byte import ByteTextConfig

TEXT = ByteTextConfig(16, 16)


def frames(num_frames: int = 5, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def test_frames_come_back_where_the_codec_loses_nothing() -> None:
    encoders, clip = Encoders(IdentityConfig(), TEXT), frames()
    latents = encoders.frames_to_latents(clip)
    assert latents.shape == (3, 5, 16, 24)
    assert latents.dtype == torch.float32
    assert -1 <= latents.min() < latents.max() <= 1
    assert np.array_equal(encoders.latents_to_frames(latents, 5), clip)
    assert np.array_equal(encoders.latents_to_frames(latents.double(), 3), clip[:3])


def test_the_readers_callables_are_the_same_functions_as_arrays() -> None:
    encoders, patchifier = Encoders(HaarConfig(), TEXT), Patchifier((1, 2, 1))
    clip = frames()
    tokens = Tokenizer(encoders, patchifier)(clip)
    assert np.array_equal(tokens, patchifier(encoders.frames_to_latents(clip)))
    assert tokens.shape == (2 * 1 * 3, 2 * 144)
    assert CaptionEncoder(encoders)("a cat").tolist() == encoders.embed("a cat").tolist()


def test_they_travel_as_configs_and_keep_what_they_compute() -> None:
    encoders, clip = Encoders(HaarConfig(), TEXT), frames()
    latents = encoders.frames_to_latents(clip)
    there = pickle.loads(pickle.dumps(encoders))
    assert there == encoders
    assert torch.equal(there.frames_to_latents(clip), latents)
    decode = pickle.loads(pickle.dumps(encoders.latents_to_frames))
    assert np.array_equal(decode(latents, 5), encoders.latents_to_frames(latents, 5))
    assert len(pickle.dumps(encoders)) < 1000  # no weights


class Scale(nn.Module):
    """A codec with a weight."""

    num_built = 0

    def __init__(self) -> None:
        super().__init__()
        Scale.num_built += 1
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.9)

    def encode(self, frames: Tensor) -> Tensor:
        assert frames.device == self.weight.device
        return self.dropout(frames.movedim(1, 0) * self.weight)

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        assert latents.device == self.weight.device
        return latents.movedim(0, 1)[:num_frames] / self.weight


@dataclass(frozen=True)
class ScaleConfig(IdentityConfig):
    def build(self) -> Scale:  # type: ignore[override]
        return Scale()


@pytest.mark.parametrize("grad", [True, False])
def test_a_network_with_weights_is_frozen(grad: bool) -> None:
    encoders, clip = Encoders(ScaleConfig(), TEXT), frames()
    with torch.set_grad_enabled(grad):
        latents = encoders.frames_to_latents(clip)
    assert latents.device.type == "cpu"
    assert not latents.requires_grad
    codec = build_once(ScaleConfig())
    assert not codec.training
    assert not codec.weight.requires_grad
    assert codec.weight.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert np.array_equal(encoders.latents_to_frames(latents, 5), clip)
    assert Scale.num_built == 1
