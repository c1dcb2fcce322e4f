"""A process that hangs says where, and ends; this file is also that process."""

import subprocess
import sys
import threading

import pytest

from framework.train.rank.watchdog import EXIT_CODE, Watchdog


@pytest.mark.slow
def test_a_hang_ends_the_process_with_its_stacks() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_CODE
    assert "waits_for_ever" in done.stdout
    assert "most recent call first" in done.stdout
    assert "not reached" not in done.stdout


def test_progress_and_the_end_of_the_block_keep_it_quiet() -> None:
    reports: list[str] = []
    with Watchdog(30.0, reports.append) as watchdog:
        for _ in range(100):
            watchdog.beat()
    with Watchdog(0.0, reports.append) as never:
        never.beat()
    assert not reports


def waits_for_ever() -> None:
    with Watchdog(1.0, lambda stacks: print(stacks, flush=True)):
        threading.Event().wait()
    print("not reached")


if __name__ == "__main__":
    waits_for_ever()
