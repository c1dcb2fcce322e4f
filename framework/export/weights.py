"""A checkpoint's tensors to safetensors files, one shard in memory at a time.

A file is as huggingface/safetensors defines it: eight bytes of the header's length, the header in
JSON, the tensors. It is filled in place from the checkpoint, so that a model of any size takes the
memory of one shard, and some 200 MB for what is read at once. When a folder counts, says
`framework.export.folder`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.run.checkpoint import Checkpoint
from framework.run.sharded_state import load_state, persistent_buffers, shapes_of
from framework.storage import Store
from model_zoo.convert import WEIGHTS
from model_zoo.folder import FolderFormat, Network

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class _Source:
    """A tensor of the checkpoint, and of the model."""

    key: str  # ema.blocks.0…
    name: str  # blocks.0…
    tensor: Tensor  # on the meta device

    @property
    def size_bytes(self) -> int:
        return self.tensor.nbytes


def write_weights(
    checkpoint: Checkpoint,
    network: Network,
    layout: FolderFormat,
    which: str,
    to: Store,
    max_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Write the files, and their index where there are several.

    which: "ema" or "weights". max_bytes: of one file's tensors, but a file holds one tensor at
    least. ValueError where network and checkpoint differ in a name or a shape.
    """
    with torch.device("meta"):
        model = network.build()
    sources = [_Source(f"{which}.{n}", n, p.detach()) for n, p in model.named_parameters()]
    sources += [
        _Source(key, key.removeprefix("buffers."), b)
        for key, b in persistent_buffers(model).items()
    ]
    shards, shapes = _split(sources, max_bytes), shapes_of(model)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _file_name(number, len(shards))
        to.write(file, memoryview(_filled(shard, layout, checkpoint, shapes)))
        weight_map |= {name: file for s in shard for name in layout.pieces(s.name, s.tensor)}
        say(f"{file}: {sum(s.size_bytes for s in shard) / 1e6:,.1f} MB")
    if len(shards) > 1:
        total = sum(source.size_bytes for source in sources)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        to.write(f"{WEIGHTS}.index.json", (json.dumps(index, indent=2) + "\n").encode())


def _file_name(number: int, count: int) -> str:
    stem, dot, ending = WEIGHTS.rpartition(".")
    return WEIGHTS if count == 1 else f"{stem}-{number:05d}-of-{count:05d}{dot}{ending}"


def _split(sources: list[_Source], max_bytes: int) -> list[list[_Source]]:
    """In the model's order, as many together as fit."""
    shards: list[list[_Source]] = []
    room = 0
    for source in sources:
        if not shards or source.size_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(source)
        room -= source.size_bytes
    return shards


def _filled(
    shard: list[_Source],
    layout: FolderFormat,
    checkpoint: Checkpoint,
    shapes: dict[str, list[int]],
) -> bytearray:
    """A whole safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in shard:
        for name, piece in layout.pieces(source.name, source.tensor).items():
            begin, end = end, end + piece.nbytes
            header[name] = {
                "dtype": _DTYPES[piece.dtype],
                "shape": list(piece.shape),
                "data_offsets": [begin, end],
            }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the tensors begin at a multiple of 8
    at = 8 + len(head)
    file = bytearray(at + end)
    file[:at] = len(head).to_bytes(8, "little") + head

    places: list[Tensor] = []  # 1-D, in the file
    for source in shard:
        dtype, count = source.tensor.dtype, source.tensor.numel()
        places.append(torch.frombuffer(file, dtype=dtype, count=count, offset=at))
        at += source.size_bytes
    flat = {source.key: place for source, place in zip(shard, places, strict=True)}
    load_state(flat, shapes, checkpoint.store, alone=True)
    for source, place in zip(shard, places, strict=True):
        # The pieces of a tensor lie where it lay, one after another.
        pieces = layout.pieces(source.name, place.view(source.tensor.shape)).values()
        place.copy_(torch.cat([piece.flatten() for piece in pieces]))
    return file
