"""A video codec without weights: an orthonormal 3-D Haar transform that keeps the coarse bands.

A block of 4 frames x 8 x 8 pixels becomes one latent position of 144 channels (768 values, 5.3 x
fewer). Temporal bands: mean, coarse and two fine differences; spatial ones: mean and three levels
of a 2-D pyramid (1, 3, 12 and 48 values); colour: luma along (1, 1, 1) and two chroma. The finest
spatial level is dropped, and in chroma also the second finest within the two fine temporal bands:
64 luma and 80 chroma values stay.

Each band is then scaled to a standard deviation of (std / g)^0.5, where g is the root mean square
of all bands: 0.31 to 3.02. Half-way between leaving the spectrum as it is (0.1 to 9.1) and
whitening it, which teaches a diffusion model to spend itself on noise-like detail.

Shapes: T frames, C = 144 channels, F h w latent grid.
"""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES, PIXELS = 4, 8  # of a block in time, and in height and width

# Standard deviation of the coefficients by (temporal level, is chroma, spatial level), level 0 the
# mean and higher ones finer; pixels in [-1, 1]. Measured over the first 500 clips of
# `framework.demo.clips` (seed 0; circles, squares and triangles of a radius of 7 to 9.5 pixels,
# as it drew them then), after H.264 at CRF 20, at 32 pixels on the shorter side.
_BAND_STD = {
    (0, False, 0): 8.9115,
    (0, False, 1): 1.8279,
    (0, False, 2): 0.6247,
    (0, True, 0): 4.0303,
    (0, True, 1): 0.9011,
    (0, True, 2): 0.2793,
    (1, False, 0): 0.9460,
    (1, False, 1): 0.5256,
    (1, False, 2): 0.2622,
    (1, True, 0): 0.4794,
    (1, True, 1): 0.2328,
    (1, True, 2): 0.0938,
    (2, False, 0): 0.3530,
    (2, False, 1): 0.2156,
    (2, False, 2): 0.1388,
    (2, True, 0): 0.1773,
    (2, True, 1): 0.0931,
}
# Mean of the coefficient of each colour that is a mean in time and space; the same clips. The means
# of all others are below 0.03.
_MEAN = (-15.84, -2.37, 1.02)


@dataclass(frozen=True)
class HaarConfig:
    """Builds a `HaarCodec`; there is nothing to choose."""

    temporal_stride = FRAMES
    spatial_stride = PIXELS
    causal = False

    @property
    def channels(self) -> int:
        """C."""
        return len(_bands().std)

    @property
    def latent_mean(self) -> tuple[float, ...]:
        """(C,) zeros: `HaarCodec` subtracts the mean of the clips that were measured."""
        return (0.0,) * self.channels

    @property
    def latent_std(self) -> tuple[float, ...]:
        """(C,) standard deviation of the latents of the clips that were measured."""
        return tuple(_bands().std.tolist())

    @property
    def fingerprint(self) -> str:
        """Hashes all constants."""
        constants = repr(("haar-1", FRAMES, PIXELS, _BAND_STD, _MEAN))
        return f"haar-{hashlib.sha256(constants.encode()).hexdigest()[:16]}"

    def build(self) -> "HaarCodec":
        """The codec."""
        return HaarCodec()


