"""`python -m framework.tracking JOURNAL_FOLDER [URI]`: send what a dead run left behind."""

import sys
from pathlib import Path

from framework.tracking.journal import Journal
from framework.tracking.mlflow import MlflowConfig


def main(arguments: list[str]) -> int:
    """The exit status: 0 where all was sent, 1 where some is left, 2 for a mistake."""
    if len(arguments) not in (1, 2):
        print("usage: python -m framework.tracking JOURNAL_FOLDER [URI]", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    header = Journal(folder, None, None, {}).header if (folder / Journal.NAME).exists() else {}
    try:
        config = MlflowConfig(uri=arguments[1] if len(arguments) == 2 else header.get("uri", ""))
        done = config.replay(folder, timeout_s=600)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("all sent" if done else f"not all was sent; the rest stays in {folder}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
