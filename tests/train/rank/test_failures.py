"""What is tried again and what is not, and for how long."""

import errno
import pickle

import pytest
import ray
import torch
from torch import distributed

from framework.run.fence import Superseded, begin_attempt, read_attempt
from framework.run.sharded_state import RanksFailed
from framework.storage import Store
from framework.train.driver.attempts import Patience
from framework.train.guard import Diverged
from framework.train.rank.failures import SaveFailed, is_retryable, words_of

PASSING = [
    RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1234"),
    RuntimeError("NCCL communicator was aborted on rank 3"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    distributed.DistNetworkError("timeout"),
    ray.exceptions.ObjectLostError("aa", None, ""),
    OSError("AWS Error NETWORK_CONNECTION during HeadObject operation"),
    TimeoutError("no answer"),
    SaveFailed("rank 0: OSError: SLOW_DOWN", is_retryable=True),
    RanksFailed({1: OSError("SLOW_DOWN")}),
]
FINAL = [
    IndexError("list index out of range"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("lr=0"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError("access denied"),
    Diverged("nan"),
    Superseded("by attempt 3"),
    SaveFailed("rank 0: OSError: [Errno 28] No space left on device", is_retryable=False),
    RanksFailed({1: OSError(errno.ENOSPC, "No space left")}),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_is_retryable_is_tried_again(error) -> None:
    assert is_retryable(error)


@pytest.mark.parametrize("error", FINAL, ids=str)
def test_what_will_not_is_final(error) -> None:
    assert not is_retryable(error)


def test_the_cause_of_a_task_that_failed_decides() -> None:
    cause = ValueError("a bug in a codec")
    error = ray.exceptions.RayTaskError("map", "Traceback …", cause)
    assert not is_retryable(error)
    assert not is_retryable(pickle.loads(pickle.dumps(error)))


def test_the_words_name_the_place() -> None:
    with pytest.raises(IndexError) as raised:
        _ = [][3]
    words = words_of(raised.value)
    assert words.startswith("IndexError: list index out of range (")
    assert "test_failures.py:" in words
    in_a_task = ray.exceptions.RayTaskError("try", "Traceback …", ValueError("too large"))
    assert words_of(in_a_task.as_instanceof_cause()) == "too large"


def test_patience_is_for_failures_without_progress() -> None:
    patience = Patience(2)
    for committed in (0, 10, 20, 30, 40):  # each got further than the last
        assert not patience.is_over(committed)
    assert patience.count == 1
    assert not patience.is_over(40)
    assert patience.is_over(40)
    assert Patience(0).is_over(0)


def test_only_the_newest_attempt_may_write(tmp_path) -> None:
    run = Store(tmp_path)
    assert read_attempt(run) == {}
    first = begin_attempt(run, 2)
    first.check()
    second = begin_attempt(run, 1)
    second.check()
    assert (first.number, second.number) == (1, 2)
    assert read_attempt(run)["num_workers"] == 1
    with pytest.raises(Superseded, match=r"attempt 1 .* was superseded by attempt 2"):
        first.check()
