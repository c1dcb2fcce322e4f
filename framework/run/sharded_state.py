"""Sharded tensors of a checkpoint: to files of a `Store`, and back onto any number of ranks.

    state/rank-00000-000.bin   tensors as raw bytes
    state/index.json           which bytes are which part of which tensor

Every tensor is 1-D and cut anywhere, each rank holding a `Piece` or the whole. So any number of
ranks can load what any other number saved, and each reads only its bytes. Nothing is ever
unpickled. Whether these files count is for `framework.run.checkpoint` to say.

torch.distributed.checkpoint did this once: its plans are for tensors of any shape, objects and
devices. Of the load of a small model they took half of the time, and of each process's start a
second (benchmarks/results/2026-11-22-2-core-vm.md).

Invariant: the index is written last, names each file with its size and checksum, and each value of
each tensor once.
"""

import hashlib
import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from framework.storage import Store

T = TypeVar("T")
log = logging.getLogger(__name__)

FORMAT = 1
INDEX = "state/index.json"
# Chosen by hand. An object of PART_BYTES is held in memory at a time, and written again as a whole
# when the store fails; neighbouring parts of tensors are read READ_BYTES at once.
PART_BYTES = 256 << 20
READ_BYTES = 32 << 20
# On another number of ranks the parts that a rank wants lie apart: below this gap, as for clips in
# `framework.data.shards.fetch`, what is between them costs less than a request. From a file system
# a request costs little, and with such gaps the middle of three ranks read three times its share.
GAP_BYTES = 1 << 20
GAP_BYTES_LOCAL = 1 << 14
READS_IN_FLIGHT = 8


def checksum(data: bytes | memoryview) -> str:
    """128 bits of BLAKE2b, as hex; against torn and altered files, not against an enemy."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter by its name."""
    # A parameter that ZeRO-3 has partitioned keeps its real shape in `ds_shape`.
    return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, as `buffers.<name>`."""
    saved = model.state_dict(keep_vars=True).keys()
    return {f"buffers.{name}": b for name, b in model.named_buffers() if name in saved}


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a 1-D tensor of `numel` values: those from `start` on, maybe none.

    The pieces of the ranks do not overlap and leave nothing out.
    """

    values: Tensor
    start: int
    numel: int


class RanksFailed(RuntimeError):
    """What ranks raised in a save or a load, by rank; all ranks raise it alike."""

    def __init__(self, failures: Mapping[int, Exception]) -> None:
        super().__init__(failures)
        self.failures = failures

    def __str__(self) -> str:
        return "; ".join(f"rank {r}: {type(e).__name__}: {e}" for r, e in self.failures.items())


def save_state(
    state: Mapping[str, Tensor | Piece],
    shapes: Mapping[str, Sequence[int]],
    store: Store,
    group: distributed.ProcessGroup | None = None,
    attempt: str = "",
) -> None:
    """Write 1-D tensors, whole or in pieces, below `state/` of `store`; all ranks call it together.

    The names and their order are the same on all ranks. `shapes`: real shapes of the model's
    tensors by name, which a load compares with its own. `group`: of ranks, with a CPU backend; the
    default group where it is None. `attempt`: part of the files' names, so that a process that
    should be dead writes over nothing. When it returns, every rank has written, and rank 0 the
    index. RanksFailed where a rank failed; of a process without others, its own error.
    """
    rank, world = (distributed.get_rank(group), _world(group)) if _world(group) > 1 else (0, 1)
    prefix = f"state/{attempt}-rank" if attempt else "state/rank"

    def write() -> _Written:
        return _write(_to_write(state, rank, world), store, f"{prefix}-{rank:05d}")

    if world == 1:
        _write_index(state, shapes, store, [write()])
        return
    outcome = _try(write)
    outcomes: list[Any] | None = [None] * world if rank == 0 else None
    distributed.gather_object(outcome, outcomes, group=group, group_dst=0)
    failures: list[Any] = [None]
    if outcomes is not None:
        failures = [_failures(outcomes)]
        if not failures[0]:
            written = [one for one, _ in outcomes]
            failures = [_failures([_try(lambda: _write_index(state, shapes, store, written))])]
    distributed.broadcast_object_list(failures, group=group, group_src=0)
    if failures[0]:
        raise RanksFailed(failures[0])


