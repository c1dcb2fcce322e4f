"""Checkpoints: what lies where, when it counts, and which are kept.

    checkpoints/step-00000100/state/…      tensors and index, see `framework.run.sharded_state`
                              meta.json    step, plan digest, config, … of the caller
                              COMMITTED    name, size and checksum of every file above

Everything goes through `Store`: an object is written whole or not at all, and retried. Barriers
between ranks are the caller's.

Invariant: a reader trusts only a folder with a marker whose files all are there in full size.
"""

import contextlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from framework.run.format import FORMAT, check_format
from framework.run.sharded_state import INDEX, checksum, load_state, persistent_buffers, shapes_of
from framework.storage import Store

log = logging.getLogger(__name__)

MARKER = "COMMITTED"
META = "meta.json"
REFUSED = "REFUSED"
_STEP = re.compile(r"step-([0-9]{8,18})/")  # as `_name` gives it; other folders are not ours
REQUESTS = 4  # in flight; each may hold a file of `sharded_state.PART_BYTES` in memory


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `meta` is what its writer gave to `commit`, with the step."""

    step: int
    store: Store
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, one folder a step. One process writes, rank 0; any may read."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def folder(self, step: int) -> Store:
        """Where the checkpoint of `step` lies, or will."""
        return self.store.child(_name(step))

    def begin(self, step: int) -> Store:
        """An empty folder for the checkpoint of `step`; what an earlier attempt left is deleted."""
        self._delete(step)
        return self.folder(step)

    def commit(self, step: int, meta: Mapping[str, Any]) -> Checkpoint:
        """Make the checkpoint count, after every rank has written; `meta` is plain JSON.

        OSError where a file of the index is not there in full.
        """
        folder = self.folder(step)
        meta = {**meta, "step": step, "format": FORMAT}
        folder.write(META, json.dumps(meta, indent=1).encode())
        files = dict(json.loads(folder.read(INDEX))["files"])
        for name in folder.list():
            if name not in files and name != MARKER and not name.endswith(".tmp"):
                data = folder.read(name)
                files[name] = [len(data), checksum(data)]
        problem = _find_problem(folder, files, None)
        if problem:
            raise OSError(f"checkpoint {folder.url} cannot be committed: {problem}")
        folder.write(MARKER, json.dumps({"files": files}).encode())
        return Checkpoint(step, folder, meta)

    def committed_steps(self) -> list[int]:
        """Steps of all checkpoints with a marker, whole or not, in ascending order."""
        found = ((name, _STEP.match(name)) for name in self.store.list())
        return sorted(int(m[1]) for name, m in found if m and name == f"{m[0]}{MARKER}")

    def get(self, step: int, share: tuple[int, int] | None = None) -> Checkpoint:
        """The checkpoint of `step`; ValueError, saying why, where it is not committed or not whole.

        `share` (r, W) looks at every W-th file only, from the r-th on, and reads it, to find one
        that was altered in place; (0, 1) reads all. None looks at the sizes of all.
        """
        return _open(self.folder(step), share)

    def refuse(self, step: int, why: str) -> None:
        """Let the checkpoint of `step` count no more; until the next its files stay, with `why`."""
        folder = self.folder(step)
        folder.write(REFUSED, why.encode())
        folder.delete(MARKER)

    def latest(self, share: tuple[int, int] | None = None) -> Checkpoint | None:
        """The newest whole checkpoint; a torn or altered one is skipped with a warning."""
        for step in reversed(self.committed_steps()):
            try:
                return self.get(step, share)
            except ValueError as error:
                log.warning("skipping a checkpoint: %s", error)
        return None

    def retain(self, keep_last: int, milestones_every: int = 0) -> None:
        """Delete all but the newest `keep_last` whole checkpoints and the milestones.

        `milestones_every`: steps that it divides are kept for ever; 0 for none. Of what was never
        committed, or refused, all that is older than the newest goes too.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1")
        kept, committed = 0, self.committed_steps()
        for step in sorted(self._begun_steps() - set(committed)):
            if committed and step < committed[-1]:
                self._delete(step)
        for step in reversed(committed):
            if kept < keep_last:
                with contextlib.suppress(ValueError):  # what is not whole does not count as kept
                    self.get(step)
                    kept += 1
            elif not (milestones_every and step % milestones_every == 0):
                self._delete(step)

    def _begun_steps(self) -> set[int]:
        return {int(m[1]) for name in self.store.list() if (m := _STEP.match(name))}

    def _delete(self, step: int) -> None:
        # The marker goes first: a half-deleted checkpoint must not count.
        self.store.delete(f"{_name(step)}/{MARKER}")
        self.store.delete_folder(_name(step))


