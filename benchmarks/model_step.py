"""Forward and backward of dit_s on packs, against diffusers' Wan of its size on the same clips.

    python -m benchmarks.model_step [--packs 6] [--threads 2]

The mixture of benchmarks/packing with every axis of a clip's grid scaled down to packs of 4,096
tokens; random latents and text embeddings, float32. Each pack goes through ours as it is, through
Wan as one batch padded to its largest grid and longest text, and through Wan clip by clip: in
turns, so that the load of the machine meets all. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.packing import RECIPE, mixture
from framework.batch import Clip, PackedBatch
from framework.data.plan.packing import Packer, PackLimits
from framework.data.plan.views import choose_views
from model_zoo.convert import from_wan, wan_shape
from model_zoo.flops import forward_flops
from model_zoo.patchify import patchify

MAX_TOKENS = 4096
SCALE = (RECIPE.max_tokens / MAX_TOKENS) ** (1 / 3)  # of each axis
CHANNELS, TEXT_DIM = 16, 512
Grid = tuple[int, int, int]


def packs_of_grids(count: int, seed: int = 0) -> list[list[Grid]]:
    """Some packs of the middle of an epoch, each a list of token grids, longest first."""
    clips = mixture(2000, seed).table
    names = ("clip_id", "num_frames", "fps", "height", "width")
    columns = {name: clips[name].to_numpy() for name in names}
    views = choose_views(columns, RECIPE.views, RECIPE.geometry, RECIPE.max_tokens, 0, 0)
    whole = zip(views.num_frames.tolist(), views.height.tolist(), views.width.tolist(), strict=True)
    grids = [_scaled(RECIPE.geometry.token_grid(*view)) for view in whole]
    tokens = [f * h * w for f, h, w in grids]
    packer = Packer(PackLimits(MAX_TOKENS, MAX_TOKENS, 64), RECIPE.lookahead, seed)
    packs = [*packer.add(0, tokens, [1] * len(tokens), None), *packer.finish()]
    middle = packs[len(packs) // 3 :][:: max(1, len(packs) // 3 // count)][:count]
    return [sorted((grids[i] for i in pack), key=np.prod, reverse=True) for pack in middle]


def _scaled(grid: Grid) -> Grid:
    f, h, w = (max(1, round(n / SCALE)) for n in grid)
    return (min(f, MAX_TOKENS // (h * w)), h, w)


class Clips:
    """The clips of a pack, for all three."""

    def __init__(self, grids: list[Grid], patch_size: Grid, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(16, 78, (len(grids),), generator=generator).tolist()
        self.grids = grids
        self.latents = [
            torch.randn(CHANNELS, *(n * p for n, p in zip(grid, patch_size, strict=True)))
            for grid in grids
        ]
        self.texts = [torch.randn(length, TEXT_DIM) for length in lengths]
        self.t = torch.rand(len(grids), generator=generator)
        self.patch_size = patch_size

    @property
    def num_tokens(self) -> int:
        """Of video."""
        return sum(f * h * w for f, h, w in self.grids)

    def packed(self) -> PackedBatch:
        """As our model takes them."""
        clips = [
            Clip(patchify(latents, self.patch_size), grid, text, i, 24.0)
            for i, (latents, grid, text) in enumerate(
                zip(self.latents, self.grids, self.texts, strict=True)
            )
        ]
        return PackedBatch.from_clips(clips)

    def padded(self) -> tuple[Tensor, Tensor]:
        """One batch of latents and one of texts, zeros where a clip is smaller."""
        sides = [max(clip.shape[i] for clip in self.latents) for i in range(1, 4)]
        latents = torch.zeros(len(self.latents), CHANNELS, *sides)
        texts = torch.zeros(len(self.texts), max(map(len, self.texts)), TEXT_DIM)
        for i, (clip, text) in enumerate(zip(self.latents, self.texts, strict=True)):
            _, f, h, w = clip.shape
            latents[i, :, :f, :h, :w] = clip
            texts[i, : len(text)] = text
        return latents, texts


def ours(model: nn.Module, clips: Clips) -> None:
    """Forward and backward of the pack."""
    pack = clips.packed()
    model(pack.tokens, clips.t, pack, pack.text).square().mean().backward()


def padded(wan: Any, clips: Clips) -> None:
    """The same of one padded batch."""
    latents, texts = clips.padded()
    wan(latents, 1000 * clips.t, texts, return_dict=False)[0].square().mean().backward()


def one_by_one(wan: Any, clips: Clips) -> None:
    """The same clip by clip."""
    for i, (latents, text) in enumerate(zip(clips.latents, clips.texts, strict=True)):
        out = wan(latents[None], 1000 * clips.t[i : i + 1], text[None], return_dict=False)[0]
        out.square().mean().backward()


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--packs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    wan: Any = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=128, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, ffn_dim=1536, num_layers=12,
    )  # fmt: skip
    shape = wan_shape(wan.config)
    model = shape.build()
    model.load_state_dict(from_wan(wan.state_dict(), shape))
    contenders: dict[str, Callable[[Clips], None]] = {
        "ours": lambda clips: ours(model, clips),
        "padded": lambda clips: padded(wan, clips),
        "one by one": lambda clips: one_by_one(wan, clips),
    }
    packs = [
        Clips(grids, shape.config.patch_size, seed)
        for seed, grids in enumerate(packs_of_grids(options.packs))
    ]
    for run in contenders.values():  # the first call of each allocates
        run(Clips([(2, 4, 4)], shape.config.patch_size, 0))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    print(
        f"{'pack':>4}{'clips':>7}{'tokens':>8}{'padded to':>11}"
        + "".join(f"{n:>12}" for n in seconds)
    )
    for i, clips in enumerate(packs):
        for name, run in contenders.items():
            began = time.perf_counter()
            run(clips)
            seconds[name].append(time.perf_counter() - began)
        volume = len(clips.grids) * int(np.prod(np.array(clips.grids).max(axis=0)))
        shown = "".join(f"{times[-1]:>10.2f} s" for times in seconds.values())
        print(f"{i:>4}{len(clips.grids):>7}{clips.num_tokens:>8}{volume:>11}{shown}", flush=True)
    work = shape.config.work(shape.token_size, TEXT_DIM)
    flops = [
        3 * forward_flops(work, clips.grids, [len(text) for text in clips.texts]) for clips in packs
    ]
    tokens = sum(clips.num_tokens for clips in packs)
    for name, times in seconds.items():
        print(f"{name:12} {tokens / sum(times):8,.0f} tokens/s")
    print(f"ours reaches {sum(flops) / sum(seconds['ours']) / 1e9:.0f} GFLOP/s")
    ratios = {
        f"over_{name.replace(' ', '_')}": round(
            statistics.fmean(seconds[name]) / statistics.fmean(seconds["ours"]), 3
        )
        for name in ("padded", "one by one")
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