def load_state(
    state: Mapping[str, Tensor | Piece],
    shapes: Mapping[str, Sequence[int]],
    store: Store,
    group: distributed.ProcessGroup | None = None,
    alone: bool = False,
) -> None:
    """Fill `state`'s tensors in place from what `save_state` wrote; all ranks call it together.

    `alone`: this process loads by itself, even if it belongs to a process group. Where there is no
    moving average of the weights (`ema.*`), the weights stand for it, with a warning. ValueError
    where the checkpoint has other tensors than the model, or tensors of other shapes; RanksFailed
    where a rank failed to read; of a process without others, its own error.
    """

    def read() -> None:
        index = json.loads(store.read(INDEX))
        if index["format"] != FORMAT:
            raise ValueError(f"{store.url} has format {index['format']}; we read {FORMAT}")
        _let_weights_stand_for_ema(index["tensors"], state, store.url)
        _check_shapes(index, state, shapes, store.url)
        _read(index, state, store)

    if alone or _world(group) == 1:
        read()
        return
    outcome = _try(read)
    outcomes: list[Any] = [None] * _world(group)
    distributed.all_gather_object(outcomes, outcome, group)
    if failures := _failures(outcomes):
        first = failures.get(0)  # the checkpoint is another model's, for all ranks alike
        raise first if isinstance(first, ValueError) else RanksFailed(failures)


def _world(group: distributed.ProcessGroup | None) -> int:
    return distributed.get_world_size(group) if distributed.is_initialized() else 1


