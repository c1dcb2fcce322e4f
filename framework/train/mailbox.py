"""What passes between driver and workers in an attempt: lines to show, requests to leave.

The driver asks the workers to commit a checkpoint and leave when the run is to stop, or when nodes
come or go. All ranks follow at the end of the same step.
"""

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from framework.terminal import Line


class Mailbox:
    """A Ray actor beside the driver: lines of rank 0, and what the driver asks for.

    It keeps every line of text, and of the steps in between the last.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = [{"stage": "starting workers"}]
        self._leave_request = ""
        self._refusal: str | None = None
        self._left = ""

    def tell(self, line: Line) -> None:
        """Rank 0's next line; figures of a step take the place of older ones that nobody took."""
        if self._lines and "loss" in line and "loss" in self._lines[-1]:
            self._lines.pop()
        self._lines.append(line)

    def take(self) -> list[Line]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def ask_to_leave(self, why: str) -> None:
        """The driver wants the run committed and left, and says why."""
        self._leave_request = why

    def leave_request(self) -> str:
        """Why the driver wants the workers to leave; empty where it does not."""
        return self._leave_request

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


def make_mailbox() -> ActorHandle:
    """A handle of a new mailbox, on the driver's own node: it goes with no other."""
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=beside).remote()


NO_ROOM = "no room"  # how a request begins that workers may be unable to follow
