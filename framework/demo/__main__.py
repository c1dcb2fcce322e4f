"""`make demo`: the whole line on one machine, stage by stage, ending in a table.

Each stage is the function that its own command runs. Everything is kept in the run's folder, and a
stage whose result is there already is not done again, so a second `make demo` is cheap and one that
was interrupted goes on.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from framework.assembly import Assembly
from framework.cluster import connect
from framework.config import RunConfig, entry
from framework.data.index.job import index
from framework.demo.clips.moving_shapes import write_dataset
from framework.evaluate.evaluate import Evaluation, evaluated, missed_gates
from framework.run.identity import claim
from framework.run.ledger import read_ledger
from framework.run.logs import RunLog
from framework.sample.generate import Prompt, generate
from framework.sample.videos import write_videos
from framework.storage import TRAINING, Store, join_url
from framework.terminal import Terminal, duration
from framework.tracking.run_tracker import log_files, open_tracker
from framework.train.driver.job import Result, train
from framework.train.job import Job
from framework.trained import load_trained

# Seconds of each stage on two cores of a small cloud machine; they only tell the time left.
STAGES = {
    "making captioned clips": 15,
    "indexing the shards": 10,
    "evaluating the untrained model": 30,
    "planning and training": 590,
    "evaluating the trained model": 30,
    "sampling videos": 5,
}
# (caption, frames, height, width): sizes that were trained, then a longer and a larger one.
SHOWCASE = (
    ("a red circle moves left quickly over grey", 16, 32, 48),
    ("a blue cross moves down slowly over black", 24, 32, 32),
    ("a yellow triangle moves up quickly over navy", 16, 48, 32),
    ("a green cross moves right slowly over grey", 24, 32, 48),
    ("a cyan circle moves up slowly over navy", 24, 48, 32),
    ("a purple triangle moves right quickly over black", 16, 32, 48),
    ("a yellow circle over grey", 1, 32, 32),
    ("a red cross moves right slowly over navy", 48, 32, 48),
    ("a green circle moves down slowly over black", 24, 48, 48),
)


def main(config: RunConfig) -> None:
    """Run all stages and print the table."""
    if config.data.synthetic is None:
        raise ValueError("the demo makes its own clips; give data=synthetic or data.synthetic.…")
    terminal, job = Terminal(), Job.of(config)
    job.check()
    run = claim(config.run, job.identity)
    log = RunLog(run.with_retry(TRAINING), "driver")
    terminal.say(f"run {config.run.name} in {run.url}, log in {log.path}")
    with terminal.alone(log):
        missed = _stages(config, job, run, terminal)
    if missed:
        raise SystemExit("the model has not learnt what it should: " + "; ".join(missed))


def _stages(config: RunConfig, job: Job, run: Store, terminal: Terminal) -> list[str]:
    """All of it; the gates that were missed."""
    assert config.data.synthetic is not None
    began = time.monotonic()
    stages = iter(range(1, len(STAGES) + 1))

    def stage() -> Callable[[str], None]:
        number = next(stages)
        names, seconds = list(STAGES), list(STAGES.values())
        terminal.stage(number, len(STAGES), names[number - 1], sum(seconds[number - 1 :]))
        return lambda text: terminal.show({"text": text})

    say = stage()
    say(write_dataset(config.data.synthetic, config.data.shards, processes=2))
    say = stage()
    if not Store(config.data.manifest).exists("manifest.json"):
        connect(config.cluster)
        index(config.data.shards, config.data.manifest, config.data.index)
    say(f"manifest {config.data.manifest}")

    def evaluation_of(checkpoint: str) -> Evaluation:
        return evaluated(job.assembly, run, config.evaluate, config.sampler, checkpoint, say)

    say = stage()
    before = evaluation_of("init")
    say = stage()
    result = train(job, terminal.show, run)
    say = stage()
    after = evaluation_of("latest")
    say = stage()
    samples = _sample(config, job.assembly, run)

    summary = _summary(result, before, after, samples)
    summary["seconds"] = round(time.monotonic() - began, 1)
    run.write("summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    _track(config, result, before, after, samples)
    _print(terminal, summary, config)
    return missed_gates(config.evaluate.gates, before.metrics, after.metrics)


def _sample(config: RunConfig, assembly: Assembly, run: Store) -> list[str]:
    model, _ = load_trained(assembly, run, "latest", config.sample.weights)
    prompts = [
        Prompt(text, frames, height, width, config.sample.fps, config.sample.seed + i)
        for i, (text, frames, height, width) in enumerate(SHOWCASE)
    ]
    videos = generate(
        assembly.denoiser(model),
        assembly.encoders(),
        assembly.geometry,
        prompts,
        config.sampler,
        config.sample.max_tokens,
    )
    return write_videos(prompts, videos, run.child("samples"))


def _summary(
    result: Result, before: Evaluation, after: Evaluation, samples: list[str]
) -> dict[str, Any]:
    losses = [row["loss"] for _, row in sorted(read_ledger(result.store).items())]
    count = max(1, len(losses) // 50)
    plan = result.plan.summary(0)
    return {
        "run": result.store.url,
        "steps": result.checkpoint.step,
        "loss_first": sum(losses[:count]) / count,
        "loss_last": sum(losses[-count:]) / count,
        "before": before.metrics,
        "after": after.metrics,
        "speed": result.checkpoint.meta["speed"],
        "plan": {"digest": plan.digest, "fill": plan.fill, "imbalance": plan.imbalance},
        "samples": samples,
        "mlflow_run_id": result.tracker_run_id,
    }


def _track(
    config: RunConfig,
    result: Result,
    before: Evaluation,
    after: Evaluation,
    samples: list[str],
) -> None:
    """Evaluations, videos and the end of the run, in MLflow."""
    tracker = open_tracker(config.tracking, result.store, config.run.name, "driver")
    tracker.log_metrics(before.charted(), step=0)
    tracker.log_metrics(after.charted(), step=result.checkpoint.step)
    names = [url.rsplit("/", 1)[1] for url in samples]
    log_files(tracker, result.store.child("samples"), names, "samples")
    tracker.close("FINISHED")


def _print(terminal: Terminal, summary: dict[str, Any], config: RunConfig) -> None:
    before, after, speed = summary["before"], summary["after"], summary["speed"]
    rows = [
        ("", "before", "after"),
        ("training loss", f"{summary['loss_first']:.4f}", f"{summary['loss_last']:.4f}"),
    ]
    for name in before:
        if name == "eval/frechet_num_videos" or name.endswith(("_low", "_high")):
            continue
        rows.append((name.removeprefix("eval/"), _cell(before, name), _cell(after, name)))
    rows += [
        ("tokens/s", "", f"{speed['tokens_per_s']:,.0f}"),
        ("waiting for data", "", f"{speed['wait_share']:.1%}"),
        ("plan: fill", "", f"{summary['plan']['fill']:.3f}"),
        ("plan: imbalance", "", f"{summary['plan']['imbalance']:.3f}"),
    ]
    terminal.say(f"\ndone in {duration(summary['seconds'])}\n")
    for name, left, right in rows:
        terminal.say(f"  {name:28} {left:>22} {right:>22}")
    terminal.say("\nvideos:")
    for url in summary["samples"]:
        terminal.say(f"  {url.removeprefix('file://')}")
    terminal.say(f"\nsummary: {join_url(summary['run'], 'summary.json').removeprefix('file://')}")
    terminal.say(config.tracking.page())


def _cell(metrics: dict[str, float], name: str) -> str:
    value = f"{metrics[name]:.4f}" if "prompt" not in name else f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        value += f" ({metrics[f'{name}_low']:.2f}-{metrics[f'{name}_high']:.2f})"
    return value


if __name__ == "__main__":
    entry(main)
