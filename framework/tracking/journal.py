"""A local append-only journal: what a process has to say outlives it, also after kill -9.

It knows nothing of who reads it; `framework.tracking.mlflow_tracker` sends it to MLflow. A line is
in the kernel's hands when `append` returns; a power cut may cost the last ones.

A run's folder may come from a stranger. So a journal in which anything is a symbolic link is
refused, and of files that its lines name only those are sent that lie where `stage` puts them.
"""

import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COMPACT_BYTES = 8 << 20  # chosen by hand: one that is sent and longer than this starts over
RUN_KEY = r"[\w./:~+=,@-]+"  # what a run's key may be; it goes into a query to MLflow
_STAGED = re.compile(r"artifacts/[0-9a-f]{12}/[^/\0]+")


class Foreign(ValueError):
    """A line of a journal names a file that the journal does not keep."""


class Journal:
    """An append-only file of JSON lines, and beside it, in `journal.ack`, how much of it is sent.

    The first line, the header, names the run by a key of ours, since MLflow's id may come late.
    """

    NAME = "journal.jsonl"

    def __init__(
        self, folder: Path, key: str | None, run_id: str | None, header: Mapping[str, str]
    ) -> None:
        """Open or start the journal in `folder`; one of another run is set aside under its key.

        ValueError where the folder holds a symbolic link, or a journal of a run without a key.
        """
        self.folder, self.path, self._ack_path = folder, folder / self.NAME, folder / "journal.ack"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link; a journal's folder holds none")
        self.header: dict[str, Any] = {}
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1  # a line torn by a crash was never logged
            os.truncate(self.path, whole)
            self.header = _parse(data[:whole].split(b"\n", 1)[0])
            if self.header and not re.fullmatch(RUN_KEY, str(self.header.get("key") or "")):
                raise ValueError(f"{self.path} is no journal: its first line has no key of a run")
        ack = _parse(self._ack_path.read_bytes()) if self._ack_path.exists() else {}
        if ack.get("key") != self.header.get("key"):
            ack = {}
        asked = self.header.get("run_id")
        # Usually one; another is added where MLflow has lost the last.
        self._run_ids: list[str] = ack.get("run_ids") or ([asked] if asked else [])
        if self.header and not self._is_of(key, run_id):
            aside = re.sub(r"[^\w.~+=,@-]", "_", f"journal-{self.header['key']}.jsonl")
            self.path.rename(folder / aside)
            self.header, ack, self._run_ids = {}, {}, []
        if not self.header:
            new_key = key or uuid.uuid4().hex
            self.header = {"op": "run", "key": new_key, "run_id": run_id, **header}
            self.path.write_bytes(_line(self.header))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as we are
        self.end = self.path.stat().st_size
        self.acked = 0
        offset = ack.get("offset")
        if isinstance(offset, int) and 0 <= offset <= self.end:  # else killed while it started over
            self.acked = offset

    def _is_of(self, key: str | None, run_id: str | None) -> bool:
        if key is not None:
            return key == self.header["key"]
        return run_id is None or not self._run_ids or run_id in self._run_ids

    @property
    def run_id(self) -> str | None:
        """The tracker's id of the run, where it is known."""
        return self._run_ids[-1] if self._run_ids else None

    def stage(self, name: str) -> Path:
        """Make room for a file that the run shall keep: its path from the journal's folder."""
        staged = Path("artifacts", uuid.uuid4().hex[:12], name)
        (self.folder / staged).parent.mkdir(parents=True)
        return staged

    def staged(self, name: object) -> Path | None:
        """The file that `stage` made room for; None where it is gone: an earlier send removed it.

        Foreign where `name` is no such path, or leads through a symbolic link.
        """
        if not isinstance(name, str) or not _STAGED.fullmatch(name) or name.endswith("/.."):
            raise Foreign(f"{name!r} is not a file of {self.folder}/artifacts")
        path = self.folder / name
        if path.resolve() != self.folder.resolve() / name:
            raise Foreign(f"{name!r} leads out of {self.folder}/artifacts by a symbolic link")
        return path if path.is_file() else None

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; it outlives this process. OSError where the disk is full."""
        line = _line(entry)
        if self._file.write(line) != len(line):
            self._file.truncate(self.end)
            raise OSError(f"{self.path}: the disk is full")
        self.end += len(line)

    def read(self, max_lines: int) -> list[tuple[dict[str, Any], int]]:
        """The next lines that are not sent yet, each with the offset of its end."""
        entries: list[tuple[dict[str, Any], int]] = []
        offset, end = self.acked, self.end
        with open(self.path, "rb") as file:
            file.seek(offset)
            while offset < end and len(entries) < max_lines:
                line = file.readline()
                offset += len(line)
                entries.append((_parse(line), offset))
        return entries

    def ack(self, offset: int, run_id: str) -> None:
        """Remember that all before `offset` is sent, and to which run."""
        self.acked = offset
        if run_id != self.run_id:
            self._run_ids.append(run_id)
        if self.acked == self.end > _COMPACT_BYTES:
            _write(self.path, _line(self.header))
            self._file.close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - as above
            self.acked = self.end = self.path.stat().st_size
        ack = {"key": self.header["key"], "offset": self.acked, "run_ids": self._run_ids}
        _write(self._ack_path, _line(ack))


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    """A line as a mapping; empty where a crash of the machine left garbage."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
