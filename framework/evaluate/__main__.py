"""`python -m framework.evaluate experiment=demo`: a committed checkpoint on held-out clips."""

from framework.assembly import Assembly
from framework.config import RunConfig, entry
from framework.evaluate.evaluate import Evaluation, evaluated
from framework.run.identity import run_store
from framework.storage import Store
from framework.terminal import Terminal
from framework.tracking.run_tracker import open_tracker


def main(config: RunConfig) -> None:
    """Evaluate, print the metrics, keep them in the run's folder and in its MLflow run."""
    terminal, run, checkpoint = Terminal(), run_store(config.run), config.evaluate.checkpoint
    terminal.say(f"evaluating checkpoint {checkpoint} of {run.url}")
    evaluation = evaluated(
        Assembly.of(config),
        run,
        config.evaluate,
        config.sampler,
        checkpoint,
        lambda text: terminal.say(f"  {text}"),
    )
    terminal.say(f"step {evaluation.step}:")
    for name, value in sorted(evaluation.metrics.items()):
        terminal.say(f"  {name:40} {value:.4f}")
    # A checkpoint by URL may be another run's.
    if "/" not in checkpoint and run.exists("tracking.json"):
        _track(config, run, evaluation)


def _track(config: RunConfig, run: Store, evaluation: Evaluation) -> None:
    metrics = evaluation.charted()
    if config.evaluate.weights == "weights":  # a metric has one point at a step: the EMA's
        metrics = {name.replace("eval/", "eval-weights/"): v for name, v in metrics.items()}
    tracker = open_tracker(config.tracking, run, config.run.name, "evaluate")
    tracker.log_metrics(metrics, evaluation.step, checkpoint_step=evaluation.step or None)
    tracker.close(None)


if __name__ == "__main__":
    entry(main)
