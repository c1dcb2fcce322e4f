"""`Tracker` by way of MLflow: a journal, a thread that sends it, and the run in MLflow.

Training only ever appends a line to a local journal. A thread sends the journal in batches and
persists how far it got, so a tracker that is down neither stalls nor stops training, and what was
not sent when a process was killed is sent by the next one that opens the journal.

Invariant: a metric has one point at a step, the first. MLflow itself is asked what it already has,
so a replayed journal, a resumed run that repeats steps and a new machine without a journal all add
nothing twice. One process at a time writes to a journal folder; any number may write to one run.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from framework.printable import printable
from framework.tracking.journal import Foreign, Journal
from framework.tracking.tracker import Status

_logger = logging.getLogger(__name__)

# MLflow's own limits: mlflow/utils/validation.py, 3.17.
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000
_MAX_METRICS, _MAX_PARAMS_TAGS = 1000, 100  # in one request
# The rest is chosen by hand.
_FIRST_DELAY_S, _MAX_DELAY_S = 1.0, 30.0  # between tries while MLflow does not answer
_MAX_TRIES = 5  # for an artifact that fails although MLflow answers
_MAX_LINES = 200  # of the journal in one batch
_SLOW_LINES = 10  # after a failure: MLflow may be too slow for more within the time-out
_KEY_TAG = "longtake.key"
_BATCHED = ("params", "metrics", "tags")


@dataclass(frozen=True)
class Server:
    """Where MLflow is, and how it is spoken to; see `framework.tracking.mlflow.MlflowConfig`."""

    uri: str
    shown_uri: str  # without a password
    experiment: str
    artifact_location: str | None
    http_timeout_s: int
    send_interval_s: float


class MlflowTracker:
    """A run in MLflow, behind a journal; see `Tracker`. Made by `MlflowConfig.build`."""

    def __init__(self, server: Server, journal: Journal, run_name: str, run_id: str | None) -> None:
        _import_mlflow(server)  # in the caller's thread: imports in two threads at once are fragile
        self._server, self._journal, self._run_name = server, journal, run_name
        self._asked_run_id = journal.run_id or run_id
        self._run: _Run | None = None
        self._cond = threading.Condition()  # guards the journal and the flags below
        self._hurry, self._stopping, self._down = True, False, False
        self._attempted = threading.Event()
        self.problem: str | None = None  # why MLflow has not taken the last lines, if it has not
        self._tries = self._num_refused = self._num_lost = 0
        self._max_lines, self._singly_until = _MAX_LINES, 0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self, tags: Mapping[str, str] | None, reopen: bool = True) -> None:
        """Start sending; `tags` None only replays and says nothing of its own."""
        if tags is not None:
            if reopen:
                self._append({"op": "open"})
            self.set_tags(tags)
        self._thread.start()
        self._attempted.wait(timeout=60 + self._server.http_timeout_s)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while MLflow has not answered yet."""
        return self._run.run_id if self._run is not None else self._asked_run_id

    @property
    def journal_path(self) -> Path | None:
        """The journal file."""
        return self._journal.path

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log a flat mapping as strings."""
        self._append({"op": "params", "values": {k: str(v) for k, v in params.items()}})

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, checkpoint_step: int | None = None
    ) -> None:
        """Log one point of each metric."""
        values = {k: float(v) for k, v in metrics.items()}
        entry = {"op": "metrics", "time": _now_ms(), "step": int(step), "values": values}
        if checkpoint_step is not None:
            entry["checkpoint"] = checkpoint_step
        self._append(entry)

    def log_artifact(self, local_path: str | Path, folder: str = "") -> None:
        """Keep a copy of a file with the run; ValueError where there is no such file."""
        source = Path(local_path)
        if not source.is_file():
            raise ValueError(f"local_path={str(source)!r} must be a file")
        self._stage(lambda path: shutil.copyfile(source, path), source.name, folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` with the run as the file `name`."""
        folder, _, file = name.rpartition("/")
        self._stage(lambda path: path.write_text(text, encoding="utf-8"), file, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._append({"op": "tags", "values": {k: str(v) for k, v in tags.items()}})

    def log_checkpoint(self, url: str, step: int) -> None:
        """Tag the run with its latest checkpoint, and list it as a model without MLflow files."""
        self.set_tags({"checkpoint.latest": url, "checkpoint.latest_step": str(step)})
        self._append({"op": "checkpoint", "url": url, "step": step})

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was logged up to now is with MLflow; False when time ran out."""
        with self._cond:
            target = self._journal.end
            self._hurry = True
            self._cond.notify_all()

            def sent() -> bool:
                # A journal that starts over after it was sent is shorter than `target`.
                return self._journal.acked >= min(target, self._journal.end)

            self._cond.wait_for(lambda: sent() or self._stopping, timeout_s)
            return sent()

    def close(self, status: Status | None = "FINISHED", timeout_s: float = 30.0) -> None:
        """End the run, flush, and stop; what could not be sent waits in the journal."""
        if status is not None:
            self._append({"op": "close", "status": status, "time": _now_ms()})
        sent = self.flush(timeout_s)
        with self._cond:
            self._stopping = True
            self._cond.notify_all()
        self._thread.join(timeout=1.0)
        if not sent:
            _logger.warning(
                "MLflow has not got all of this run; `python -m framework.tracking %s "
                "tracking.uri=%s` sends it",
                self._journal.folder,
                self._server.shown_uri,
            )
        if self._num_refused or self._num_lost:
            _logger.warning(
                "%d entries were refused, %d were lost to a full disk",
                self._num_refused,
                self._num_lost,
            )

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._cond:
            try:
                self._journal.append(entry)
            except OSError as error:  # training goes on without its figures
                if not self._num_lost:
                    _logger.error("metrics are lost, the journal cannot be written: %s", error)
                self._num_lost += 1
            self._cond.notify_all()

    def _stage(self, write: Callable[[Path], object], name: str, folder: str) -> None:
        try:
            staged = self._journal.stage(name)
            write(self._journal.folder / staged)
        except OSError as error:
            _logger.error("artifact %s is lost: %s", name, error)
            self._num_lost += 1
            return
        self._append({"op": "artifact", "file": str(staged), "folder": folder})

    # All below runs in the sending thread.

    def _work(self) -> None:
        delay_s = _FIRST_DELAY_S
        while True:
            with self._cond:
                self._cond.wait_for(lambda: self._urgent or self._journal.acked < self._journal.end)
                self._cond.wait_for(lambda: self._urgent, self._server.send_interval_s)
                if self._stopping:
                    return
                self._hurry = False
            pause_s = 0.0
            try:
                while not self._stopping and self._send_next():
                    delay_s = _FIRST_DELAY_S
            except Exception as error:  # nothing that MLflow does may end this thread
                self._note_failure(error)
                pause_s, delay_s = delay_s, min(2 * delay_s, _MAX_DELAY_S)
            self._attempted.set()
            with self._cond:
                self._cond.wait_for(lambda: self._urgent, pause_s)

    def _note_failure(self, error: Exception) -> None:
        self.problem = f"{self._server.shown_uri}: {error}"
        if not self._down:
            _logger.warning(
                "MLflow at %s does not take this run's figures; they wait in %s: %s",
                self._server.shown_uri,
                self._journal.path,
                error,
            )
        self._down, self._max_lines = True, _SLOW_LINES

    @property
    def _urgent(self) -> bool:
        return self._hurry or self._stopping

    def _send_next(self) -> bool:
        """Send one batch and acknowledge it; False where nothing is left."""
        entries = self._journal.read(self._max_lines)
        if not entries:
            return False
        if self._run is None:
            self._run = _connect(
                self._server, self._asked_run_id, self._journal.header["key"], self._run_name
            )
            self._attempted.set()
        batch = entries[:1]
        if batch[0][1] > self._singly_until and batch[0][0].get("op") in _BATCHED:
            batch = list(takewhile(lambda line: line[0].get("op") in _BATCHED, entries))
        try:
            self._run.apply([entry for entry, _ in batch], self._journal)
        except Exception as error:
            by_mlflow = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
            refused = by_mlflow or isinstance(error, Foreign)
            if refused and len(batch) > 1:  # find the one at fault
                self._singly_until = batch[-1][1]
                return True
            if not refused and not self._is_hopeless(batch[0][0]):
                raise
            self._num_refused += 1
            if self._num_refused == 1:
                _logger.warning(
                    "an entry is refused (later ones are counted): %s: %s",
                    printable(batch, 1000),
                    printable(error, 1000),
                )
        if self._down:
            _logger.warning("MLflow takes this run's figures again")
        self._tries, self._max_lines, self._down = 0, _MAX_LINES, False
        self.problem = None
        with self._cond:
            self._journal.ack(batch[-1][1], self._run.run_id)
            self._cond.notify_all()
        return True

    def _is_hopeless(self, entry: dict[str, Any]) -> bool:
        """Whether to give up an artifact, so that a broken artifact store holds up no metrics."""
        assert self._run is not None
        if entry.get("op") in _BATCHED:
            return False
        self._run.ping()  # raises where MLflow is down: that is no fault of the entry
        self._tries += 1
        return self._tries >= _MAX_TRIES


class _Run:
    """One run in MLflow, and what it holds already."""

    def __init__(self, client: Any, run: Any) -> None:
        self._client = client
        self.run_id: str = run.info.run_id
        self._experiment_id = run.info.experiment_id
        self._status = run.info.status
        self._params = set(run.data.params)
        # A point beyond the last step of its metric is new; only for others the history is fetched.
        self._last = {m.key: m.step for m in run.data.to_proto().metrics}
        self._steps: dict[str, set[int]] = {}
        self._models: dict[int, str | None] = {}

    def ping(self) -> None:
        """Raise where MLflow does not answer."""
        self._client.get_run(self.run_id)

    def apply(self, entries: list[dict[str, Any]], journal: Journal) -> None:
        """Carry out lines of a journal: several batched ones, or one other.

        Foreign where one names a file that the journal does not keep.
        """
        entry = entries[0]
        match entry.get("op"):
            case "params" | "metrics" | "tags":
                self._log_batch(entries)
            case "open" if self._status != "RUNNING":
                self._client.update_run(self.run_id, status="RUNNING")
                self._status = "RUNNING"
            case "close":
                self._client.set_terminated(self.run_id, entry["status"], entry["time"])
                self._status = entry["status"]
            case "artifact" if path := journal.staged(entry.get("file")):
                self._client.log_artifact(self.run_id, str(path), entry["folder"] or None)
                shutil.rmtree(path.parent, ignore_errors=True)
            case "checkpoint" if self._model(entry["step"]) is None:
                model = self._client.create_logged_model(
                    self._experiment_id,
                    name=_model_name(entry["step"]),
                    source_run_id=self.run_id,
                    tags={"mlflow.model.isExternal": "true"},
                    params={"url": entry["url"], "step": str(entry["step"])},
                )
                self._client.finalize_logged_model(model.model_id, "READY")
                self._models[entry["step"]] = model.model_id

    def _log_batch(self, entries: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        points: dict[tuple[str, int], Metric] = {}
        for entry in entries:
            for name, value in entry["values"].items():
                key = re.sub(r"[^\w\-./: ]", "_", name)[:_MAX_KEY]
                if entry["op"] == "params" and key not in self._params:
                    params.setdefault(key, _shorten(value, _MAX_PARAM))
                elif entry["op"] == "tags":
                    tags[key] = _shorten(value, _MAX_TAG)
                elif entry["op"] == "metrics":
                    step, model = entry["step"], self._model(entry.get("checkpoint"))
                    if (key, step) not in points and not self._has(key, step):
                        metric = Metric(key, value, entry["time"], step, model_id=model)
                        points[key, step] = metric
        # Sending a slice twice is harmless: MLflow keeps equal parameters and points once.
        for some in _slices([Param(k, v) for k, v in params.items()], _MAX_PARAMS_TAGS):
            self._client.log_batch(self.run_id, params=some, synchronous=True)
        for some in _slices([RunTag(k, v) for k, v in tags.items()], _MAX_PARAMS_TAGS):
            self._client.log_batch(self.run_id, tags=some, synchronous=True)
        for some in _slices(list(points.values()), _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=some, synchronous=True)
        self._params |= set(params)
        for key, step in points:
            self._last[key] = max(step, self._last.get(key, step))
            if key in self._steps:
                self._steps[key].add(step)

    def _has(self, key: str, step: int) -> bool:
        if key not in self._last or step > self._last[key]:
            return False
        if key not in self._steps:
            history = self._client.get_metric_history(self.run_id, key)
            self._steps[key] = {metric.step for metric in history}
        return step in self._steps[key]

    def _model(self, step: int | None) -> str | None:
        if step is None:
            return None
        if self._models.get(step) is None:
            found = self._client.search_logged_models(
                [self._experiment_id],
                f"source_run_id = '{self.run_id}' AND name = '{_model_name(step)}'",
                max_results=1,
            )
            self._models[step] = found[0].model_id if found else None
        return self._models[step]


def _import_mlflow(server: Server) -> None:
    # One try a request: the journal is the retry, and MLflow would repeat a creation blindly.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(server.http_timeout_s))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it calls home otherwise
    import mlflow.tracking  # noqa: F401 - costs seconds, hence not at the top

    for name in ("mlflow.store.db.utils", "alembic"):  # say each step of making a database
        logging.getLogger(name).setLevel(logging.WARNING)


def _connect(server: Server, run_id: str | None, key: str, name: str) -> _Run:
    """Find the run by its id, else by our key, else create it; raises where MLflow is down."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    if run_id is not None:
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                return _Run(client, run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        _logger.warning("MLflow has no run %s any more; this run goes on in another", run_id)
    experiment = client.get_experiment_by_name(server.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(server.experiment, server.artifact_location)
    else:
        experiment_id = experiment.experiment_id
    # Also where a creation was carried out but its answer was lost.
    found = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, None, {_KEY_TAG: key}, name)
    return _Run(client, run)


def _slices(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _model_name(step: int) -> str:
    return f"step-{step:08d}"


def _shorten(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
