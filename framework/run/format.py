"""The format of what a run's folder and its checkpoints say of their config.

Format 1 named modules and classes; since format 2 a config is known by the names of its kinds.
"""

from typing import Any

FORMAT = 2
LAST_COMMIT_OF_FORMAT_1 = "34b9dc7"


def check_format(found: Any, url: str) -> None:
    """ValueError where what is kept at `url` is of another format than ours."""
    if found == FORMAT:
        return
    if isinstance(found, int) and found > FORMAT:
        raise ValueError(f"{url} is of format {found}, written by a newer Longtake; use that one")
    raise ValueError(
        f"{url} was begun by an older Longtake; commit {LAST_COMMIT_OF_FORMAT_1} is the last that "
        "can go on with it; choose another run.name, or start over beside it with run.fresh=true"
    )
