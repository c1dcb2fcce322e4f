"""Ranks that save and load together, and hear of each other's failures."""

import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from framework.run.sharded_state import INDEX, Piece, RanksFailed, load_state, save_state
from framework.storage import Store

SHAPES = {"w": [10, 10]}


def tensors() -> dict[str, Tensor]:
    return {
        "w": torch.arange(100.0),
        "tiny": torch.tensor([7.0]),
        "large": torch.arange(1000),
        "small": torch.arange(5, dtype=torch.bfloat16),
        "smaller": torch.tensor([True, False]),
        "none": torch.zeros(0),
    }


def cut(values: Tensor, cuts: list[int], rank: int) -> Piece:
    """Values [cuts[rank], cuts[rank + 1]) of a tensor."""
    start, stop = cuts[rank], cuts[rank + 1]
    return Piece(values[start:stop], start, values.numel())


def state_of(whole: dict[str, Tensor], rank: int, cuts: list[int]) -> dict[str, Tensor | Piece]:
    pieces = {"w": cut(whole["w"], cuts, rank), "tiny": cut(whole["tiny"], [0, 1, 1, 1], rank)}
    return whole | pieces


class Unpicklable(OSError):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class Failing(Store):
    """A store with an object that can neither be written nor be read."""

    def __init__(self, store: Store, part_of_name: str, error: Exception) -> None:
        super().__init__(store.url)
        self.part_of_name, self.error = part_of_name, error

    def write(self, name: str, data: Any) -> None:
        if self.part_of_name in name:
            raise self.error
        super().write(name, data)

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        if self.part_of_name in name:
            raise self.error
        return super().read_range(name, offset, size_bytes)


def told(action: Callable[[], None]) -> dict[str, str]:
    """What ranks raised together."""
    try:
        action()
    except RanksFailed as error:
        return {str(rank): f"{type(e).__name__}: {e}" for rank, e in error.failures.items()}
    return {}


def job_save(rank: int, folder: Path) -> dict[str, Any]:
    whole, store = tensors(), Store(folder)
    state, failed = state_of(whole, rank, [0, 33, 100]), {}

    def failing(part_of_name: str, error: Exception) -> dict[str, str]:
        at = Failing(store.child("failed"), part_of_name, error)
        return told(lambda: save_state(state, SHAPES, at))

    failed["rank 1"] = failing("rank-00001", OSError("SLOW_DOWN"))
    failed["is there an index"] = store.exists(f"failed/{INDEX}")
    failed["index"] = failing("index", OSError("away"))
    failed["unpicklable"] = failing("rank-00000", Unpicklable(1, 2))
    save_state(state, SHAPES, store.child("saved"))
    return failed


def job_load(rank: int, folder: Path) -> dict[str, Any]:
    """On another number of ranks."""
    found = {name: torch.zeros_like(values) for name, values in tensors().items()}
    state = state_of(found, rank, [0, 30, 34, 100])
    store = Store(folder / "saved")
    load_state(state, SHAPES, store)
    for name, values in tensors().items():
        piece = state[name]
        if isinstance(piece, Piece):
            values = values[piece.start : piece.start + piece.values.numel()]
            piece = piece.values
        assert torch.equal(piece, values), name
    broken = Failing(store, "rank" if rank == 2 else "nothing", EOFError("too short"))
    gone = Store(folder / "gone") if rank == 1 else store
    failed = {"rank 2": told(lambda: load_state(state, SHAPES, broken))}
    failed["no index"] = told(lambda: load_state(state, SHAPES, gone))
    with pytest.raises(ValueError, match="tensor w has shape"):
        load_state(state, {"w": [100]}, store)
    return failed


def rank_main(job: str, rank: int, world: int, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/{job}", rank=rank, world_size=world)
    result = globals()[job](rank, folder)
    (folder / f"{job}-{rank}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()


def run(job: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """What the job gives, by rank."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_main, args=(job, r, world, folder)) for r in range(world)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(timeout=300)
        assert [rank.exitcode for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in range(world)]


def test_ranks_save_load_and_fail_together(tmp_path: Path) -> None:
    saved = run("job_save", 2, tmp_path)
    assert saved[0] == saved[1] == {
        "rank 1": {"1": "OSError: SLOW_DOWN"},
        "is there an index": False,
        "index": {"0": "OSError: away"},
        "unpicklable": {"0": "RuntimeError: Unpicklable: 1 and 2"},
    }  # fmt: skip

    index = json.loads(Store(tmp_path).read(f"saved/{INDEX}"))
    chunks = {n: [(c[2][-9:-4], *c[:2]) for c in t["chunks"]] for n, t in index["tensors"].items()}
    # What all ranks hold is dealt: 8,000 bytes to one, all that is small to the other.
    assert chunks == {
        "w": [("0-000", 0, 33), ("1-000", 33, 67)],
        "tiny": [("0-000", 0, 1)],
        "large": [("0-000", 0, 1000)],
        "small": [("1-000", 0, 5)],
        "smaller": [("1-000", 0, 2)],
        "none": [],
    }
    loaded = run("job_load", 3, tmp_path)
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0]["rank 2"] == {"2": "EOFError: too short"}
    assert list(loaded[0]["no index"]) == ["1"]
    assert loaded[0]["no index"]["1"].startswith("FileNotFoundError")


def test_a_hole_or_an_overlap_is_no_checkpoint(tmp_path: Path) -> None:
    for start in (1, 0):
        state = {"w": Piece(torch.arange(9.0), start, 10)}
        with pytest.raises(AssertionError, match="w"):
            save_state(state, {}, Store(tmp_path))
    assert not Store(tmp_path).exists(INDEX)


def test_another_size_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save_state({"buffers.mask": torch.arange(3)}, {}, store)
    with pytest.raises(ValueError, match=r"buffers\.mask has 3 values there, 4 are asked"):
        load_state({"buffers.mask": torch.arange(4)}, {}, store)


def test_what_ranks_raised_travels(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(RanksFailed({3: OSError(28, "No space left")})))
    assert error.failures[3].errno == 28
    assert str(error) == "rank 3: OSError: [Errno 28] No space left"
