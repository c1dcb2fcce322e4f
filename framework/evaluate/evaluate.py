"""Evaluate a checkpoint on held-out clips: their loss, and videos made from their captions.

The held-out split gets a plan of its own (one epoch of the run's recipe, no caption dropped), so
that views, packs and token counts come from where training takes them. Videos are sampled from the
held-out captions, at the size and duration of what they describe; that is the real side of the
Fréchet distance.

`evaluated` keeps results in the run's folder, with all that they depend on.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from framework.assembly import Assembly
from framework.batch import PackedBatch
from framework.data.plan.rows import ClipPlan
from framework.data.plan.store import Plan
from framework.data.stream.collate import ClipReader, assemble
from framework.demo.clips.moving_shapes import ClipSpec, caption, held_out_prompts, render
from framework.diffusion.denoiser import Denoiser
from framework.diffusion.samplers import SamplerConfig
from framework.evaluate.config import EvaluateConfig
from framework.evaluate.metrics.features import RandomConv3d
from framework.evaluate.metrics.metric import Metric, Sample
from framework.evaluate.metrics.prompt_following import prompt_following
from framework.evaluate.metrics.validation import validation_loss
from framework.evaluate.metrics.video_distance import VideoDistance
from framework.mapping import flatten, is_below, masked, to_mapping
from framework.objectives.objective import DiffusionObjective
from framework.printable import printable
from framework.run.checkpoint import find_checkpoint
from framework.sample.generate import Prompt, generate
from framework.storage import Store
from framework.trained import load_trained
from framework.video import VideoError


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint; prompt following comes with its 95 % interval, _low to _high."""

    step: int
    metrics: dict[str, float]

    def charted(self) -> dict[str, float]:
        """The metrics that are worth a chart: without the ends of intervals and the counts."""
        return {
            name: value
            for name, value in self.metrics.items()
            if not name.endswith(("_low", "_high", "_num_videos"))
        }


def evaluation_file(step: int, weights: str) -> str:
    """Where `evaluated` keeps what it found of "ema" or "weights", in the run's folder."""
    return f"evaluation/step-{step:08d}{'-weights' if weights == 'weights' else ''}.json"


def evaluated(
    assembly: Assembly,
    run: Store,
    config: EvaluateConfig,
    sampler: SamplerConfig,
    checkpoint: str,
    say: Callable[[str], None],
) -> Evaluation:
    """Evaluate a checkpoint of the run in folder `run`, or read what an equal evaluation found.

    checkpoint: as in `load_trained`; it counts, not `config.checkpoint`. Writes
    `evaluation/<name>.json`: the metrics, and the settings that they depend on.
    """
    url, file = "init", "evaluation/init.json"
    if checkpoint != "init":
        found = find_checkpoint(run.child("checkpoints"), checkpoint)
        url, file = found.store.url, evaluation_file(found.step, config.weights)
    settings = _settings(assembly, config, sampler, url)
    if run.exists(file):
        stored = json.loads(run.read(file))
        if stored.get("settings") == settings:
            say(f"evaluated already, see {file}")
            return Evaluation(stored["step"], stored["metrics"])
    # By URL: a later checkpoint may have become the latest by now.
    model, step = load_trained(assembly, run, url, config.weights)
    evaluation = evaluate(assembly, assembly.denoiser(model), step, run, config, sampler, say)
    content = {"step": evaluation.step, "metrics": evaluation.metrics, "settings": settings}
    run.write(file, (json.dumps(content, indent=1) + "\n").encode())
    return evaluation


def _settings(
    assembly: Assembly, config: EvaluateConfig, sampler: SamplerConfig, checkpoint_url: str
) -> dict[str, Any]:
    """All that an evaluation depends on, flat and as JSON reads it back."""
    flat = flatten(
        {
            "checkpoint": checkpoint_url,
            "evaluate": to_mapping(config),
            "metrics": sorted(sample_metrics()),
            "sampler": {"kind": assembly.identity.values["sampler.kind"], **to_mapping(sampler)},
            "data": to_mapping(assembly.data),
            "seed": assembly.seed,
        }
    )
    network = assembly.network()
    free = (*network.free, "evaluate.gates", "evaluate.checkpoint", "data.stream")
    settings = {**masked(flat), **network.values}
    return {key: value for key, value in settings.items() if not is_below(key, free)}