def find_checkpoint(store: Store, which: str | int) -> Checkpoint:
    """The checkpoint that a user named: "latest", a step, or the URL of a checkpoint's folder.

    `store`: the run's checkpoints. ValueError, saying why, where there is no such whole checkpoint.
    """
    checkpoints = Checkpoints(store)
    if str(which) == "latest":
        latest = checkpoints.latest()
        if latest is None:
            raise ValueError(f"there is no committed checkpoint in {store.url}; train first")
        return latest
    if str(which).isdigit():
        if int(which) not in (steps := checkpoints.committed_steps()):
            raise ValueError(f"checkpoint={which} is not in {store.url}; there are {steps}")
        return checkpoints.get(int(which))
    return _open(Store(str(which)), None)


def load_weights(checkpoint: Checkpoint, model: nn.Module, which: str = "ema") -> None:
    """Load "ema" or "weights" into a plain model in place; no process group, no other rank.

    ValueError where model and checkpoint differ in a name or a shape, or a file was altered.
    """
    if which not in ("ema", "weights"):
        raise ValueError(f"weights={which!r} must be ema or weights")
    check_weights(checkpoint, which)
    targets = {f"{which}.{name}": p.detach() for name, p in model.named_parameters()}
    targets |= persistent_buffers(model)
    flat = {
        name: torch.empty(t.numel(), dtype=torch.float32 if name.startswith(which) else t.dtype)
        for name, t in targets.items()
    }
    load_state(flat, shapes_of(model), checkpoint.store, alone=True)
    for name, target in targets.items():
        target.copy_(flat[name].view_as(target))


def check_weights(checkpoint: Checkpoint, which: str) -> None:
    """Read the files that hold "ema" or "weights"; ValueError where one is not as it was written.

    They lie apart from Adam's moments, but for one file of each rank, so that it is not all of the
    checkpoint.
    """
    folder = checkpoint.store
    files = json.loads(folder.read(MARKER))["files"]
    tensors = json.loads(folder.read(INDEX))["tensors"]
    # The weights stand for an average that there is not.
    wanted = next(w for w in (which, "weights") if any(n.startswith(f"{w}.") for n in tensors))
    held = {
        file
        for name, tensor in tensors.items()
        if name.startswith((f"{wanted}.", "buffers."))
        for _, _, file, _ in tensor["chunks"]
    }
    problem = _find_problem(folder, {name: files[name] for name in (INDEX, *held)}, (0, 1))
    if problem:
        raise ValueError(
            f"{folder.url} is not whole: {problem}; name the one before by checkpoint=STEP"
        )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _open(folder: Store, share: tuple[int, int] | None) -> Checkpoint:
    try:
        files = json.loads(folder.read(MARKER))["files"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(f"{folder.url} is not a committed checkpoint") from error
    problem = _find_problem(folder, files, share)
    if problem:
        raise ValueError(f"{folder.url} is not whole: {problem}")
    meta = json.loads(folder.read(META))
    check_format(meta.get("format"), folder.url)
    return Checkpoint(meta["step"], folder, meta)


def _find_problem(
    folder: Store, files: Mapping[str, Sequence[Any]], share: tuple[int, int] | None
) -> str | None:
    """The first file that is not there or not in full; or, of the share, not as written."""
    first, stride = share or (0, 1)
    looked_at = list(files.items())[first::stride]

    def look(file: tuple[str, Sequence[Any]]) -> str | None:
        name, (size_bytes, digest) = file
        try:
            found = folder.size(name)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size_bytes:
            return f"{name} has {found} bytes, {size_bytes} were written"
        if share is not None and checksum(folder.read(name)) != digest:
            return f"{name} was altered (its checksum differs)"
        return None

    with ThreadPoolExecutor(REQUESTS) as pool:  # a request takes tens of milliseconds
        return next((problem for problem in pool.map(look, looked_at) if problem), None)
