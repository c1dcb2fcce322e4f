"""Sharded tensors of a checkpoint: to files of a `Store`, and back onto any number of ranks.

    state/rank-00000-000.bin   tensors as raw bytes
    state/index.json           which bytes are which part of which tensor

Every tensor is 1-D and cut anywhere, each rank holding a `Piece` or the whole;
`torch.distributed.checkpoint` plans who writes and who reads what, so that any number of ranks can
load what any other number saved, and each reads only its bytes. Nothing is ever unpickled. Whether
these files count is for `framework.checkpoint` to say.

Invariant: the index is written last and names each file with its size and checksum.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from framework.storage import Store

log = logging.getLogger(__name__)

FORMAT = 1
INDEX = "state/index.json"
# Chosen by hand. An object of PART_BYTES is held in memory at a time, and written again as a whole
# when the store fails; neighbouring parts of tensors are read READ_BYTES at once.
PART_BYTES = 256 << 20
READ_BYTES = 32 << 20
# On another number of ranks the parts that a rank wants lie apart: below this gap, as for clips in
# `framework.data.fetch`, what is between them costs less than a request. From a file system a
# request costs little, and with such gaps the middle of three ranks read three times its share.
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

    The pieces of the ranks do not overlap and leave nothing out. The two methods are the protocol
    by which `torch.distributed.checkpoint` asks an object for its part of a tensor.
    """

    values: Tensor
    start: int
    numel: int

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk,
                    TensorProperties(dtype=self.values.dtype),
                    torch.Size([self.numel]),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        size = self.values.numel()
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([size]))] if size else []


def save_state(
    state: Mapping[str, Tensor | Piece],
    shapes: Mapping[str, Sequence[int]],
    store: Store,
    group: distributed.ProcessGroup | None = None,
    attempt: str = "",
) -> None:
    """Write 1-D tensors, whole or in pieces, below `state/` of `store`; all ranks call it together.

    `shapes`: real shapes of the model's tensors by name, which a load compares with its own.
    `group`: of ranks, with a CPU backend; the default group where it is None. `attempt`: part of
    the files' names, so that a process that should be dead writes over nothing. When it returns on
    rank 0, every rank has written.
    """
    _silence_single_process()
    dcp.save(
        dict(state),
        storage_writer=_StoreWriter(store, shapes, attempt),
        planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
    )


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
    where the checkpoint has other tensors than the model, or tensors of other shapes.
    """
    reader = _StoreReader(store)
    _let_weights_stand_for_ema(reader.index["tensors"], state, store.url)
    _check_shapes(reader.index, state, shapes, store.url)
    _silence_single_process()
    failures: dict[int, Any] = {}
    try:
        # Each rank plans for itself, as rank 0 would do for all: nobody else writes what it reads.
        dcp.load(
            dict(state),
            storage_reader=reader,
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    except CheckpointException as error:
        failures = dict(error.failures)
    if not alone and distributed.is_initialized():
        everyone: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(everyone, failures, group)
        failures = {rank: raised for rank, one in enumerate(everyone) for raised in one.values()}
    if failures:
        raise CheckpointException("load", failures)


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


def _let_weights_stand_for_ema(
    saved: dict[str, Any], wanted: Mapping[str, Tensor | Piece], url: str
) -> None:
    missing = [n for n in wanted if n.startswith("ema.") and n not in saved]
    for name in missing:
        if (weights := "weights." + name.removeprefix("ema.")) in saved:
            saved[name] = saved[weights]
    if missing:
        log.warning("%s holds no moving average: it is taken to be the weights", url)


def _silence_single_process() -> None:
    # One process without a process group is a supported case, not an accident. For good, because
    # `catch_warnings` is not for threads, and a checkpoint may be written by one.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return _values(self.state_dict[index.fqn])


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:  # the default one drops what it does not know
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _values(self.state_dict[index.fqn])


def _values(value: Tensor | Piece) -> Tensor:
    return value.values if isinstance(value, Piece) else value


@dataclass(frozen=True)
class _File:
    """One object that a rank has written."""

    name: str
    size_bytes: int
    checksum: str


class _StoreWriter(StorageWriter):
    """Writes each rank's tensors end to end into its own objects, at most about PART_BYTES each."""

    def __init__(
        self, store: Store, shapes: Mapping[str, Sequence[int]], attempt: str = ""
    ) -> None:
        self.store = store
        self.shapes = shapes
        self.prefix = f"state/{attempt}-rank" if attempt else "state/rank"

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for rank, plan in enumerate(plans):
            object.__setattr__(plan, "storage_data", rank)  # SavePlan is frozen
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        parts: list[tuple[MetadataIndex, Tensor]] = []
        num_files, waiting = 0, 0

        def flush() -> None:
            nonlocal num_files, waiting
            name = f"{self.prefix}-{plan.storage_data:05d}-{num_files:03d}.bin"
            # By torch, for it lets other threads run meanwhile.
            data = torch.cat([part for _, part in parts]).numpy().data
            self.store.write(name, data)
            file, offset = _File(name, len(data), checksum(data)), 0
            for index, part in parts:
                results.append(WriteResult(index, part.numel(), (file, offset)))
                offset += part.numel()
            parts.clear()
            num_files, waiting = num_files + 1, 0

        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            parts.append((item.index, raw))
            waiting += raw.numel()
            if waiting >= PART_BYTES:
                flush()
        if parts:
            flush()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result for rank in results for result in rank}
        files: dict[str, _File] = {}
        tensors: dict[str, Any] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = []
            for chunk in tensor.chunks:
                (start,), (size,) = chunk.offsets, chunk.sizes
                if size:  # a rank beyond the end of a small tensor holds nothing of it
                    file, offset = written[MetadataIndex(name, chunk.offsets)].storage_data
                    files[file.name] = file
                    chunks.append([start, size, file.name, offset])
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
        index = {
            "format": FORMAT,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "tensors": tensors,
            "files": {f.name: [f.size_bytes, f.checksum] for f in files.values()},
        }
        self.store.write(INDEX, json.dumps(index).encode())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # a store is handed over, never found by its name


