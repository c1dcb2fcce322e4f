"""Frozen networks, codec and text encoder: built once in a process, on its GPU where there is one.

The one place that decides their device and dtype: the codec is handed float32, and what leaves
`Encoders` is on the CPU. All of it is picklable and travels as configs into Ray tasks and actors;
the networks are built in the process where they are first used.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model_zoo.patchify import patchify
from model_zoo.protocols import CodecConfig, TextConfig

T_co = TypeVar("T_co", covariant=True)


class _Builds(Protocol[T_co]):
    def build(self) -> T_co: ...


def build_once(config: _Builds[T_co]) -> T_co:
    """One live codec or text encoder for each config in a process; both keep no state."""
    key: Any = config  # mypy does not take a protocol for hashable
    built: T_co = _build_once(key)
    return built


@functools.lru_cache(maxsize=4)
def _build_once(config: Any) -> Any:
    network = config.build()
    if isinstance(network, nn.Module):
        network.to(_device()).eval().requires_grad_(False)
    return network


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Encoders:
    """The codec and the text encoder of a line as functions; picklable."""

    codec: CodecConfig
    text: TextConfig

    @torch.inference_mode()
    def frames_to_latents(self, frames: np.ndarray) -> Tensor:
        """uint8 frames (T, H, W, 3) of one clip -> latents (C, F, h, w) on the CPU."""
        codec = build_once(self.codec)
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(_device())
        scaled = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # in place: one copy less
        return codec.encode(scaled).cpu()

    @torch.inference_mode()
    def latents_to_frames(self, latents: Tensor, num_frames: int) -> np.ndarray:
        """Latents (C, F, h, w) of one clip, on any device -> uint8 (num_frames, H, W, 3)."""
        pixels = build_once(self.codec).decode(latents.to(_device(), torch.float32), num_frames)
        uint8 = ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return uint8.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    @torch.inference_mode()
    def embed(self, caption: str) -> Tensor:
        """One caption -> (k,) ids or (k, D) embeddings on the CPU."""
        return build_once(self.text).encode(caption).cpu()


@dataclass(frozen=True)
class Patchifier:
    """Latents (C, F, h, w) -> float32 tokens (n, P); picklable."""

    patch_size: tuple[int, int, int]

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Patchify one clip."""
        return patchify(latents, self.patch_size).numpy()


@dataclass(frozen=True)
class Tokenizer:
    """uint8 frames (T, H, W, 3) -> float32 tokens (n, P); picklable."""

    encoders: Encoders
    patchify: Patchifier

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Encode and patchify one clip."""
        return self.patchify(self.encoders.frames_to_latents(frames))


@dataclass(frozen=True)
class CaptionEncoder:
    """Caption -> (k,) ids or (k, D) embeddings as an array; picklable."""

    encoders: Encoders

    def __call__(self, caption: str) -> np.ndarray:
        """Encode one caption."""
        return self.encoders.embed(caption).numpy()