def missed_gates(
    gates: Mapping[str, float], before: Mapping[str, float], after: Mapping[str, float]
) -> list[str]:
    """What the trained model does not reach, a sentence each: a gate, or a loss below `before`."""
    missed = []
    for name, least in gates.items():
        if name not in after:
            missed.append(f"{name} is no metric; there are {', '.join(sorted(after))}")
        elif not after[name] >= least:  # NaN misses, too
            missed.append(f"{name} {after[name]:.3f} is below {least:g}")
    loss, loss_before = after["eval/loss"], before["eval/loss"]
    if not loss < loss_before:
        missed.append(f"eval/loss {loss:.4f} is not below the {loss_before:.4f} before training")
    return missed


def evaluate(
    assembly: Assembly,
    denoiser: Denoiser[DiffusionObjective],
    step: int,
    plan_store: Store,
    config: EvaluateConfig,
    sampler: SamplerConfig,
    say: Callable[[str], None],
) -> Evaluation:
    """The validation loss, and what `sample_metrics` say of videos made from held-out captions."""
    assembly = assembly.on_videos()  # samples are compared with frames
    manifest = assembly.open_manifest()
    plan = assembly.planner().heldout(plan_store)
    reader = assembly.reader(manifest.shards_url)

    batches = _batches(plan, reader, config.validation_packs, say)
    losses = validation_loss(denoiser, batches, config.noise_levels, config.seed)
    metrics = {f"eval/{name}": value for name, value in losses.items()}
    say(f"validation loss {losses['loss']:.4f}")

    subjects = _subjects(assembly, plan, reader, config.num_prompts, say)
    prompts = [
        Prompt(s.caption, len(s.real), s.real.shape[1], s.real.shape[2], s.fps, config.seed + i)
        for i, s in enumerate(subjects)
    ]
    say(f"sampling {len(prompts)} videos from held-out captions")
    videos = generate(
        denoiser,
        assembly.encoders(),
        assembly.geometry,
        prompts,
        sampler,
        config.max_tokens,
    )
    samples = [
        Sample(subject.caption, subject.real, video, subject.spec)
        for subject, video in zip(subjects, videos, strict=True)
    ]
    for metric in sample_metrics().values():
        metrics |= {f"eval/{name}": value for name, value in metric(samples).items()}
    return Evaluation(step, metrics)


def sample_metrics() -> Mapping[str, Metric]:
    """What judges the videos of a checkpoint, by name: the one place that lists them all."""
    return {
        "video_distance": VideoDistance(RandomConv3d()),
        "prompt_following": prompt_following,
    }


@dataclass(frozen=True)
class _Subject:
    """A caption to sample from, and what it describes."""

    caption: str
    fps: float
    real: np.ndarray  # uint8 (T, H, W, 3): gives the sample's size and duration, too
    spec: ClipSpec | None  # of a synthetic clip: what the strict reader should find


def _subjects(
    assembly: Assembly, plan: Plan, reader: ClipReader, count: int, say: Callable[[str], None]
) -> list[_Subject]:
    """Held-out captions: of synthetic data those that no clip has, else those of held-out clips.

    A clip that cannot be read is named, and the next one takes its place. ValueError where none is
    left.
    """
    synthetic = assembly.data.synthetic
    if synthetic is not None:
        specs = held_out_prompts(synthetic, count, max(assembly.data.views.frames))
        return [_Subject(caption(spec), synthetic.fps, render(spec), spec) for spec in specs]
    subjects: list[_Subject] = []
    for clip in _moving_clips(plan):
        if len(subjects) == count:
            break
        try:
            subjects.append(_Subject(clip.caption, clip.fps, reader.frames(clip), None))
        except (VideoError, EOFError, OSError) as error:
            say(printable(f"skipped {clip.key}: {error}"))
    if not subjects:
        raise ValueError(
            "no held-out clip of more than one frame can be read; there is nothing to sample"
        )
    return subjects


def _batches(
    plan: Plan, reader: ClipReader, count: int, say: Callable[[str], None]
) -> Iterator[PackedBatch]:
    """The first `count` packs of the plan, in its order; clips that cannot be read are named."""
    packs = (
        (step, pack)
        for step in range(plan.num_steps(0))
        for pack in plan.packs(0, step, 0, 1)
        if not pack.dummy
    )
    for step, pack in islice(packs, count):
        batch = assemble(pack, reader, plan.recipe, False, epoch_step=step)
        for failure in batch.failed:
            say(printable(f"skipped {failure}"))
        yield batch


def _moving_clips(plan: Plan) -> list[ClipPlan]:
    """The clips of more than one frame, in the order of their ids."""
    clips = [
        clip
        for step in range(plan.num_steps(0))
        for pack in plan.packs(0, step, 0, 1)
        for clip in pack.clips
        if not clip.dummy and clip.view.num_frames > 1
    ]
    return sorted(clips, key=lambda clip: clip.clip_id)
