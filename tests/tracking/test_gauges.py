"""Gauges of a real Ray, scraped as Prometheus does it. This file is also the script that sets them.

Ray runs in a session of its own, which ends with the test.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from framework.tracking.gauges import Gauges, gauge_name


def test_names_are_what_prometheus_takes() -> None:
    assert gauge_name("train/loss") == "longtake_train_loss"
    assert gauge_name("loss/t_0.0-0.1") == "longtake_loss_t_0_0_0_1"
    assert gauge_name("loss_by_source/films 2:1") == "longtake_loss_by_source_films_2_1"


def test_outside_ray_nothing_happens() -> None:
    Gauges("run", 0).show({"train/loss": 1.0})


@pytest.mark.slow
def test_prometheus_finds_the_last_value_of_each_rank() -> None:
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group is this test's own
    assert process.returncode == 0, output[-6000:]
    found = re.findall(
        r'^ray_longtake_(\w+)\{.*rank="(\d)",run="(\w+)".*\} (\S+)$', output, re.MULTILINE
    )
    assert sorted(found) == [
        ("memory_peak_gib", "0", "demo", "3.0"),
        ("memory_peak_gib", "1", "demo", "4.0"),
        ("speed_step_s", "0", "demo", "2.0"),
        ("train_loss", "0", "demo", "0.25"),
    ]
    assert output.count("no gauges") == 1  # of the rank that gave something else than a number


def set_and_scrape() -> None:
    import ray

    ray.init(
        num_cpus=1, include_dashboard=False, _system_config={"metrics_report_interval_ms": 200}
    )
    try:
        first, second, broken = Gauges("demo", 0), Gauges("demo", 1), Gauges("demo", 2)
        for loss in (0.5, 0.25):
            first.show({"train/loss": loss, "speed/step_s": 2})
        second.show({"train/loss": 9.0})
        first.show({"memory/peak_gib": 3.0}, of_rank=True)
        second.show({"memory/peak_gib": 4.0}, of_rank=True)
        for _ in range(2):
            broken.show({"memory/peak_gib": "much"}, of_rank=True)  # type: ignore[dict-item]
        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        lines: list[str] = []
        while len(lines) < 4 or not any(line.endswith(" 0.25") for line in lines):
            try:  # again and again, until the test's own patience ends
                page = urllib.request.urlopen(url, timeout=10).read().decode()
            except (urllib.error.URLError, ConnectionError):
                continue  # the agent is still starting
            lines = [line for line in page.splitlines() if line.startswith("ray_longtake")]
        print(*lines, sep="\n")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    set_and_scrape()
