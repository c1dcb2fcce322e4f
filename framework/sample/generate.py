"""Prompts to frames: packs of any mix of sizes and durations, guidance, sampler, codec.

Takes live objects and returns arrays; where the weights come from and where the videos go is left
to the entry points.

Invariant: a prompt's video depends on the prompt (its seed included), the model and the sampler,
not on the other prompts of the call nor on the token budget, up to floating-point rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framework.batch import Clip, PackedBatch
from framework.data.plan.views import Geometry
from framework.diffusion.denoiser import Denoiser, Parametrization
from framework.diffusion.guidance import guided
from framework.diffusion.samplers import SamplerConfig
from framework.encoders import Encoders
from framework.seeding import draws, hash64
from model_zoo.patchify import unpatchify


@dataclass(frozen=True)
class Prompt:
    """One video to make. Equal prompts give equal videos; another seed gives another one."""

    text: str
    num_frames: int
    height: int  # pixels; need not be divisible by the codec's stride
    width: int
    fps: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.fps <= 0:
            raise ValueError(f"fps={self.fps} must be positive; try 8")


@dataclass(frozen=True)
class _Request:
    """A prompt with what packing needs to know of it."""

    index: int  # place in the caller's list
    prompt: Prompt
    grid: tuple[int, int, int]  # token rows in time, height, width
    text: Tensor  # (k,) or (k, D)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)


def generate(
    denoiser: Denoiser[Parametrization],
    encoders: Encoders,
    geometry: Geometry,
    prompts: Sequence[Prompt],
    sampler: SamplerConfig,
    max_tokens: int,
) -> list[np.ndarray]:
    """One array of uint8 frames (T, H, W, 3) a prompt, in the order of the prompts.

    max_tokens bounds the video tokens of one forward, both halves of guidance counted; a prompt
    that is larger by itself gets a forward of its own. Runs in eval mode on the model's device.
    Sizes that the token grid does not divide are made at the next larger grid and cropped, evenly
    in height and width, at the end in time.
    """
    device = denoiser.device
    requests = [
        _Request(i, p, geometry.token_grid(p.num_frames, p.height, p.width), encoders.embed(p.text))
        for i, p in enumerate(prompts)
    ]
    null_text = encoders.embed("").to(device)
    num_values = encoders.codec.channels * math.prod(geometry.patch_size)
    halves = 1 if sampler.guidance_scale == 1.0 else 2
    videos: dict[int, np.ndarray] = {}
    with denoiser.evaluating():
        for pack in _packs(requests, max_tokens // halves):
            batch = _batch(pack, num_values).to(device)
            flow = guided(denoiser, batch, sampler.guidance_scale, null_text)
            tokens = sampler.sample(flow, _noise(pack, num_values).to(device))
            lengths = [request.num_tokens for request in pack]
            for request, rows in zip(pack, tokens.split(lengths), strict=True):
                videos[request.index] = _frames(request, rows, encoders, geometry)
    return [videos[i] for i in range(len(prompts))]


def _packs(requests: list[_Request], max_tokens: int) -> list[list[_Request]]:
    """Like with like, so that attention over equal neighbours can run as one batch."""
    ordered = sorted(requests, key=lambda r: (r.num_tokens, r.grid, r.text.shape[0], r.index))
    packs: list[list[_Request]] = []
    room = 0
    for request in ordered:
        if not packs or request.num_tokens > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(request)
        room -= request.num_tokens
    return packs


def _batch(pack: list[_Request], num_values: int) -> PackedBatch:
    """A pack without padding: L is the sum of its clips; its tokens are not read in sampling."""
    clips = [
        Clip(
            tokens=torch.zeros(request.num_tokens, num_values),
            grid=request.grid,
            text=request.text,
            clip_id=request.index,
            fps=request.prompt.fps,
        )
        for request in pack
    ]
    return PackedBatch.from_clips(clips)


def _noise(pack: list[_Request], num_values: int) -> Tensor:
    """(L, P) float32: each prompt's own noise, from its seed and its text."""
    rows = [
        torch.from_numpy(
            draws(r.prompt.seed, 0, hash64(r.prompt.text), "sample").normal(
                r.num_tokens * num_values
            )
        ).view(r.num_tokens, num_values)
        for r in pack
    ]
    return torch.cat(rows)


def _frames(
    request: _Request, tokens: Tensor, encoders: Encoders, geometry: Geometry
) -> np.ndarray:
    """(n, P) tokens -> uint8 (T, H, W, 3), cropped to the size that was asked for."""
    prompt, patch_size = request.prompt, geometry.patch_size
    frames, height, width = (n * p for n, p in zip(request.grid, patch_size, strict=True))
    latents = unpatchify(
        tokens, request.grid, patch_size, encoders.codec.channels, (frames, height, width)
    )
    stride = geometry.temporal_stride
    num_frames = 1 + (frames - 1) * stride if geometry.causal else frames * stride
    video = encoders.latents_to_frames(latents, num_frames)  # (T', H', W', 3)
    top = (video.shape[1] - prompt.height) // 2
    left = (video.shape[2] - prompt.width) // 2
    rows, columns = slice(top, top + prompt.height), slice(left, left + prompt.width)
    return np.ascontiguousarray(video[: prompt.num_frames, rows, columns])
