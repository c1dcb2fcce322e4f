"""Which folder a run lives in, and whether a command may go on with the run that is there.

A run is its name below its root. The same name with an equal config resumes; with another config it
is refused, naming the keys that differ; `run.fresh=true` starts over beside it, in a folder of the
next generation (`name~2`, `name~3`, …), which is the one that later commands find.
"""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import framework
from framework.mapping import differences, free, is_below
from framework.run.format import FORMAT, check_format
from framework.storage import Store


@dataclass(frozen=True)
class RunSection:
    """A run's identity: `name` below `root` (any URL) is where it lives and resumes from."""

    name: str
    root: str = free("runs")
    seed: int = 0
    fresh: bool = free(False)  # start over beside an older run of this name

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", self.name):
            raise ValueError(
                f"name={self.name!r}: letters, digits and . _ = , + - only, no folder in it"
            )


@dataclass(frozen=True)
class Identity:
    """A run's config as it is kept and compared: flat, kinds by name, passwords masked.

    `free`: keys, and folders of keys, that may differ between two starts of one run.
    """

    values: Mapping[str, Any]
    free: Sequence[str] = ()

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """What keeps a run of the config `there` from being this one, a line a key."""
        return differences(there, self.values, self.free)

    def part(self, *groups: str) -> "Identity":
        """The same of some groups alone."""
        values = {key: value for key, value in self.values.items() if is_below(key, groups)}
        return Identity(values, [key for key in self.free if is_below(key, groups)])

    @property
    def packages(self) -> list[str]:
        """Names of a team's own packages, without the folders of their YAML."""
        return [str(text).partition(":")[0] for text in self.values.get("packages", ())]

    def parameters(self) -> dict[str, Any]:
        """For a person who looks for a run: a choice stands under its group, `model: dit_s`."""
        return {key.removeprefix("choices."): value for key, value in self.values.items()}


def generations(run: RunSection) -> list[str]:
    """Folders of this run below its root, oldest first."""
    root = Store(run.root)
    names: list[str] = []
    for number in count(1):
        name = run.name if number == 1 else f"{run.name}~{number}"
        if not root.exists(f"{name}/config.json"):
            return names
        names.append(name)
    raise AssertionError("unreachable")


def run_store(run: RunSection) -> Store:
    """The folder of the newest generation of this run; it need not exist yet."""
    names = generations(run)
    store = Store(run.root).child(names[-1] if names else run.name)
    if names:
        read_config(store)
    return store


def claim(run: RunSection, identity: Identity) -> Store:
    """The folder to train in; writes `config.json` there at a first start.

    ValueError where a run of this name has another config.
    """
    names = generations(run)
    if run.fresh and names:
        name = f"{run.name}~{len(names) + 1}"
    else:
        name = names[-1] if names else run.name
    store = Store(run.root).child(name)
    if name not in names:
        content = {"format": FORMAT, "config": dict(identity.values)}
        store.write("config.json", json.dumps(content, indent=1, sort_keys=True).encode())
        return store
    if differing := identity.differences(read_config(store)):
        raise ValueError(
            f"run.name={run.name!r} exists in {store.url} with another config:\n  "
            + "\n  ".join(differing)
            + "\nset these back to resume it, choose another run.name, or start over beside it "
            "with run.fresh=true"
        )
    return store


def read_config(run: Store) -> dict[str, Any]:
    """The flat config that a run was begun with; ValueError where it is of another format."""
    content = json.loads(run.read("config.json"))
    check_format(content.get("format"), run.url)
    return dict(content["config"])


@contextlib.contextmanager
def name_freed_if_refused(run: Store) -> Iterator[None]:
    """A run whose data cannot be planned, by a ValueError, has not begun: its name is free again.

    What was there before (a plan, a checkpoint) keeps the name.
    """
    try:
        yield
    except ValueError:
        # The index may have put its manifest there, and the log is to be read.
        known = ("config.json", "manifest.json", "manifest/", "logs/")
        if all(name.startswith(known) for name in run.list()):
            run.delete("manifest.json")
            run.delete("config.json")
        raise


def code_version() -> str:
    """The package version, and the git commit where the code is a checkout."""
    folder = Path(framework.__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return framework.__version__
    return f"{framework.__version__}+{commit}"
