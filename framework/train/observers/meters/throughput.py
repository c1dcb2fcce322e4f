"""How fast a rank trains, and what it waits for.

It is told of every step and knows nothing of the loop; the clock is passed in. All figures are of
one window: the steps since `window()` was last called.
"""

from collections.abc import Callable


class Throughput:
    """Sums up steps, tokens, FLOPs, and the seconds spent on them."""

    def __init__(
        self, clock: Callable[[], float], peak_tflops: float | None = None, num_devices: int = 1
    ) -> None:
        """`clock` gives seconds; `peak_tflops` is of one device, dense, in the run's dtype."""
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"peak_tflops={peak_tflops} must be above 0; try 989 (H100, bf16)")
        self._clock, self._peak_flops = clock, peak_tflops and peak_tflops * 1e12 * num_devices
        self._mark = clock()  # up to here, time is counted
        self._reset()

    def _reset(self) -> None:
        self._steps = self._tokens = 0
        self._flops = self._seconds = 0.0

    def step(self, tokens: int, flops: float = 0.0) -> None:
        """End a step of so many video tokens and model FLOPs, both over all devices."""
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    def skip(self) -> None:
        """Leave out the time since the last step, which went into something else."""
        self._mark = self._clock()

    def window(self, wait_s: float = 0.0) -> dict[str, float]:
        """The figures of the steps since the last call, named as metrics; empty without a step.

        `wait_s`: of their seconds, those spent waiting for data.

        speed/tokens_per_s = tokens / seconds, speed/step_s = seconds / steps and data/wait_share =
        seconds waiting for data / seconds. speed/mfu, where both are known, = FLOPs / (seconds x
        peak x devices), after PaLM (Chowdhery et al. 2022, appendix B): the FLOPs that the model
        needs, 6 N + 12 depth d (sum S_i^2 / sum S_i) a token for N weights that act on every
        token, width d and clips of S_i tokens; recomputed activations do not count.
        """
        if self._steps == 0 or self._seconds == 0.0:
            return {}
        figures = {
            "speed/tokens_per_s": self._tokens / self._seconds,
            "speed/step_s": self._seconds / self._steps,
            "data/wait_share": wait_s / self._seconds,
        }
        if self._peak_flops and self._flops:
            figures["speed/mfu"] = self._flops / (self._seconds * self._peak_flops)
        self._reset()
        return figures
