"""Codec and text encoder as functions on arrays, which travel into Ray tasks and actors.

Each holds a config, and builds the network in the process where it is first called.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_zoo.patchify import patchify


@functools.lru_cache(maxsize=4)
def built(config: Any) -> Any:
    """One live codec or text encoder for each config in a process; both keep no state."""
    return config.build()


@dataclass(frozen=True)
class FrameEncoder:
    """uint8 frames (T, H, W, 3) -> latents (C, F, h, w), on a GPU where there is one; picklable."""

    codec: Any

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> Tensor:
        """Encode one clip; the latents are on the CPU."""
        codec, device = built(self.codec), "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(codec, nn.Module):
            codec.to(device)
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
        scaled = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # in place: one copy less
        return codec.encode(scaled).cpu()


@dataclass(frozen=True)
class LatentDecoder:
    """Latents (C, F, h, w) and a number of frames -> uint8 (T, H, W, 3); picklable."""

    codec: Any

    @torch.inference_mode()
    def __call__(self, latents: Tensor, num_frames: int) -> np.ndarray:
        """Decode one clip."""
        return to_uint8(built(self.codec).decode(latents, num_frames))


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

    encode: FrameEncoder
    patchify: Patchifier

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Encode and patchify one clip."""
        return self.patchify(self.encode(frames))


@dataclass(frozen=True)
class TextEmbedder:
    """Caption -> (k,) ids or (k, D) embeddings as tensors on the CPU; picklable."""

    text: Any

    @torch.inference_mode()
    def __call__(self, caption: str) -> Tensor:
        """Encode one caption."""
        return built(self.text).encode(caption).cpu()


@dataclass(frozen=True)
class CaptionEncoder:
    """The same as arrays."""

    embed: TextEmbedder

    def __call__(self, caption: str) -> np.ndarray:
        """Encode one caption."""
        return self.embed(caption).numpy()


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(T, 3, H, W) in [-1, 1] -> uint8 (T, H, W, 3): the reverse of what `FrameEncoder` does."""
    uint8 = ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return uint8.permute(0, 2, 3, 1).contiguous().cpu().numpy()
