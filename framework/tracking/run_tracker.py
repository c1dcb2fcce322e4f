"""The tracker of a run: the same MLflow run in every process and at every start."""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from framework.private_files import user_cache
from framework.storage import Store
from framework.tracking.tracker import Tracker, TrackerConfig

_NAME = "tracking.json"
TRAINING_ROLES = ("driver", "rank-0")  # the others add to a run that may be finished


def open_tracker(tracking: TrackerConfig, run: Store, run_name: str, role: str) -> Tracker:
    """The tracker of the run whose folder is `run`; opened first by the driver.

    `role` ("driver", "rank-0") keeps the journals of processes apart.
    """
    known = json.loads(run.read(_NAME)) if run.exists(_NAME) else {"run_key": uuid.uuid4().hex}
    tracker = tracking.build(
        run_name=run_name,
        journal_dir=_journal_dir(run, role),
        run_id=known.get("run_id"),
        run_key=known["run_key"],
        reopen=role in TRAINING_ROLES,
    )
    if known.get("run_id") != tracker.run_id or not run.exists(_NAME):
        run.write(_NAME, json.dumps({**known, "run_id": tracker.run_id}).encode())
    return tracker


def log_files(tracker: Tracker, store: Store, names: Iterable[str], folder: str) -> None:
    """Keep objects of a store, wherever it lies, as artifacts below `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            path = Path(scratch) / name
            path.write_bytes(store.read(name))  # the tracker takes a local file
            tracker.log_artifact(path, folder)


def _journal_dir(run: Store, role: str) -> Path:
    """In the run's folder where that is on this machine, else in the user's cache."""
    if run.is_local:
        return run.local_path() / "journal" / role
    folder = hashlib.blake2b(run.url.encode(), digest_size=8).hexdigest()
    return user_cache(folder, role)
