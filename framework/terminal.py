"""What a person watching the terminal sees: the stage, how far it is, how long still."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from framework.printable import printable_page
from framework.run.logs import RunLog

Line = dict[str, Any]  # {"stage"}, {"text"}, or a step with its figures
Show = Callable[[Line], None]


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Terminal:
    """Prints stages and, during training, one line every few seconds."""

    def __init__(self, every_s: float = 5.0, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._every_s = every_s
        self._began = time.monotonic()
        self._last_shown = -every_s
        self._first: tuple[int, float] | None = None  # step and time since which the rate counts

    @contextlib.contextmanager
    def alone(self, log: RunLog) -> Iterator[None]:
        """Nothing but this terminal's lines is shown; they and all else go to `log`."""
        with log.catch() as both:
            kept, self._out = self._out, both
            try:
                yield
            finally:
                self._out = kept

    def say(self, text: str) -> None:
        """Words of our own, mostly one line; no control character in them reaches the terminal."""
        print(printable_page(text), file=self._out, flush=True)

    def stage(self, number: int, count: int, name: str, rest_s: float) -> None:
        """A new stage; `rest_s` is what it and the later ones take, by experience."""
        elapsed = duration(time.monotonic() - self._began)
        self.say(
            f"\n[{number}/{count}] {name}   ({elapsed} so far, about {duration(rest_s)} to go)"
        )

    def show(self, line: Line) -> None:
        """A line of a running job."""
        if "text" in line:
            self.say(f"  {line['text']}")
            return
        if "stage" in line:
            since = f" at step {line['step']}" if line.get("step") else ""
            word = "resuming" if line.get("resumed") else line["stage"]
            self.say(f"  {word}{since} …")
            self._first = None
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (line["step"], now)
        done = line["step"] == line["steps"]
        if now - self._last_shown < self._every_s and not done:
            return
        self._last_shown = now
        first_step, first_time = self._first
        steps_left = line["steps"] - line["step"]
        progressed = line["step"] - first_step
        left = duration(steps_left * (now - first_time) / progressed) if progressed else "?"
        self.say(
            f"  step {line['step']:>6}/{line['steps']}   loss {line['loss']:.4f}   "
            f"{line.get('speed/tokens_per_s', 0):>7,.0f} tokens/s   "
            f"waiting for data {100 * line.get('data/wait_share', 0):4.1f} %   {left} to go"
        )
