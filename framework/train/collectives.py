"""Collectives over Python objects, on the default process group."""

from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def all_gather(mine: T, dp_size: int) -> list[T]:
    """What each rank has, by rank."""
    if dp_size == 1:
        return [mine]
    gathered: list[Any] = [None] * dp_size
    distributed.all_gather_object(gathered, mine)
    return gathered
