"""What a run would take: parameters, FLOPs, memory, time and money, without a GPU.

`python -m framework.train estimate=true experiment=…`. The mixture of clips is that of the
manifest's first part; where there is no manifest, all clips are as long as the recipe allows.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import nn

from framework.assembly import Assembly
from framework.data.plan.recipe import Recipe
from framework.data.plan.views import choose_views
from framework.train.config import HardwareConfig
from framework.train.engine.protocol import DTYPES, EngineConfig
from framework.train.engine.zero import largest_block
from framework.train.job import Job
from model_zoo.checkpointing import CheckpointPolicy
from model_zoo.flops import Grid, training_flops_per_token
from model_zoo.memory import Memory

MIXTURE_CLIPS = 10_000
# The CUDA context, communication buckets, workspaces, and what the allocator cannot use.
RESERVED_GIB = 6.0
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """`print` it."""

    num_parameters: int
    tokens_per_step: int
    flops_per_step: float
    mixture: str  # what is assumed of the clips
    num_gpus: int
    steps: int
    step_s: float
    memory: Memory
    knows_activations: bool  # else they are left out of `memory`
    hardware: HardwareConfig
    cures: tuple[str, ...]  # what would make it fit, where it does not

    @property
    def gpu_days(self) -> float:
        """Of the whole run."""
        return self.num_gpus * self.steps * self.step_s / 86_400

    @property
    def fits(self) -> bool:
        """Whether a GPU holds what is known."""
        return fits(self.memory, self.hardware)

    def __str__(self) -> str:
        hardware = self.hardware
        lines = [
            f"parameters     {self.num_parameters:,}",
            f"step           {self.tokens_per_step:,} tokens, {self.flops_per_step:.3g} FLOPs; "
            f"{self.mixture}",
            f"time           {self.step_s:.3g} s a step, on {_plural(self.num_gpus, 'GPU')} of "
            f"{hardware.peak_tflops:g} TFLOP/s at {hardware.mfu:.0%}",
            f"run            {self.steps:,} steps: {self.gpu_days:,.3g} GPU-days, "
            f"{_duration(self.steps * self.step_s)}",
        ]
        if hardware.dollars_per_hour is not None:
            dollars = self.gpu_days * 24 * hardware.dollars_per_hour
            lines.append(f"cost           ${dollars:,.0f}")
        parts = {name: value / GIB for name, value in vars(self.memory).items() if name != "host"}
        shown = ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if value >= 0.05)
        without = "" if self.knows_activations else ", and activations, not known of this model"
        verdict = "fits" if self.knows_activations else "without activations it fits"
        verdict = verdict if self.fits else "DOES NOT FIT"
        lines += [
            f"memory         {self.memory.total / GIB:.1f} GiB a GPU, and about {RESERVED_GIB:g} "
            f"beside it{without}: {shown}",
            f"               {self.memory.host / GIB:.1f} GiB of the CPU a GPU: what is offloaded,"
            " and the copy that a checkpoint is written from",
            f"               {verdict} {hardware.memory_gib:g} GiB",
            *(f"               would fit: {cure}" for cure in self.cures),
        ]
        return "\n".join(lines)


def estimate(job: Job, hardware: HardwareConfig) -> Estimate:
    """What this job would take on `cluster.num_workers` GPUs."""
    assembly, num_gpus = job.assembly, job.cluster.max_workers
    recipe = assembly.recipe()
    grids, mixture = _grids(assembly, recipe)
    tokens = recipe.global_batch_packs * recipe.max_tokens
    flops = training_flops_per_token(assembly.work(), grids) * tokens
    with torch.device("meta"):
        size = _Size.of(assembly.build_model())
    policy = job.train.activation_checkpointing
    return Estimate(
        num_parameters=size.numel,
        tokens_per_step=tokens,
        flops_per_step=flops,
        mixture=mixture,
        num_gpus=num_gpus,
        steps=job.train.steps,
        step_s=flops / (num_gpus * hardware.peak_tflops * 1e12 * hardware.mfu),
        memory=_memory(job, size, recipe.max_tokens, num_gpus, policy),
        knows_activations=_activations(job, recipe.max_tokens, policy) is not None,
        hardware=hardware,
        cures=tuple(_cures(job, size, recipe, hardware)),
    )


def fits(memory: Memory, hardware: HardwareConfig) -> bool:
    """Whether a GPU holds it, with what is not counted."""
    return memory.total / GIB + RESERVED_GIB <= hardware.memory_gib


def _grids(assembly: Assembly, recipe: Recipe) -> tuple[list[Grid], str]:
    """Token grids of a mixture of clips, and what they are."""
    url = assembly.data.manifest
    try:
        clips = assembly.on_videos().open_manifest().part(0).slice(0, MIXTURE_CLIPS)
    except ValueError:
        view = recipe.views.longest_view(recipe.geometry, recipe.max_tokens)
        grid = recipe.geometry.token_grid(view.num_frames, view.height, view.width)
        return [grid], f"every clip of {prod(grid):,} tokens, since {url} is no manifest yet"
    names = ("clip_id", "num_frames", "fps", "height", "width")
    columns: dict[str, np.ndarray] = {name: clips[name].to_numpy() for name in names}
    views = choose_views(columns, recipe.views, recipe.geometry, recipe.max_tokens, 0, 0)
    used = views.refused == ""
    shapes = zip(views.num_frames[used], views.height[used], views.width[used], strict=True)
    grids = [recipe.geometry.token_grid(int(t), int(h), int(w)) for t, h, w in shapes]
    if not grids:
        raise ValueError(f"none of {clips.num_rows} clips of {url} can be used by the recipe")
    mean = sum(map(prod, grids)) / len(grids)
    return grids, f"clips of {mean:,.0f} tokens on the average, as in {url}"


@dataclass(frozen=True)
class _Size:
    """Of a model, in values."""

    numel: int
    block: int  # the largest

    @classmethod
    def of(cls, model: nn.Module) -> "_Size":
        return cls(sum(parameter.numel() for parameter in model.parameters()), largest_block(model))


def _activations(job: Job, tokens: int, policy: CheckpointPolicy) -> int | None:
    """Bytes of a pack; None where there is no formula for the model."""
    value_bytes = DTYPES[job.engine.dtype].itemsize
    return job.assembly.model.activation_bytes(value_bytes, tokens, policy)


def _memory(job: Job, size: _Size, tokens: int, num_gpus: int, policy: CheckpointPolicy) -> Memory:
    """On one of so many GPUs; without activations where they are not known."""
    engine: EngineConfig = job.engine
    activations = _activations(job, tokens, policy) or 0
    return engine.memory(size.numel, size.block, num_gpus, activations)


def _cures(job: Job, size: _Size, recipe: Recipe, hardware: HardwareConfig) -> list[str]:
    """The smallest changes of some kinds that make it fit, at most three."""
    policy, ranks = job.train.activation_checkpointing, job.cluster.max_workers

    def fitting(tokens: int, num_gpus: int, chosen: CheckpointPolicy) -> bool:
        return fits(_memory(job, size, tokens, num_gpus, chosen), hardware)

    def gpus(count: int) -> str:
        packs = recipe.global_batch_packs  # a rank has one at least
        return f"cluster.num_workers={count}" + (
            f" data.global_batch_packs={count}" if count > packs else ""
        )

    if fitting(recipe.max_tokens, ranks, policy):
        return []
    mode = "train.activation_checkpointing.mode"
    full = replace(policy, mode="full")
    halves = [recipe.max_tokens // 2**i for i in range(1, 11)]
    doubles = [ranks * 2**i for i in range(1, 11)]
    as_is = recipe.max_tokens

    found = []
    if fitting(as_is, ranks, replace(policy, mode="selective")):
        found.append(f"{mode}=selective")
    if fitting(as_is, ranks, full):
        found.append(f"{mode}=full")
    plain = next((n for n in doubles if fitting(as_is, n, policy)), None)
    fewer = next((n for n in doubles if fitting(as_is, n, full)), None)
    if plain:
        found.append(gpus(plain))
    if fewer and (plain is None or fewer < plain):
        found.append(f"{mode}=full {gpus(fewer)}")
    if short := next((n for n in halves if n and fitting(n, ranks, full)), None):
        found.append(f"{mode}=full data.max_tokens={short}")
    return found[:3] or ["nothing that was tried; a smaller model, or GPUs with more memory"]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _duration(seconds: float) -> str:
    return f"{seconds / 86_400:.1f} days" if seconds >= 86_400 else f"{seconds / 3600:.2f} h"
