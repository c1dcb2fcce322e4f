"""Where the words of a process go: all of them into a file of the run, ours to the terminal too.

Libraries write to the file descriptors 1 and 2, some of them from C; so these are what is caught.
The files lie in the run's folder, `logs/NAME.log`; where that is an object store, they are kept in
the user's cache and copied there by `save`.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, cast

from framework.private_files import no_link, user_cache
from framework.storage import Store


class RunLog:
    """One process's log: a file that grows, and its copy in the run's folder."""

    def __init__(self, run: Store, name: str) -> None:
        """`name`: of the process in the run, such as "driver"; a later start adds to its file."""
        self._run, self._name = run, f"logs/{name}.log"
        if run.is_local:
            self.path = run.local_path() / self._name
            self.path.parent.mkdir(parents=True, exist_ok=True)
        else:  # an object cannot be added to: a file for each start
            self._name = f"logs/{name}-{uuid.uuid4().hex[:8]}.log"
            folder = hashlib.blake2b(run.url.encode(), digest_size=8).hexdigest()
            self.path = user_cache(folder, "logs") / Path(self._name).name

    def files(self) -> dict[str, Callable[[], bytes]]:
        """The log by its name in the run's folder; empty where it lies there already."""
        is_elsewhere = not self._run.is_local and self.path.exists()
        return {self._name: self._read} if is_elsewhere else {}

    def save(self) -> None:
        """Copy the file to the run's folder, where it is not there already."""
        for name, read in self.files().items():
            self._run.write(name, read())

    @contextlib.contextmanager
    def catch(self) -> Iterator[TextIO]:
        """Send what this process and its children print to the file alone; gives the terminal.

        What is written to that goes to both.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        terminal = open(kept[0], "w", buffering=1, closefd=False)  # noqa: SIM115 - closed below
        with open(self.path, "a", buffering=1, opener=no_link) as file:
            try:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                yield cast(TextIO, _Both(terminal, file))
            except BaseException:
                traceback.print_exc()  # the terminal gets a sentence, the file all of it
                raise
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(kept[0], 1)
                os.dup2(kept[1], 2)
                for descriptor in kept:
                    os.close(descriptor)
                self.save()

    def copy(self) -> None:
        """From now on, all that this process prints goes to the file as well as where it went.

        `tee` does it, a process of its own: it writes the last words of one that crashed, too.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with open(self.path, "ab", opener=no_link) as file:
            opened = file.fileno()  # not by its name, which might be another file's by now
            tee = subprocess.Popen(
                ["tee", "-a", f"/dev/fd/{opened}"],
                stdin=subprocess.PIPE,
                start_new_session=True,
                pass_fds=[opened],
            )
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()

    def _read(self) -> bytes:
        with open(self.path, "rb", opener=no_link) as file:
            return file.read()


class _Both:
    """Enough of a text file for `print`, over two of them."""

    def __init__(self, *files: TextIO) -> None:
        self._files = files

    def write(self, text: str) -> int:
        for file in self._files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self._files:
            file.flush()