def _try(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it gives or what it raises, either to be sent to another rank."""
    try:
        return action(), None
    except Exception as error:
        traceback.print_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _failures(outcomes: Sequence[tuple[Any, Exception | None]]) -> dict[int, Exception]:
    return {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}


@dataclass
class _Written:
    """What a rank has written."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # name -> bytes, checksum
    # Of which tensor, and as the index has it: start, values, file, offset in bytes.
    chunks: list[tuple[str, list[Any]]] = field(default_factory=list)


def _to_write(
    state: Mapping[str, Tensor | Piece], rank: int, world: int
) -> Iterator[tuple[str, int, Tensor]]:
    """What this rank writes: name, start and values.

    What every rank holds whole is written by the one that has the least of it so far.
    """
    shared = [0] * world
    for name, value in state.items():
        if isinstance(value, Piece):
            if value.values.numel():  # a rank beyond the end of a small tensor holds nothing of it
                yield name, value.start, value.values
            continue
        writer = shared.index(min(shared))
        shared[writer] += value.nbytes
        if writer == rank and value.numel():
            yield name, 0, value


def _write(parts: Iterator[tuple[str, int, Tensor]], store: Store, prefix: str) -> _Written:
    """Tensors end to end into objects of about PART_BYTES each."""
    written = _Written()
    waiting: list[tuple[str, int, Tensor]] = []
    waiting_bytes = 0

    def flush() -> None:
        file, offset = f"{prefix}-{len(written.files):03d}.bin", 0
        # By torch, for it lets other threads run meanwhile.
        data = torch.cat([_raw(values) for _, _, values in waiting]).numpy().data
        store.write(file, data)
        written.files[file] = len(data), checksum(data)
        for name, start, values in waiting:
            written.chunks.append((name, [start, values.numel(), file, offset]))
            offset += values.nbytes
        waiting.clear()

    for part in parts:
        waiting.append(part)
        waiting_bytes += part[2].nbytes
        if waiting_bytes >= PART_BYTES:
            flush()
            waiting_bytes = 0
    if waiting:
        flush()
    return written


def _raw(values: Tensor) -> Tensor:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _write_index(
    state: Mapping[str, Tensor | Piece],
    shapes: Mapping[str, Sequence[int]],
    store: Store,
    written: Sequence[_Written],
) -> None:
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        numel, values = _numel(value), _values(value)
        dtype = str(values.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": [numel], "chunks": []}
    for rank in written:
        for name, chunk in rank.chunks:
            tensors[name]["chunks"].append(chunk)
    for name, tensor in tensors.items():
        tensor["chunks"].sort()
        end = 0
        for start, size, *_ in tensor["chunks"]:
            assert start == end, (name, start, end)
            end += size
        assert [end] == tensor["size"], (name, end, tensor["size"])
    index = {
        "format": FORMAT,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "tensors": tensors,
        "files": {name: list(file) for rank in written for name, file in rank.files.items()},
    }
    store.write(INDEX, json.dumps(index).encode())


def _values(value: Tensor | Piece) -> Tensor:
    return value.values if isinstance(value, Piece) else value


def _numel(value: Tensor | Piece) -> int:
    return value.numel if isinstance(value, Piece) else value.numel()


def _check_shapes(
    index: dict[str, Any],
    state: Mapping[str, Tensor | Piece],
    shapes: Mapping[str, Sequence[int]],
    url: str,
) -> None:
    saved = index["shapes"]
    for name in sorted(saved.keys() | shapes.keys()):
        theirs, ours = saved.get(name), list(shapes[name]) if name in shapes else None
        if theirs != ours:
            raise ValueError(
                f"{url}: tensor {name} has shape {theirs} there and {ours} in the model; "
                "build the model from the config in the checkpoint's meta.json"
            )
    missing = sorted(state.keys() - index["tensors"].keys())
    if missing:
        raise ValueError(f"{url} does not hold {missing[0]} and {len(missing) - 1} more tensors")
    for name, value in state.items():
        if (size := index["tensors"][name]["size"]) != [_numel(value)]:
            raise ValueError(f"{url}: {name} has {size[0]} values there, {_numel(value)} are asked")


def _let_weights_stand_for_ema(
    saved: dict[str, Any], wanted: Mapping[str, Tensor | Piece], url: str
) -> None:
    missing = [n for n in wanted if n.startswith("ema.") and n not in saved]
    for name in missing:
        if (weights := "weights." + name.removeprefix("ema.")) in saved:
            saved[name] = saved[weights]
    if missing:
        log.warning("%s holds no moving average: it is taken to be the weights", url)


@dataclass(frozen=True)
class _Range:
    """Bytes [begin, end) of a file, and the values that they are."""

    file: str
    begin: int
    end: int
    values: Tensor  # to be filled
    dtype: torch.dtype  # in the file


def _to_read(index: dict[str, Any], state: Mapping[str, Tensor | Piece]) -> Iterator[_Range]:
    for name, value in state.items():
        values, first = _values(value).detach(), value.start if isinstance(value, Piece) else 0
        entry = index["tensors"][name]
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        for start, size, file, offset in entry["chunks"]:
            low, high = max(start, first), min(start + size, first + values.numel())
            if low < high:
                begin = offset + (low - start) * dtype.itemsize
                end = begin + (high - low) * dtype.itemsize
                yield _Range(file, begin, end, values[low - first : high - first], dtype)


def _read(index: dict[str, Any], state: Mapping[str, Tensor | Piece], store: Store) -> None:
    """Fill the tensors, neighbouring ranges by one request."""
    gap_bytes = GAP_BYTES_LOCAL if store.is_local else GAP_BYTES
    runs: list[list[_Range]] = []
    for wanted in sorted(_to_read(index, state), key=lambda r: (r.file, r.begin)):
        if (
            runs
            and runs[-1][0].file == wanted.file
            and wanted.begin - runs[-1][-1].end <= gap_bytes
            and wanted.end - runs[-1][0].begin <= READ_BYTES
        ):
            runs[-1].append(wanted)
        else:
            runs.append([wanted])

    def fetch(run: Sequence[_Range]) -> bytearray:
        begin, end = run[0].begin, run[-1].end
        return bytearray(store.read_range(run[0].file, begin, end - begin))

    with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
        for first in range(0, len(runs), READS_IN_FLIGHT):  # so many are in memory at a time
            some = runs[first : first + READS_IN_FLIGHT]
            for run, data in zip(some, pool.map(fetch, some), strict=True):
                for one in run:
                    count = (one.end - one.begin) // one.dtype.itemsize
                    offset = one.begin - run[0].begin
                    one.values.copy_(
                        torch.frombuffer(data, dtype=one.dtype, count=count, offset=offset)
                    )
