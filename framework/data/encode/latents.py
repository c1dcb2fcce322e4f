"""A clip encoded ahead, as a safetensors file: its latents, and the text tokens of its captions.

latents        (C, F, h, w)
text-<hash>    (k,) ids or (k, D) embeddings, for each caption and for the empty one
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from framework.seeding import hash64

LATENTS = "latents"


class Encoders(Protocol):
    """The codec and the text encoder, as functions; picklable."""

    def frames_to_latents(self, frames: np.ndarray) -> Tensor:
        """uint8 frames (T, H, W, 3) -> latents (C, F, h, w) on the CPU."""
        ...

    def embed(self, caption: str) -> Tensor:
        """Caption -> (k,) ids or (k, D) embeddings on the CPU."""
        ...


def dump_clip(latents: Tensor, texts: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """A file; floating tensors are stored as `dtype`, ids as they are."""
    tensors = {LATENTS: latents} | {_name(caption): text for caption, text in texts.items()}
    return safetensors.torch.save(
        {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()
        }
    )


def load_clip(data: bytes, caption: str) -> tuple[Tensor, Tensor]:
    """Latents in float32, and the text tokens of one caption. ValueError where it has no such."""
    try:
        tensors = safetensors.torch.load(data)
        latents, text = tensors[LATENTS], tensors[_name(caption)]
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"no tensor {error}, of caption {caption[:100]!r}") from error
    return latents.float(), text.float() if text.is_floating_point() else text


def dump_text(text: Tensor) -> bytes:
    """The text tokens of one caption alone, for dummies."""
    return safetensors.torch.save({_name(""): text.contiguous()})


def load_text(data: bytes) -> Tensor:
    """The reverse of `dump_text`, floats as float32; ValueError where it is something else."""
    try:
        text = safetensors.torch.load(data)[_name("")]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"not the text tokens of the empty caption: {error}") from error
    return text.float() if text.is_floating_point() else text


def _name(caption: str) -> str:
    return f"text-{hash64(caption):016x}"