class _StoreReader(StorageReader):
    """Reads exactly the bytes that a plan asks for, neighbours together."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.index = json.loads(store.read(INDEX))
        if self.index["format"] != FORMAT:
            raise ValueError(f"{store.url} has format {self.index['format']}; we read {FORMAT}")

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.places: dict[MetadataIndex, tuple[str, int]] = {}
        for name, entry in self.index["tensors"].items():
            chunks = []
            for start, size, file, offset in entry["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size([start]), torch.Size([size])))
                self.places[MetadataIndex(name, [start])] = (file, offset)
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads: list[tuple[str, int, int, ReadItem, torch.dtype]] = []
        for item in plan.items:
            name, (skip,), (size,) = item.storage_index.fqn, item.storage_offsets, item.lengths
            if size:
                file, offset = self.places[item.storage_index]
                dtype = getattr(torch, self.index["tensors"][name]["dtype"])
                start = offset + skip * dtype.itemsize
                reads.append((file, start, start + size * dtype.itemsize, item, dtype))
        reads.sort(key=lambda read: read[:2])
        gap_bytes = GAP_BYTES_LOCAL if self.store.is_local else GAP_BYTES
        runs: list[list[tuple[str, int, int, ReadItem, torch.dtype]]] = []
        for read in reads:
            file, start, end, _, _ = read
            if (
                runs
                and runs[-1][0][0] == file
                and start - runs[-1][-1][2] <= gap_bytes
                and end - runs[-1][0][1] <= READ_BYTES
            ):
                runs[-1].append(read)
            else:
                runs.append([read])

        def fetch(run: Sequence[tuple[str, int, int, ReadItem, torch.dtype]]) -> bytearray:
            (file, begin, *_), end = run[0], run[-1][2]
            return bytearray(self.store.read_range(file, begin, end - begin))

        with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
            for first in range(0, len(runs), READS_IN_FLIGHT):  # so many are in memory at a time
                some = runs[first : first + READS_IN_FLIGHT]
                for run, data in zip(some, pool.map(fetch, some), strict=True):
                    for _, start, end, item, dtype in run:
                        count = (end - start) // dtype.itemsize
                        offset = start - run[0][1]
                        values = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(values)
                        planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False
