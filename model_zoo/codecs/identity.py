"""Pixels as latents: for tests, and to train where a clip is small."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class IdentityConfig:
    """Builds an `IdentityCodec`; there is nothing to choose."""

    temporal_stride = 1
    spatial_stride = 1
    causal = False
    channels = 3
    latent_mean = (0.0, 0.0, 0.0)  # pixels lie in [-1, 1], and no clips were measured
    latent_std = (1.0, 1.0, 1.0)
    fingerprint = "identity-1"

    def build(self) -> "IdentityCodec":
        """The codec."""
        return IdentityCodec()


class IdentityCodec:
    """A `VideoCodec` whose latents are the pixels: C = 3, strides 1."""

    def encode(self, frames: Tensor) -> Tensor:
        """(T, 3, H, W) in [-1, 1] -> (3, T, H, W)."""
        return frames.movedim(1, 0).float()

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """(3, F, h, w) -> (num_frames, 3, h, w); raises ValueError where F < num_frames."""
        if latents.shape[1] < num_frames:
            raise ValueError(
                f"num_frames={num_frames} must not exceed the {latents.shape[1]} latent frames"
            )
        return latents.movedim(0, 1)[:num_frames]
