"""MLflow as a run's tracker: where it is, and how to reach its page.

`framework.tracking.mlflow_tracker` is imported only when a run with MLflow starts, so that reading
a config costs nothing.
"""

import re
import shlex
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from framework.mapping import has_password, mask_url
from framework.tracking.journal import RUN_KEY, Journal
from framework.tracking.tracker import Tracker

if TYPE_CHECKING:
    from framework.tracking.mlflow_tracker import MlflowTracker


# Where what opens a URI looks for the password, by the URI's scheme: MLflow itself (its
# `read_mlflow_creds`), libpq, or a driver for MySQL or SQL Server.
_PASSWORDS = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in ~/.mlflow/credentials",
    "postgresql": "PGPASSWORD, or in ~/.pgpass; the user may stay",
    "mysql": "a file of the driver's, by mysql+pymysql://HOST/DATABASE?read_default_file=~/.my.cnf",
    "mssql": "an `mlflow server` beside the database, and name that one",
}


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow at `uri`: a server (`http://…`) or a database (`sqlite:///relative/path.db`, …).

    It holds no password, see `_PASSWORDS`: whoever sees the command or the run's job would read it.
    """

    uri: str = "sqlite:///runs/mlflow.db"
    experiment: str = "longtake"
    http_timeout_s: int = 10
    send_interval_s: float = 2.0  # how long lines gather for one batch

    def __post_init__(self) -> None:
        schemes = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
        if urlsplit(self.uri).scheme.split("+")[0] not in schemes:
            raise ValueError(
                f"uri={mask_url(self.uri)!r} must start with one of {', '.join(schemes)} (MLflow "
                "gives up plain file stores); try sqlite:///runs/mlflow.db"
            )
        scheme = urlsplit(self.uri).scheme.split("+")[0].replace("https", "http")
        is_user_secret = scheme == "http" and mask_url(self.uri) != self.uri  # it may be a token
        if is_user_secret or has_password(self.uri) or has_password(unquote(self.uri)):
            raise ValueError(
                "uri holds a password or token, which everybody reads who sees the command; put it "
                f"on every node into {_PASSWORDS.get(scheme, 'the environment')}"
            )
        if not self.experiment:
            raise ValueError("experiment='' must not be empty; try experiment=longtake")
        if self.http_timeout_s < 1 or self.send_interval_s < 0:
            raise ValueError(
                f"http_timeout_s={self.http_timeout_s} must be at least 1 and "
                f"send_interval_s={self.send_interval_s} at least 0; try 10 and 2.0"
            )

    def check(self, num_nodes: int) -> None:
        """ValueError where the workers of so many nodes could not reach this tracker."""
        if num_nodes > 1 and self._sqlite_path is not None:
            raise ValueError(
                f"tracking.uri={self.uri!r} is a file of one machine, but the cluster has "
                f"{num_nodes} nodes; start `mlflow server` and set tracking.uri=http://HOST:5000, "
                "or set tracking=none"
            )

    def check_lasting(self, check: Callable[[str, str], None]) -> None:
        """Let `check`, `framework.cluster.check_lasting`, look at the file of an sqlite URI."""
        if (path := self._sqlite_path) is not None:
            check("tracking.uri: the file", str(path))

    def absolute(self, base: Path) -> "MlflowConfig":
        """The same with a relative sqlite path taken from `base`, for workers in other folders."""
        path = self._sqlite_path
        return self if path is None else replace(self, uri=f"sqlite:///{(base / path).resolve()}")

    @property
    def _sqlite_path(self) -> Path | None:
        is_sqlite = urlsplit(self.uri).scheme.split("+")[0] == "sqlite"
        return Path(self.uri.split(":///", 1)[-1]) if is_sqlite else None

    @property
    def uri_without_password(self) -> str:
        """`uri` as it may be shown and stored."""
        return mask_url(self.uri)

    @property
    def artifact_location(self) -> str | None:
        """A folder beside an sqlite file; None leaves the choice to the server."""
        path = self._sqlite_path
        return None if path is None else path.resolve().with_name(f"{path.stem}-artifacts").as_uri()

    def page(self) -> str:
        """Where to watch the run, in words: a server's address, or the command that starts one.

        Of an sqlite file, the page reads artifacts from `artifact_location`, which each experiment
        has stored; that it is the default as well makes experiments made in the page work too.
        """
        path = self._sqlite_path
        if path is None:
            is_server = urlsplit(self.uri).scheme in ("http", "https")
            at = f" at {self.uri_without_password}" if is_server else " of this database"
            return f"the MLflow page: the server{at}"
        port = first_free_port(5000)
        beside = Path(sys.executable).with_name("mlflow")  # no need to activate the environment
        words = [
            str(beside) if beside.exists() else "mlflow",
            *("server", "--backend-store-uri", f"sqlite:///{path.resolve()}"),
            *("--default-artifact-root", str(self.artifact_location)),
            *("--port", str(port)),
        ]
        return f"the MLflow page, at http://127.0.0.1:{port}: {shlex.join(words)}"

    def build(
        self,
        run_name: str,
        journal_dir: Path,
        run_id: str | None = None,
        run_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        reopen: bool = True,
    ) -> Tracker:
        """Open the run `run_id`, else the one that was made for `run_key`, else make one.

        `run_key` is any string that is this run's alone, such as a UUID in its folder: with it,
        processes that start while MLflow is down agree on one run later. `reopen` False adds to a
        run without saying that it is running again. Sends what an earlier
        process left in `journal_dir`. Returns after the first answer from MLflow, or the first
        failure to get one.
        """
        if run_key is not None and not re.fullmatch(RUN_KEY, run_key):
            raise ValueError(
                f"run_key={run_key!r} must be of letters, digits and . / : ~ + = , @ -"
            )
        header = {"name": run_name, "uri": self.uri_without_password}
        journal = Journal(journal_dir, run_key, run_id, header)
        tracker = self._tracker(journal, run_name, run_id)
        tracker.start({**(tags or {})}, reopen)
        return tracker

    def replay(
        self, journal_dir: Path, timeout_s: float, say: Callable[[str], None] = lambda text: None
    ) -> bool:
        """Send what is left in a journal, and nothing else, to `uri`; whether all of it was taken.

        `say` is told where the journal names another address: a folder from elsewhere does not
        choose who gets the user's credentials. ValueError where `journal_dir` holds no journal.
        """
        if not (journal_dir / Journal.NAME).exists():
            raise ValueError(f"journal_dir={str(journal_dir)!r} holds no {Journal.NAME}")
        journal = Journal(journal_dir, None, None, {})
        named, here = journal.header.get("uri"), self.absolute(Path.cwd()).uri_without_password
        if named != here:
            say(f"the journal names MLflow at {named!r}; it is sent to {here}")
        tracker = self._tracker(journal, str(journal.header.get("name", "")), None)
        tracker.start(None)
        done = tracker.flush(timeout_s)
        tracker.close(None, timeout_s=0)
        return done

    def _tracker(self, journal: Journal, run_name: str, run_id: str | None) -> "MlflowTracker":
        from framework.tracking.mlflow_tracker import MlflowTracker, Server

        server = Server(
            uri=self.uri,
            shown_uri=self.uri_without_password,
            experiment=self.experiment,
            artifact_location=self.artifact_location,
            http_timeout_s=self.http_timeout_s,
            send_interval_s=self.send_interval_s,
        )
        return MlflowTracker(server, journal, run_name, run_id)


def first_free_port(start: int) -> int:
    """The first port of this machine from `start` on that nobody listens at."""
    for port in range(start, start + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    return start
