"""`python -m framework.evaluate run.name=…`: a committed checkpoint on held-out clips."""

from framework.assembly import Assembly
from framework.config import RunConfig, entry
from framework.evaluate.run import evaluate, write_evaluation
from framework.terminal import Terminal
from framework.train.identity import run_store


def main(config: RunConfig) -> None:
    """Evaluate, print the metrics, keep them in the run's folder."""
    terminal = Terminal()
    assembly, run = Assembly.of(config), run_store(config.run)
    model, step = assembly.load_model(run, config.evaluate.checkpoint, config.evaluate.weights)
    terminal.say(f"evaluating step {step} of {run.url}")
    evaluation = evaluate(
        assembly,
        model,
        step,
        run,
        config.evaluate,
        config.sampler,
        lambda t: terminal.say(f"  {t}"),
    )
    for name, value in sorted(evaluation.metrics.items()):
        terminal.say(f"  {name:40} {value:.4f}")
    write_evaluation(run, f"step-{step:08d}", evaluation)


if __name__ == "__main__":
    entry(main)
