"""The end of a session: every observer has its last word, and the cause is not hidden."""

import pytest

from framework.train.observers.observer import Observer, end_all


class Ending(Observer):
    """Notes that it was ended, and raises."""

    def __init__(self, heard: list[str], name: str, raises: Exception | None = None) -> None:
        self.heard, self.name, self.raises = heard, name, raises

    def end(self, error: BaseException | None) -> None:
        self.heard.append(f"{self.name}: {error}")
        if self.raises is not None:
            raise self.raises


def test_one_that_fails_hides_neither_the_others_nor_the_cause() -> None:
    heard: list[str] = []
    observers = [Ending(heard, "profile", OSError("no store")), Ending(heard, "ledger")]
    end_all(observers, ValueError("a user's bug"))  # the caller goes on raising it
    assert heard == ["profile: a user's bug", "ledger: a user's bug"]


def test_without_another_cause_the_first_failure_is_raised() -> None:
    heard: list[str] = []
    observers = [
        Ending(heard, "profile", OSError("no store")),
        Ending(heard, "tracker", RuntimeError("later")),
    ]
    with pytest.raises(OSError, match="no store"):
        end_all(observers, None)
    assert len(heard) == 2
