"""Notice that this rank is to leave soon: SIGTERM.

Batch schedulers and clouds send it some time before they take a machine. Ray's worker would die of
it at once; here it is a wish to leave, which all ranks follow after a checkpoint. (Nodes that Ray
drains are for the driver to see: `ray.train.get_preemption_info` is a barrier over all ranks.)
"""

import signal
import threading
from typing import Any

from ray.train.torch import TorchConfig

_noticed = threading.Event()


def noticed() -> bool:
    """Whether this rank is to leave."""
    return _noticed.is_set()


def _take_notice() -> None:
    _noticed.clear()
    signal.signal(signal.SIGTERM, lambda *_: _noticed.set())


class NoticingTorchConfig(TorchConfig):
    """Ray Train's process group; beside it, SIGTERM becomes a notice in each worker.

    A signal's handler can be set in a process's main thread only, which is where Ray runs what a
    backend executes, while training runs in another.
    """

    @property
    def backend_cls(self) -> type[Any]:
        """The process group's own backend, and the handler."""
        parent: type[Any] = super().backend_cls

        class Backend(parent):
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                """After the process group stands."""
                super().on_start(worker_group, backend_config)
                worker_group.execute(_take_notice)

        return Backend
