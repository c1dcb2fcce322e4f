"""Which folder a run lives in, and whether a command may go on with the run that is there.

A run is its name below its root. The same name with an equal config resumes; with another config it
is refused, naming the keys that differ; `run.fresh=true` starts over beside it, in a folder of the
next generation (`name~2`, `name~3`, …), which is the one that later commands find.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import framework
from framework.storage import Store
from framework.train.config import RunSection

# What may change between two starts of one run: where it computes and who watches, not what it is.
FREE_KEYS = (
    "cluster.", "tracking.", "evaluate.", "sample.", "sampler.", "run.fresh", "run.root",
    "train.log_every", "train.keep_checkpoints", "data.stream.", "data.exclude", "data.encode.",
    "hardware.", "estimate", "export.", "profile", "train.profiler.",
    "train.milestone_every", "train.hang_timeout_s", "train.try_worst_packs",
    "train.max_lost_share",
)  # fmt: skip


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
    return Store(run.root).child(names[-1] if names else run.name)


def claim(run: RunSection, config: dict[str, Any]) -> Store:
    """The folder to train in; writes `config.json` there at a first start.

    `config` is flat. ValueError where a run of this name has another config.
    """
    names = generations(run)
    if run.fresh and names:
        name = f"{run.name}~{len(names) + 1}"
    else:
        name = names[-1] if names else run.name
    store = Store(run.root).child(name)
    if name not in names:
        store.write("config.json", json.dumps(config, indent=1, sort_keys=True).encode())
        return store
    differing = differences(json.loads(store.read("config.json")), config)
    if differing:
        raise ValueError(
            f"run.name={run.name!r} exists in {store.url} with another config:\n  "
            + "\n  ".join(differing)
            + "\nset these back to resume it, choose another run.name, or start over beside it "
            "with run.fresh=true"
        )
    return store


@contextlib.contextmanager
def giving_back(run: Store) -> Iterator[None]:
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


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each key that differs and matters."""
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    ]


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
