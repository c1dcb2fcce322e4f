"""`python -m framework.train experiment=…`: train a run, or go on with it."""

from framework.config import RunConfig, entry
from framework.run.identity import claim
from framework.run.logs import RunLog
from framework.storage import TRAINING
from framework.terminal import Terminal
from framework.tracking.run_tracker import open_tracker
from framework.train.driver.estimate import estimate
from framework.train.driver.job import train
from framework.train.job import Job


def main(config: RunConfig) -> None:
    """Train and say where the result lies; or, with `estimate=true`, what it would take."""
    terminal, job = Terminal(), Job.of(config)
    job.check()
    if config.estimate:
        print(estimate(job, config.hardware))
        return
    job.assembly.check_data()  # a mistake must not leave a claimed name behind
    run = claim(job.run, job.identity)
    log = RunLog(run.with_retry(TRAINING), "driver")
    terminal.say(f"run {config.run.name} in {run.url}, log in {log.path}")
    terminal.say(config.tracking.page())
    with terminal.alone(log):
        result = train(job, terminal.show, run)
        open_tracker(config.tracking, result.store, config.run.name, "driver").close("FINISHED")
    terminal.say(f"committed: {result.checkpoint.store.url}")


if __name__ == "__main__":
    entry(main)
