"""`python -m framework.tracking JOURNAL_FOLDER tracking.uri=URI`: send what a dead run left behind.

The address is the caller's: MLflow gets credentials from the environment and `~/.netrc`, and a
journal may come from a stranger.
"""

import sys
from pathlib import Path

from framework.printable import printable_page
from framework.tracking.mlflow import MlflowConfig

_URI = "tracking.uri="


def main(arguments: list[str]) -> int:
    """The exit status: 0 where all was sent, 1 where some is left, 2 for a mistake."""
    if len(arguments) != 2 or not arguments[1].startswith(_URI):
        print(
            "usage: python -m framework.tracking JOURNAL_FOLDER tracking.uri=URI", file=sys.stderr
        )
        return 2
    folder = Path(arguments[0])
    try:
        config = MlflowConfig(uri=arguments[1].removeprefix(_URI))
        done = config.replay(folder, 600, lambda text: print(text, file=sys.stderr))
    except ValueError as error:
        print(f"error: {printable_page(error)}", file=sys.stderr)
        return 2
    print("all sent" if done else f"not all was sent; the rest stays in {folder}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
