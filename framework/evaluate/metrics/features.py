"""Videos to feature vectors, for Fréchet distances.

The features name the metric: a distance is called FVD only with I3D's logits, which need weights.
`RandomConv3d` needs none. Distances in a random network's features rank strong damage as trained
ones do (Naeem et al. 2020, "Reliable fidelity and diversity metrics", use random VGG features off
the domain of ImageNet), but say little of meaning: they compare runs of one set-up, no more.
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.seeding import draws


class VideoFeatures(Protocol):
    """Videos of any size and duration to vectors."""

    name: str  # of the features; the metric is frechet_<name>
    dim: int  # D

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 -> (D,) float64; a function of the frames alone."""
        ...


class RandomConv3d:
    """Fixed random 3-D convolutions over 16 frames of 32 x 32; weights by framework.seeding.

    Three layers of stride 2 see 3, 7 and 15 positions in each direction. Of every channel a vector
    holds the mean over space and time, and how much it varies in time: without the latter a video
    that stands still looked the same (measured on moving shapes). Half of the first filters are
    blind to constant colour, so that colour does not drown shape and motion.
    """

    name = "random_conv3d"
    num_frames = 16
    size = 32
    widths = (32, 48, 48)
    dim = 2 * sum(widths)

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        channels = 3
        for layer, width in enumerate(self.widths):
            fan_in = channels * 27
            values = draws(0, 0, layer, "random_conv3d").normal(width * fan_in)
            # He et al. 2015: variance 2 / fan_in keeps the scale through ReLU.
            weight = torch.from_numpy(values).view(width, channels, 3, 3, 3) * (2 / fan_in) ** 0.5
            if layer == 0:
                half = weight[: width // 2]
                weight[: width // 2] = half - half.mean(dim=(2, 3, 4), keepdim=True)
            self._weights.append(weight)
            channels = width

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8, T >= 1 -> (256,) float64.

        Frames are taken evenly spaced over the whole duration (repeated where there are fewer than
        16), then resized without regard to aspect ratio, smoothed against aliasing.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
            raise ValueError(
                f"frames of {frames.dtype} {frames.shape} must be uint8 (T, H, W, 3), T >= 1"
            )
        chosen = np.linspace(0, len(frames) - 1, self.num_frames).round().astype(int)
        pixels = torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = F.interpolate(
            pixels, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True
        )
        x = pixels.transpose(0, 1)[None]  # (1, 3, 16, 32, 32)
        pooled = []
        for weight in self._weights:
            x = F.conv3d(x, weight, stride=2, padding=1).relu()
            pooled.append(x.mean(dim=(0, 2, 3, 4)))  # (width,)
            pooled.append(x.std(dim=2, correction=0).mean(dim=(0, 2, 3)))  # (width,)
        return torch.cat(pooled).double().numpy()