class HaarCodec:
    """A `VideoCodec`: blocks of pixels times one orthonormal matrix, shifted and scaled."""

    def __init__(self) -> None:
        bands = _bands()
        self._analysis, self._synthesis = bands.analysis, bands.synthesis  # 2 x (C, 768)
        self._shift = bands.shift  # (C,)

    def encode(self, frames: Tensor) -> Tensor:
        """(T, 3, H, W) in [-1, 1] -> (C, ceil(T / 4), H / 8, W / 8) float32.

        The last frame repeats up to a multiple of 4. Raises ValueError for H or W not divisible
        by 8.
        """
        num_frames, _, height, width = frames.shape
        if height % PIXELS or width % PIXELS:
            raise ValueError(
                f"height={height} and width={width} must be divisible by {PIXELS}; try "
                f"{-(-height // PIXELS) * PIXELS} x {-(-width // PIXELS) * PIXELS}"
            )
        frames = torch.cat([frames.float(), *[frames[-1:].float()] * (-num_frames % FRAMES)])
        f, h, w = frames.shape[0] // FRAMES, height // PIXELS, width // PIXELS
        blocks = frames.reshape(f, FRAMES, 3, h, PIXELS, w, PIXELS).permute(0, 3, 5, 1, 2, 4, 6)
        latents = blocks.reshape(f, h, w, -1) @ self._analysis.T.to(frames.device)  # (F, h, w, C)
        return (latents - self._shift.to(frames.device)).movedim(-1, 0)  # (C, F, h, w)

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """(C, F, h, w) -> (num_frames, 3, 8 h, 8 w); raises ValueError where F is too short."""
        _, f, h, w = latents.shape
        if f * FRAMES < num_frames:
            raise ValueError(
                f"num_frames={num_frames} must not exceed the {f * FRAMES} of {f} latent frames"
            )
        latents = latents.movedim(0, -1).float() + self._shift.to(latents.device)  # (F, h, w, C)
        blocks = latents @ self._synthesis.to(latents.device)  # (F, h, w, 768)
        blocks = blocks.reshape(f, h, w, FRAMES, 3, PIXELS, PIXELS).permute(0, 3, 4, 1, 5, 2, 6)
        return blocks.reshape(f * FRAMES, 3, h * PIXELS, w * PIXELS)[:num_frames]


def _haar_1d(size: int) -> tuple[Tensor, list[int]]:
    """Orthonormal Haar basis (size, size), rows coarse to fine, and the level of each row."""
    basis, levels = torch.ones(1, 1, dtype=torch.float64), [0]
    while (n := basis.shape[0]) < size:
        coarse = torch.kron(basis, basis.new_tensor([[1, 1]]))
        fine = torch.kron(torch.eye(n, dtype=basis.dtype), basis.new_tensor([[1, -1]]))
        basis = torch.cat([coarse, fine]) / 2**0.5
        levels += [max(levels) + 1] * n
    return basis, levels


def _haar_2d(size: int) -> tuple[Tensor, list[int]]:
    """Orthonormal pyramid (size^2, size, size), rows coarse to fine, and the level of each row."""
    basis, levels = torch.ones(1, 1, 1, dtype=torch.float64), [0]
    details = ([[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]])
    while (n := basis.shape[-1]) < size:
        places = torch.eye(n * n, dtype=basis.dtype).reshape(-1, n, n)
        fine = [torch.kron(places, basis.new_tensor([detail])) for detail in details]
        coarse = torch.kron(basis, basis.new_ones(1, 2, 2))
        basis = torch.cat([coarse, *fine]) / 2
        levels += [max(levels) + 1] * (3 * n * n)
    return basis, levels


@dataclass(frozen=True)
class _Bands:
    """Of the bands that stay, scaled; float32. Nobody writes into these tensors."""

    std: Tensor  # (C,) of the latents
    analysis: Tensor  # (C, 768)
    synthesis: Tensor  # (C, 768)
    shift: Tensor  # (C,): the mean of what `analysis` gives


@functools.cache
def _bands() -> _Bands:
    with torch.device("cpu"):  # whoever asks first may be building a model without memory
        matrix, std, mean = _kept_bands()  # (C, 768), (C,), (C,) float64
    gain = (std * std.square().mean().sqrt()).rsqrt()  # so that std * gain = (std / g)^0.5
    return _Bands(
        std=(std * gain).float(),
        analysis=(matrix * gain[:, None]).float(),
        synthesis=(matrix / gain[:, None]).float(),
        shift=(mean * gain).float(),
    )


def _kept_bands() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the transform that stay, (C, 768) over (frame, colour, y, x); their std and mean."""
    time, time_levels = _haar_1d(FRAMES)
    space, space_levels = _haar_2d(PIXELS)
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colour = colour / colour.norm(dim=1, keepdim=True)  # luma, two chroma
    rows = torch.einsum("af,bc,syx->absfcyx", time, colour, space).reshape(-1, FRAMES * 3 * 64)
    kept, std, mean = [], [], []
    for a, time_level in enumerate(time_levels):
        for b in range(3):
            for s, space_level in enumerate(space_levels):
                band = (time_level, b > 0, space_level)
                if band not in _BAND_STD:
                    continue
                kept.append((a * 3 + b) * len(space_levels) + s)
                std.append(_BAND_STD[band])
                mean.append(_MEAN[b] if time_level == space_level == 0 else 0.0)
    return rows[kept], rows.new_tensor(std), rows.new_tensor(mean)
