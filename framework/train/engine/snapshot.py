"""A copy of an engine's state in CPU memory, so that training goes on while it is written.

The buffers are made at the first snapshot and used for all that follow: 16 bytes a parameter that
this rank holds, pinned where the state is on CUDA. Writing works on the copy and on the
checkpoint's own process group, and so may be done by another thread.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from framework.run.sharded_state import Piece, save_state
from framework.storage import Store


class Snapshot:
    """The state as it was at the last `take`; one for each engine.

    `shapes` and `group` are those of `save_state`.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], group: distributed.ProcessGroup | None
    ) -> None:
        self.shapes = shapes
        self.group = group
        self.is_written = True
        self._state: dict[str, Tensor | Piece] = {}

    def take(self, state: Mapping[str, Tensor | Piece]) -> "Snapshot":
        """Copy `state`, which has the same names and shapes each time; it may change afterwards."""
        self.check_written()
        if not self._state:
            self._state = {name: _buffer_for(value) for name, value in state.items()}
        sources = [_values(state[name]) for name in self._state]
        copies = [_values(value) for value in self._state.values()]
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        if any(source.is_cuda for source in sources):
            torch.cuda.current_stream().synchronize()
        self.is_written = False
        return self

    def write(self, store: Store, attempt: str = "") -> None:
        """Write below `state/` of a checkpoint's folder; all ranks call it, from any one thread.

        `attempt`: see `save_state`.
        """
        try:
            save_state(self._state, self.shapes, store, self.group, attempt)
        finally:
            self.is_written = True

    def drop(self) -> None:
        """Let it go unwritten."""
        self.is_written = True

    def check_written(self) -> None:
        """AssertionError while the last snapshot waits to be written or is being written."""
        assert self.is_written, "the last snapshot is not written yet: wait for its write()"


def _values(value: Tensor | Piece) -> Tensor:
    return value.values if isinstance(value, Piece) else value.detach()


def _buffer_for(value: Tensor | Piece) -> Tensor | Piece:
    """A tensor of its own for each: a pinned one is rounded up to a power of two by torch."""
    values = _values(value)
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return Piece(copy, value.start, value.numel) if isinstance(value, Piece) else copy
