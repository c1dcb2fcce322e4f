"""Which failures of a rank may pass by themselves, and how they are told.

A machine dies, a connection breaks, a store is away: another attempt goes on from the last
checkpoint. A bug, a wrong config, memory that is too small: another attempt would fail alike, so
the run ends at once with the error's own words.
"""

import traceback

import ray
import torch
from torch import distributed

from framework.run.sharded_state import RanksFailed
from framework.storage import is_transient
from framework.train.rank.watchdog import Hung

# What a collective says when another rank has gone; gloo and NCCL raise plain RuntimeErrors too.
_COLLECTIVE_WORDS = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "CUDA error",  # of the device, not its memory: that is torch.OutOfMemoryError
)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, on some rank; all ranks raise it alike."""

    def __init__(self, words: str, is_retryable: bool) -> None:
        super().__init__(words)
        self.is_retryable = is_retryable


def is_retryable(error: BaseException) -> bool:
    """Whether the same command may succeed when it is tried again."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return is_retryable(error.cause)  # of a task that read data
    if isinstance(error, RanksFailed):  # in a save or a load
        return all(is_retryable(raised) for raised in error.failures.values())
    if isinstance(error, SaveFailed):
        return error.is_retryable
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return False
    if isinstance(error, OSError):
        return is_transient(error)
    if isinstance(error, Hung | distributed.DistError | ray.exceptions.RayError):
        return True
    if "device-side assert" in str(error):  # an index out of range, in somebody's code
        return False
    is_plain = isinstance(error, RuntimeError)
    return is_plain and any(word in str(error) for word in _COLLECTIVE_WORDS)


def words_of(error: BaseException) -> str:
    """An error in one sentence, with the place in the code where it was raised."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, ValueError):
        return str(error.cause)  # without the task's stack
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, ValueError):  # written for the user
        return str(error)
    return f"{type(error).__name__}: {str(error).strip()}{at}"
