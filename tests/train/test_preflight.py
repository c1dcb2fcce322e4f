"""The looks before a run; this file is also the script that a rank of two runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from framework.storage import Store
from framework.tracking.mlflow import MlflowConfig
from framework.tracking.tracker import NoTracker
from framework.train import preflight
from framework.train.preflight import (
    Check,
    check_driver,
    check_storage,
    check_workers,
    refusal,
)

CPU = torch.device("cpu")
ROOM = {"checkpoint_bytes": 1, "streams_mb": 512, "object_store_mb": 1024.0}


def shards(folder: Path) -> tuple[str, str]:
    store = Store(folder / "clips")
    store.write("shard-000000.tar", bytes(1024))
    return store.url, "shard-000000.tar"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_all_is_well(tmp_path: Path) -> None:
    run = Store(tmp_path / "run")
    checks = check_driver(run, *shards(tmp_path), NoTracker(), **ROOM)
    checks += check_workers(run, *shards(tmp_path), CPU)
    assert refusal(checks) is None
    assert [check.name for check in checks if check.is_note] == ["tracking"]
    assert run.list() == []  # nothing is left behind


def test_a_failed_look_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # a folder cannot lie below it, not even for root
    url, _ = shards(tmp_path)
    checks = by_name(
        check_driver(
            Store(tmp_path / "file/run"),
            url,
            "gone.tar",
            NoTracker(),
            **{**ROOM, "streams_mb": 2048},
        )
    )
    assert {name for name, check in checks.items() if check.failed} == {
        "storage",
        "shards",
        "object store",
    }
    assert "make run.root writable" in checks["storage"].cure
    assert "gone.tar" in checks["shards"].detail
    assert "cluster.object_store_mb" in checks["object store"].cure
    why = refusal(list(checks.values()))
    assert why is not None
    assert why.startswith("preflight failed. storage: ")
    assert "cure: " in str(checks["storage"])


def test_a_disk_too_full_for_two_checkpoints_is_found_before_the_first(tmp_path: Path) -> None:
    check = check_storage(Store(tmp_path), checkpoint_bytes=1 << 60)
    assert check.failed
    assert "two checkpoints take" in check.detail
    assert "another run.root" in check.cure


def test_an_absent_mlflow_is_announced_and_no_failure(tmp_path: Path, free_port) -> None:
    config = MlflowConfig(f"http://127.0.0.1:{free_port()}")
    tracker = config.build("run", tmp_path / "journal")
    checks = by_name(check_driver(Store(tmp_path), *shards(tmp_path), tracker, **ROOM))
    tracker.close(None, timeout_s=0)
    assert checks["tracking"].is_note
    assert "MLflow does not answer" in checks["tracking"].detail
    assert str(tmp_path / "journal") in checks["tracking"].detail


def two_ranks(tmp_path: Path, trouble: str) -> dict[str, str]:
    """What rank 0 found; both must have found the same."""
    shards(tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), trouble],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"found-{r}.json").read_text()) for r in range(2))
    first["all-reduce"] = second["all-reduce"] = first.get("all-reduce", "").split(":")[0]
    assert first == second  # each measures its own time
    return first


@pytest.mark.slow
def test_two_ranks_agree_and_reduce(tmp_path: Path) -> None:
    found = two_ranks(tmp_path, "none")
    assert not any(text.startswith("FAIL") for text in found.values())
    assert "(each of 2 ranks)" in found["storage"]
    assert "all-reduce" in found["all-reduce"]
    assert "2 ranks, gloo, 16 MiB" in found["all-reduce"]


@pytest.mark.slow
def test_one_rank_without_storage_stops_both(tmp_path: Path) -> None:
    found = two_ranks(tmp_path, "storage")
    assert found["storage"].startswith("FAIL")
    assert f"on {os.uname().nodename}" in found["storage"]
    assert not found["all-reduce"]  # not tried


@pytest.mark.slow
def test_one_rank_with_other_packages_stops_both(tmp_path: Path) -> None:
    found = two_ranks(tmp_path, "versions")
    assert found["versions"].startswith("FAIL")
    assert "torch is" in found["versions"]
    assert "0.0.1" in found["versions"]


def main(folder: Path, trouble: str) -> None:
    """One rank; rank 1 has the trouble."""
    rank = int(os.environ["RANK"])
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    run, versions = folder / "run", preflight.versions()
    if rank == 1 and trouble == "storage":
        (folder / "file").write_text("")
        run = folder / "file/run"
    if rank == 1 and trouble == "versions":  # there is one installation on this machine
        preflight.versions = lambda packages: {**versions, "torch": "0.0.1"}
    checks = check_workers(Store(run), f"{folder}/clips", "shard-000000.tar", CPU)
    found = {check.name: str(check) for check in checks}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()  # else its threads end with the process, or abort it


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
