"""Files of this user alone: a folder that nobody else may enter, and files that are no links.

A name in a shared folder such as /tmp can be taken by somebody else first, who then reads what is
written there, or makes it a link to a file that is read in its place.
"""

import contextlib
import errno
import functools
import os
import stat
import tempfile
from pathlib import Path


def user_cache(*names: str) -> Path:
    """The folder `longtake/NAMES` in the user's cache, made where it is not there, of mode 0700.

    The cache is `$XDG_CACHE_HOME`, else `~/.cache`. A user who has no home to write to gets a new
    temporary folder for each process. ValueError where the folder is a link, somebody else's, or
    one that others may write to.
    """
    try:
        folder = _cache()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = _own(folder / "longtake")
    except (RuntimeError, OSError):  # no home is known; it is not there, or is not to be written to
        folder = _temporary()
    for name in names:
        folder = _own(folder / name)
    return folder


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open`: ValueError where the file itself is a symbolic link."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a symbolic link, which may lead anywhere; remove it") from None


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="longtake-"))


def _own(folder: Path) -> Path:
    """Make the folder, or see that it is this user's own and nobody else's to write to."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"{folder} must be a folder of this user that nobody else may write to, and no link; "
            "remove it, or set XDG_CACHE_HOME to another cache"
        )
    if found.st_mode & 0o077:  # made by an earlier release
        folder.chmod(0o700)
    return folder
