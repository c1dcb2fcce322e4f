"""Ctrl-C twice stops at once, whatever the run is at; this file is also the driver."""

import signal
import subprocess
import sys
import threading

import pytest

from framework.train.driver.follow import Interrupts, Stopped, follow
from framework.train.mailbox import make_mailbox


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
