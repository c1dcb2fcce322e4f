"""Ctrl-C twice stops at once, whatever the run is at; this file is also the driver."""

import signal
import subprocess
import sys
import threading

import pytest

from framework.train.driver.follow import Interrupts, Stopped, follow
from framework.train.mailbox import Mailbox, make_mailbox


def test_figures_replace_older_figures_and_no_word() -> None:
    """A driver on a busy machine comes late: what was said stays, of the figures the newest."""
    mailbox = Mailbox()
    told = [
        {"stage": "training", "step": 5, "resumed": True},
        {"step": 6, "steps": 9, "loss": 2.0},
        {"step": 7, "steps": 9, "loss": 1.0},
        {"text": "a slow rank"},
        {"step": 8, "steps": 9, "loss": 0.5},
    ]
    for line in told:
        mailbox.tell(line)
    assert mailbox.take() == [{"stage": "starting workers"}, told[0], *told[2:]]
    assert mailbox.take() == []


@pytest.mark.slow
def test_the_second_signal_stops_at_once() -> None:
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "starting workers" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)  # as `ray job stop` does
        assert "once more to stop at once" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped at once; the same command goes on" in rest


def main() -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        for_ever = threading.Event().wait
        with Interrupts() as interrupts:
            follow(
                make_mailbox(),
                for_ever,
                lambda line: print(line, flush=True),
                interrupts,
                lambda: "",
            )
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
