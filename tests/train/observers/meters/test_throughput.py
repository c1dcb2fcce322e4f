import pytest

from framework.train.observers.meters.throughput import Throughput


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_counts_waiting_and_computing() -> None:
    clock = Clock()
    throughput = Throughput(clock, peak_tflops=2.0, num_devices=4)
    for wait_s in (1.0, 3.0):
        clock.now += wait_s + 8.0  # and computes
        throughput.step(tokens=500, flops=16e12)
    assert throughput.window(wait_s=4.0) == {
        "speed/tokens_per_s": 1000 / 20.0,
        "speed/step_s": 10.0,
        "data/wait_share": 4.0 / 20.0,
        "speed/mfu": 32e12 / (20.0 * 8e12),
    }


def test_windows_do_not_share_steps() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    assert throughput.window() == {}
    clock.now += 2.0
    throughput.step(10)
    assert throughput.window()["speed/tokens_per_s"] == 5.0
    clock.now += 1.0
    throughput.step(20)
    assert throughput.window() == {
        "speed/tokens_per_s": 20.0,
        "speed/step_s": 1.0,
        "data/wait_share": 0.0,
    }


def test_a_checkpoint_is_left_out() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    for _ in range(2):
        clock.now += 0.5 + 0.5  # waits, and computes
        throughput.step(100)
        clock.now += 60.0  # saves
        throughput.skip()
    figures = throughput.window(wait_s=1.0)
    assert figures["speed/tokens_per_s"] == 100.0
    assert figures["data/wait_share"] == 0.5


def test_no_mfu_without_a_peak_or_flops() -> None:
    for peak_tflops, flops in ((None, 1e12), (1.0, 0.0)):
        clock = Clock()
        throughput = Throughput(clock, peak_tflops)
        clock.now += 1.0
        throughput.step(1, flops)
        assert "speed/mfu" not in throughput.window()
    with pytest.raises(ValueError, match="peak_tflops=0"):
        Throughput(Clock(), peak_tflops=0.0)
