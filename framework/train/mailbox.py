"""What passes between the driver and the workers while a run trains: lines to show, wishes.

Ctrl-C (or SIGTERM, which `ray job stop` sends) once asks the workers to commit a checkpoint and
stop; twice stops at once. The driver asks likewise when nodes come or go. All ranks follow at the
end of the same step.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Line = dict[str, Any]


class Board:
    """A Ray actor beside the driver: lines of rank 0, and what the driver asks for.

    It keeps every line of text, and of the steps in between the last.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = [{"stage": "starting workers"}]
        self._wish = ""
        self._refusal: str | None = None
        self._left = ""

    def tell(self, line: Line) -> None:
        """Rank 0's next line."""
        if self._lines and "step" in line and "step" in self._lines[-1] and "loss" in line:
            self._lines.pop()
        self._lines.append(line)

    def take(self) -> list[Line]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def ask(self, wish: str) -> None:
        """The driver wants the run committed and left, and says why."""
        self._wish = wish

    def wish(self) -> str:
        """Why to leave; empty where there is no wish."""
        return self._wish

    def leave(self, why: str) -> None:
        """The workers have committed and left before the last step."""
        self._left = why

    def left(self) -> str:
        """Why the workers left, if they did."""
        return self._left

    def refuse(self, why: str) -> None:
        """The workers will not train, and a restart would not help; the first reason counts."""
        self._refusal = self._refusal or why

    def refusal(self) -> str | None:
        """Why the workers will not train, if they will not."""
        return self._refusal


def make_board() -> Any:
    """A handle of a new board, on the driver's own node: it goes with no other."""
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=beside).remote()


NO_ROOM = "no room"  # how a wish begins that workers may be unable to follow
