"""`python -m framework.data.plan`: what training will do, before it does."""

from framework.assembly import Assembly
from framework.config import RunConfig, entry
from framework.run.identity import claim, name_freed_if_refused


def main(config: RunConfig) -> None:
    """Plan the steps of a run and print what the plan is like."""
    assembly = Assembly.of(config)
    assembly.check()
    assembly.check_data()
    run = claim(config.run, config.identity)
    with name_freed_if_refused(run):
        plan = assembly.planner().make(run, config.train.steps, print)
    print(plan.epochs_of(config.train.steps))


if __name__ == "__main__":
    entry(main)
