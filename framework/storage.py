"""A file system by URL: `file://` or a plain path, `s3://`, `gs://`.

All that Longtake keeps (shards, manifests, plans, checkpoints, ledgers) goes through `Store`, so
that a run works alike on a laptop and on object storage. Credentials and endpoints come from the
environment and files that the cloud's own tools read (`AWS_*`, `~/.aws`, …), never from a config;
so does the address of a server that is not Amazon's (`AWS_ENDPOINT_URL`).

Invariant: `write` is atomic. A reader sees the whole object or none. No name leads out of a store;
only `Store.at` follows URLs that data holds, and only where the store was made for that.
"""

import errno
import functools
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pyarrow import Buffer, NativeFile, fs
from pyarrow.fs import FileInfo

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long an action is tried again after a transient error, and how long between two tries.

    What fails later than `deadline_s` is not tried again. A try that hangs takes long by itself:
    Arrow has time-outs and retries of its own. A pause is twice as long as the one before it, up to
    `max_delay_s`.
    """

    deadline_s: float
    first_delay_s: float = 0.5
    max_delay_s: float = 8.0


# Chosen by hand. A command tries for as long as a person waits: long enough for a proxy's restart
# or a SlowDown. In training, a store that is away for a minute or two costs less than a restart.
COMMAND = RetryPolicy(deadline_s=20.0)
TRAINING = RetryPolicy(deadline_s=240.0)

MAX_OPEN_FILES = 64  # readers of remote objects that a process keeps
MAX_FOLDERS = 100_000  # that are listed below one; links may make any number of few; chosen by hand
_open_files: dict[tuple[str, str], NativeFile] = {}
_SCHEMES = ("file", "s3", "gs")

_PERMANENT_TYPES = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
# Arrow gives most errors of an object store, and some of a file system, as text alone.
_DENIED_WORDS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "credentials",
)
_PERMANENT_WORDS = (*_DENIED_WORDS, "NO_SUCH_BUCKET", "is a directory", "not a directory")
_UNCOMMITTED = re.compile(r"\.[0-9a-f]{8}\.tmp$")  # what a killed `write` leaves on local disk


def normalize_url(url: str | Path) -> str:
    """Make a plain path an absolute `file://` URL and drop a trailing slash; check the scheme."""
    text = os.fspath(url)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if not scheme:
        return "file://" + os.path.abspath(os.path.expanduser(text))
    if scheme not in _SCHEMES:
        raise ValueError(
            f"url={text!r}: scheme {scheme!r} is not supported; use a path or one of "
            + ", ".join(f"{s}://" for s in _SCHEMES)
        )
    place = text.removeprefix(f"{scheme}://")
    if scheme == "file":
        if not place.startswith("/"):
            raise ValueError(f"url={text!r} must be absolute; write file:///path, or a plain path")
        return "file://" + os.path.normpath("/" + place.lstrip("/"))
    if not place.strip("/") or place.startswith("/"):
        raise ValueError(f"url={text!r} names no bucket; write {scheme}://bucket/prefix")
    if "?" in place:
        raise ValueError(
            f"url={text!r} has options; set them in the environment (AWS_ENDPOINT_URL)"
        )
    return text.rstrip("/")


def join_url(url: str | Path, *names: str) -> str:
    """Append path parts to a URL; an absolute URL or path among `names` starts over."""
    joined = normalize_url(url)
    for name in names:
        if "://" in name or name.startswith("/"):
            joined = normalize_url(name)
        elif name.strip("/"):
            joined = joined + ("" if joined.endswith("/") else "/") + name.rstrip("/")
    return joined


def is_transient(error: OSError) -> bool:
    """Whether the same action may succeed later."""
    return not (
        isinstance(error, _PERMANENT_TYPES)
        or error.errno in _PERMANENT_ERRNOS
        or any(word in str(error) for word in _PERMANENT_WORDS)
    )


def with_retries(action: Callable[[], T], retry: RetryPolicy) -> T:
    """Run `action`, again after a transient OSError, with jittered back-off."""
    deadline, delay_s = time.monotonic() + retry.deadline_s, retry.first_delay_s
    while True:
        try:
            return action()
        except OSError as error:
            if not is_transient(error) or time.monotonic() > deadline:
                raise
            time.sleep(delay_s * random.uniform(0.5, 1.5))
            delay_s = min(2 * delay_s, retry.max_delay_s)


class Store:
    """A directory of objects at a URL. Names are relative to it, with `/` between parts.

    Stores made from this one, and its pickled copies, have its retry policy. Two stores are equal
    where URL, policy and `anywhere` are. A name with a part `..` is a ValueError in every method.
    """

    def __init__(
        self, url: str | Path, retry: RetryPolicy = COMMAND, anywhere: bool = False
    ) -> None:
        """`url`: a path, or a `file://`, `s3://` or `gs://` URL; it need not exist yet.

        anywhere: whether `at` follows a URL out of the folder.
        """
        self.url = normalize_url(url)
        self.retry = retry
        self.anywhere = anywhere
        self._fs: fs.FileSystem | None = None
        self._root = ""

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Store) or type(self) is not type(other):
            return NotImplemented
        return self.__getstate__() == other.__getstate__()

    def __hash__(self) -> int:
        return hash((self.url, self.retry, self.anywhere))

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "retry": self.retry, "anywhere": self.anywhere}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Store.__init__(self, **state)

    @property
    def fs(self) -> fs.FileSystem:
        """The pyarrow file system, for Parquet readers and writers; opened at first use."""
        if self._fs is None:  # set last: another thread may look at any moment
            if (
                self.is_local
            ):  # Arrow would read the path as a URI, where a space or a # is an error
                self._root, self._fs = str(self.local_path()), fs.LocalFileSystem()
            else:
                scheme, place = self.url.split("://", 1)
                # One request for a small object, in place of the three of a multipart upload.
                options = "?allow_delayed_open=true" if scheme == "s3" else ""
                uri = f"{scheme}://{quote(place)}{options}"
                opened, self._root = self._do(lambda: fs.FileSystem.from_uri(uri))
                self._fs = opened
        return self._fs

    def _do(self, action: Callable[[], T]) -> T:
        """`with_retries`; where access is denied or there is no bucket, the error says more."""
        try:
            return with_retries(action, self.retry)
        except OSError as error:
            words = str(error)
            if any(word in words for word in _DENIED_WORDS):
                raise PermissionError(
                    f"{self.url}: access denied. Credentials come from AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, ~/.aws or the machine's role, a server other than "
                    f"Amazon's from AWS_ENDPOINT_URL. It said: {words}"
                ) from error
            if "NO_SUCH_BUCKET" in words:
                raise FileNotFoundError(f"{self.url}: there is no such bucket") from error
            raise

    def path(self, name: str = "") -> str:
        """The path of `name` inside `self.fs`; ValueError where it leads out of this store."""
        assert self.fs is not None
        self._check_below(name)
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def child(self, *names: str) -> "Store":
        """The store one or more folders down."""
        return Store(join_url(self.url, *names), self.retry, self.anywhere)

    def with_retry(self, retry: RetryPolicy) -> "Store":
        """The same folder under another policy."""
        return Store(self.url, retry, self.anywhere)

    def at(self, name: str) -> tuple["Store", str]:
        """Store and name of an object that data names: a table's path, a manifest's shard.

        `name` may also be a URL. ValueError where that lies elsewhere and this store was not made
        for `anywhere`, and always where this store is remote and the URL a local file.
        """
        if "://" not in name:
            self._check_below(name)
            return self, name
        url = normalize_url(name)
        if not url.startswith(f"{self.url.rstrip('/')}/") or _leads_up(url):
            if url.startswith("file://") and not self.is_local:
                raise ValueError(f"{name!r} is a local file; data in {self.url} may not name one")
            if not self.anywhere:
                raise ValueError(
                    f"{name!r} lies outside {self.url}; data.index.anywhere=true allows that"
                )
        folder, _, inside = url.rpartition("/")
        return _store(folder, self.retry), inside

    def _check_below(self, name: str) -> None:
        if _leads_up(name):
            raise ValueError(f"{name!r} leads out of {self.url}")

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine's own file system."""
        return self.url.startswith("file://")

    def local_path(self) -> Path:
        """Its path on this machine; ValueError where it is remote."""
        if not self.is_local:
            raise ValueError(f"{self.url} is not on this machine")
        return Path(self.url.removeprefix("file://"))

    def exists(self, name: str = "") -> bool:
        """Whether an object or a folder has this name. On S3 an emptied folder may linger."""
        info = self._do(lambda: self.fs.get_file_info(self.path(name)))
        return info.type != fs.FileType.NotFound

    def size(self, name: str) -> int:
        """Size in bytes of an object; FileNotFoundError where there is none."""
        return self._file_info(name).size

    def version(self, name: str) -> str:
        """Another text once an object has been replaced: its ETag, else its size and time."""
        info = self._file_info(name)
        if not self.is_local:
            with self.open_input(name) as file:
                if tag := file.metadata().get("ETag"):
                    return tag.decode()
        return f"{info.size} {info.mtime_ns}"

    def _file_info(self, name: str) -> FileInfo:
        path = self.path(name)
        try:
            info = self._do(lambda: self.fs.get_file_info(path))
        except ValueError as error:  # a zero byte in the name: no file has one
            raise FileNotFoundError(join_url(self.url, name)) from error
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise FileNotFoundError(join_url(self.url, name)) from error
        if info.type != fs.FileType.File:
            raise FileNotFoundError(join_url(self.url, name))
        return info

    def list(self, name: str = "") -> list[str]:
        """Names of all objects below folder `name`, relative to this store, sorted; [] if none.

        Links to folders are followed, but not to one that holds the link. ValueError where that
        makes more than MAX_FOLDERS of them.
        """
        if self.is_local:
            folder, start = self.path(name), len(self.path().rstrip("/")) + 1
            found = self._do(lambda: [path[start:] for path in _walk(folder)])
            return sorted(file for file in found if not _UNCOMMITTED.search(file))
        selector = fs.FileSelector(self.path(name), recursive=True, allow_not_found=True)
        infos = self._do(lambda: self.fs.get_file_info(selector))
        prefix = self.path().rstrip("/") + "/"
        files = (info.path.removeprefix(prefix) for info in infos if info.type == fs.FileType.File)
        return sorted(file for file in files if not _UNCOMMITTED.search(file))

    def read(self, name: str) -> bytes:
        """All bytes of an object."""

        def action() -> bytes:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return stream.read()

        return self._do(action)

    def read_buffer(self, name: str) -> Buffer:
        """All bytes of an object, in Arrow's own memory: for whatever reads in Arrow's threads.

        Such a thread may be the last to let go of them. Were they Python's, and Python at its end,
        the process would abort ("terminate called without an active exception"; pyarrow 25).
        """

        def action() -> Buffer:
            with self.fs.open_input_file(self.path(name)) as file:  # a stream's would be Python's
                return file.read_buffer()

        return self._do(action)

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` bytes from `offset`; EOFError where the object ends before."""

        def action() -> bytes:
            try:
                file = self._kept_open(name)
                if offset + size_bytes > (end := file.size()):
                    raise EOFError(
                        f"{join_url(self.url, name)}: wanted {size_bytes} bytes at {offset}, "
                        f"the object ends at {end}"
                    )
                return file.read_at(size_bytes, offset)
            except (OSError, EOFError):
                _open_files.pop((self.url, name), None)  # its connection, or its size, is old
                raise

        data = self._do(action)
        assert len(data) == size_bytes, (self.url, name, offset, size_bytes, len(data))
        return data

    def _kept_open(self, name: str) -> NativeFile:
        """A reader that is kept for the next range: opening asks an object store for the size."""
        if self.is_local:
            return self.fs.open_input_file(self.path(name))
        key = (self.url, name)
        file = _open_files.pop(key, None) or self.fs.open_input_file(self.path(name))
        _open_files[key] = file  # the newest is last
        while len(_open_files) > MAX_OPEN_FILES:
            _open_files.pop(next(iter(_open_files)), None)
        return file

    def open_input(self, name: str) -> NativeFile:
        """A seekable reader."""
        return self._do(lambda: self.fs.open_input_file(self.path(name)))

    def open_output(self, name: str) -> NativeFile:
        """A writer; the object is whole only after close(). For large files, else use `write`."""
        self._make_parent(name)
        return self._do(lambda: self.fs.open_output_stream(self.path(name)))

    def write(self, name: str, data: bytes | memoryview | Buffer) -> None:
        """Write an object in one atomic step, over any older one. Buffers are not copied."""

        def action() -> None:
            self._make_parent(name)
            # A put to an object store is atomic; a file needs a rename.
            final = self.path(name)
            path = f"{final}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else final
            try:
                with self.fs.open_output_stream(path) as stream:
                    stream.write(data)
                if self.is_local:
                    os.replace(path, final)
            except BaseException:
                if self.is_local and os.path.exists(path):
                    os.unlink(path)
                raise

        self._do(action)

    def delete(self, name: str) -> None:
        """Delete an object; silent where there is none."""
        try:
            self._do(lambda: self.fs.delete_file(self.path(name)))
        except FileNotFoundError:
            return

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all below it; silent where there is none."""
        try:
            self._do(lambda: self.fs.delete_dir(self.path(name)))
        except FileNotFoundError:
            return

    def _make_parent(self, name: str) -> None:
        if self.is_local:
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)


def _leads_up(name: str) -> bool:
    return ".." in name.split("/")


def _walk(root: str) -> Iterator[str]:
    """Paths of all files below a folder; nothing where there is none."""
    waiting: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    num_folders = 0
    while waiting:
        folder, above = waiting.pop()
        if (real := os.path.realpath(folder)) in above:
            continue
        if (num_folders := num_folders + 1) > MAX_FOLDERS:
            raise ValueError(
                f"{root} has more than {MAX_FOLDERS:,} folders below it, or links make it so; "
                "name a folder of fewer"
            )
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if os.path.isdir(entry):
                        waiting.append((entry.path, above | {real}))
                    elif os.path.isfile(entry):
                        yield entry.path
        except FileNotFoundError:  # gone by now
            continue


@functools.lru_cache(maxsize=64)
def _store(url: str, retry: RetryPolicy) -> Store:
    return Store(url, retry)
