"""Evaluate a checkpoint on held-out clips: their loss, and videos made from their captions.

The held-out split gets a plan of its own (one epoch of the run's recipe, no caption dropped), so
that views, packs and token counts come from where training takes them. Videos are sampled from the
held-out captions, at the size and duration of what they describe; that is the real side of the
Fréchet distance.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from framework.assembly import Assembly
from framework.batch import PackedBatch
from framework.data.collate import ClipReader, assemble, to_batch
from framework.data.manifest import read_manifest
from framework.data.plan import ClipPlan, Plan, make_epoch
from framework.data.synthetic import ClipSpec, caption, held_out_prompts, render
from framework.evaluate.config import EvaluateConfig
from framework.evaluate.features import RandomConv3d
from framework.evaluate.frechet import Moments, frechet_distance
from framework.evaluate.shapes import score
from framework.evaluate.validation import validation_loss
from framework.sample.generate import Prompt, generate
from framework.storage import Store


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint; prompt following comes with its 95 % interval, _low to _high."""

    step: int
    metrics: dict[str, float]


def evaluate(
    assembly: Assembly,
    model: nn.Module,
    step: int,
    plan_store: Store,
    config: EvaluateConfig,
    sampler: Any,
    say: Callable[[str], None],
) -> Evaluation:
    """Validation loss, Fréchet distance and, for synthetic clips, prompt following."""
    manifest = read_manifest(assembly.data.manifest)
    plan = _heldout_plan(assembly, plan_store)
    reader = assembly.reader(manifest.shards_url)
    objective = assembly.build_objective()

    batches = _batches(plan, reader, config.validation_packs)
    losses = validation_loss(model, objective, batches, config.noise_levels, config.seed)
    metrics = {f"eval/{name}": value for name, value in losses.items()}
    say(f"validation loss {losses['loss']:.4f}")

    subjects = _subjects(assembly, plan, reader, config.num_prompts)
    prompts = [
        Prompt(s.caption, len(s.real), s.real.shape[1], s.real.shape[2], s.fps, config.seed + i)
        for i, s in enumerate(subjects)
    ]
    say(f"sampling {len(prompts)} videos from held-out captions")
    videos = generate(
        model,
        objective,
        assembly.build_codec(),
        assembly.build_text(),
        assembly.geometry,
        prompts,
        sampler,
        config.max_tokens,
    )
    features = RandomConv3d()
    real, fake = Moments(features.dim), Moments(features.dim)
    real.update(np.stack([features(subject.real) for subject in subjects]))
    fake.update(np.stack([features(video) for video in videos]))
    distance = frechet_distance(real, fake)
    metrics[f"eval/frechet_{features.name}"] = distance.distance
    metrics["eval/frechet_num_videos"] = distance.num_b

    specs = [subject.spec for subject in subjects if subject.spec]
    if not specs:
        return Evaluation(step, metrics)
    scores = score(videos, specs)
    for name in ("colour", "shape", "direction", "all_three"):
        rate = getattr(scores, name)
        metrics[f"eval/prompt_{name}"] = rate.value
        metrics[f"eval/prompt_{name}_low"] = rate.low
        metrics[f"eval/prompt_{name}_high"] = rate.high
    return Evaluation(step, metrics)


@dataclass(frozen=True)
class _Subject:
    """A caption to sample from, and what it describes."""

    caption: str
    fps: float
    real: np.ndarray  # uint8 (T, H, W, 3): gives the sample's size and duration, too
    spec: ClipSpec | None  # of a synthetic clip: what the strict reader should find


def _subjects(assembly: Assembly, plan: Plan, reader: ClipReader, count: int) -> list[_Subject]:
    """Held-out captions: of synthetic data those that no clip has, else those of held-out clips."""
    synthetic = assembly.data.synthetic
    if synthetic is not None:
        specs = held_out_prompts(synthetic, count, max(assembly.data.views.frames))
        return [_Subject(caption(spec), synthetic.fps, render(spec), spec) for spec in specs]
    clips = _moving_clips(plan, count)
    return [_Subject(clip.caption, clip.fps, reader.frames(clip), None) for clip in clips]


def _heldout_plan(assembly: Assembly, store: Store) -> Plan:
    manifest = read_manifest(assembly.data.manifest)
    recipe, text = replace(assembly.recipe(), drop_caption=0.0), assembly.build_text()
    return make_epoch(manifest, recipe, store, 0, text.num_tokens, text.fingerprint, "heldout")


def _batches(plan: Plan, reader: ClipReader, count: int) -> Iterator[PackedBatch]:
    """The first `count` packs of the plan, in its order; a function of the plan alone."""
    for step in range(plan.num_steps(0)):
        for pack in plan.packs(0, step, 0, 1):
            if count and not pack.dummy:
                yield to_batch(assemble(pack, reader, plan.recipe, False), 0, step, pack.index)
                count -= 1


def _moving_clips(plan: Plan, count: int) -> list[ClipPlan]:
    """Up to `count` clips of more than one frame, in the order of their ids."""
    clips = [
        clip
        for step in range(plan.num_steps(0))
        for pack in plan.packs(0, step, 0, 1)
        for clip in pack.clips
        if not clip.dummy and clip.view.num_frames > 1
    ]
    if not clips:
        raise ValueError("no held-out clip has more than one frame; there is nothing to sample")
    return sorted(clips, key=lambda clip: clip.clip_id)[:count]


def write_evaluation(store: Store, name: str, evaluation: Evaluation) -> None:
    """Keep the metrics as `evaluation/<name>.json` in the run's folder."""
    content = {"step": evaluation.step, "metrics": evaluation.metrics}
    store.write(f"evaluation/{name}.json", json.dumps(content, indent=1).encode())
