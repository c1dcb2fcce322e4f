import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.tracking.__main__ import main
from framework.tracking.journal import Journal
from framework.tracking.mlflow import MlflowConfig
from framework.tracking.tracker import NoTracker, NoTrackerConfig, Tracker

# Generous: a wait ends as soon as it may; only a failure lasts this long.
WAIT_S = 120.0


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make a database, so it is made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracker = MlflowConfig(f"sqlite:///{path}", "first").build("first", path.parent / "journal")
    tracker.close()
    return path


@pytest.fixture
def config(empty_database: Path, tmp_path: Path) -> MlflowConfig:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return MlflowConfig(f"sqlite:///{tmp_path}/mlflow.db", send_interval_s=0.0)


@pytest.fixture
def dead_uri() -> Iterator[str]:
    """A port that is taken and where nobody listens: connections are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def open_run(config: MlflowConfig, folder: Path, **options: Any) -> Tracker:
    return config.build("a run", folder, **options)


def points(config: MlflowConfig, run_id: str | None, key: str) -> list[tuple[int, float]]:
    history = client(config.uri).get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def num_runs(config: MlflowConfig) -> int:
    mlflow = client(config.uri)
    experiment = mlflow.get_experiment_by_name(config.experiment)
    return len(mlflow.search_runs([experiment.experiment_id]))


def test_the_page_has_a_command_where_no_server_shows_it(tmp_path: Path) -> None:
    config = MlflowConfig(f"sqlite:///{tmp_path}/my runs/mlflow.db")
    where, command = config.page().split(": ", 1)
    words = shlex.split(command)
    assert where == f"the MLflow page, at http://127.0.0.1:{words[-1]}"
    assert Path(words[0]).name == "mlflow"
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--backend-store-uri"] == config.uri
    assert options["--default-artifact-root"] == config.artifact_location
    assert "the server at http://mlflow:5000" in MlflowConfig("http://mlflow:5000").page()
    assert "no page" in NoTrackerConfig().page()


def test_what_is_logged_is_on_the_run(config: MlflowConfig, tmp_path: Path) -> None:
    tracker = open_run(config, tmp_path / "journal", tags={"longtake.run": "file:///runs/demo"})
    video = tmp_path / "step 0.mp4"
    video.write_bytes(b"frames")
    tracker.log_params({"model.depth": 4, "data.sources[0]": "a" * 9000})
    tracker.log_metrics({"train/loss": 2.5, "data/wait_s": float("nan")}, step=0)
    tracker.log_artifact(video, "samples")
    video.unlink()
    tracker.log_text("depth: 4", "config/run.yaml")
    tracker.log_checkpoint("s3://bucket/checkpoints/step-00000100", 100)
    tracker.log_metrics({"eval/loss": 1.5}, step=100, checkpoint_step=100)
    tracker.close()

    mlflow = client(config.uri)
    run = mlflow.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.depth"] == "4"
    assert len(run.data.params["data.sources_0_"]) == 6000
    assert run.data.tags["longtake.run"] == "file:///runs/demo"
    assert run.data.tags["checkpoint.latest_step"] == "100"
    assert run.data.metrics["train/loss"] == 2.5
    assert run.data.metrics["data/wait_s"] != run.data.metrics["data/wait_s"]
    samples = mlflow.list_artifacts(tracker.run_id, "samples")
    assert [file.path for file in samples] == ["samples/step 0.mp4"]
    assert run.info.artifact_uri.startswith((tmp_path / "mlflow-artifacts").as_uri())
    text = mlflow.download_artifacts(tracker.run_id, "config/run.yaml", str(tmp_path))
    assert Path(text).read_text() == "depth: 4"
    (model,) = mlflow.search_logged_models([run.info.experiment_id])
    assert (model.name, model.source_run_id) == ("step-00000100", tracker.run_id)
    assert model.params == {"url": "s3://bucket/checkpoints/step-00000100", "step": "100"}
    assert [(m.key, m.value) for m in model.metrics] == [("eval/loss", 1.5)]
    assert not list((tmp_path / "journal" / "artifacts").glob("*"))


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_step_is_logged_once_though_it_is_run_again(
    config: MlflowConfig, tmp_path: Path, same_machine: bool
) -> None:
    first = open_run(config, tmp_path / "journal")
    first.log_params({"cluster.num_workers": 2})
    for step in range(150):
        first.log_metrics({"train/loss": step}, step)
    first.log_metrics({"eval/loss": 1.0}, 120)
    first.close("FAILED")

    folder = tmp_path / ("journal" if same_machine else "other")
    second = open_run(config, folder, run_id=first.run_id)
    second.log_params({"cluster.num_workers": 3, "cluster.cpus": 1})
    for step in range(100, 200):
        second.log_metrics({"train/loss": step + 0.5}, step)
    second.log_metrics({"eval/loss": 2.0}, 60)  # an older checkpoint, evaluated later
    second.close()

    assert second.run_id == first.run_id
    assert num_runs(config) == 1
    run = client(config.uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"cluster.num_workers": "2", "cluster.cpus": "1"}
    expected = [(step, step + 0.5 * (step >= 150)) for step in range(200)]
    assert points(config, first.run_id, "train/loss") == expected
    assert points(config, first.run_id, "eval/loss") == [(60, 2.0), (120, 1.0)]


def test_a_key_finds_its_run(config: MlflowConfig, tmp_path: Path) -> None:
    driver = open_run(config, tmp_path / "driver", run_key="0a1b")
    driver.close(None)
    worker = open_run(config, tmp_path / "worker", run_key="0a1b")
    other = open_run(config, tmp_path / "worker", run_key="2c3d")  # sets the old journal aside
    assert worker.run_id == driver.run_id != other.run_id
    assert (tmp_path / "worker" / "journal-0a1b.jsonl").exists()
    assert client(config.uri).get_run(driver.run_id).info.status == "RUNNING"
    with pytest.raises(ValueError, match="run_key"):
        open_run(config, tmp_path / "x", run_key="it's")


def test_a_run_that_was_deleted_goes_on_in_another(config: MlflowConfig, tmp_path: Path) -> None:
    first = open_run(config, tmp_path / "journal")
    first.close()
    client(config.uri).delete_run(first.run_id)
    for attempt in range(2):
        again = open_run(config, tmp_path / "journal", run_id=first.run_id)
        again.log_metrics({"train/loss": 1.0}, attempt)
        again.close()
        assert again.run_id != first.run_id
    assert num_runs(config) == 1
    assert len(points(config, again.run_id, "train/loss")) == 2


WRITER = """
import sys
from pathlib import Path
from framework.tracking.mlflow import MlflowConfig
config = MlflowConfig(sys.argv[1], send_interval_s=float(sys.argv[3]))
tracker = config.build("a", Path(sys.argv[2]))
for step in range(10**9):
    tracker.log_metrics({"train/loss": 0.5 * step, "train/lr": 1e-3}, step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("send_interval_s", [0.0, 3600.0])
def test_kill_9_loses_nothing_and_doubles_nothing(
    config: MlflowConfig, tmp_path: Path, send_interval_s: float
) -> None:
    folder = tmp_path / "journal"
    command = [sys.executable, "-c", WRITER, config.uri, str(folder), str(send_interval_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 300:
                writer.send_signal(signal.SIGKILL)
                break
    with open(folder / Journal.NAME, "ab") as journal:
        journal.write(b'{"op": "metrics", "st')  # as if it was torn in a write
    lines = [json.loads(line) for line in (folder / Journal.NAME).read_bytes().split(b"\n")[:-1]]
    steps = [line["step"] for line in lines if line["op"] == "metrics"]
    assert steps == list(range(len(steps)))
    assert len(steps) > 300

    assert config.replay(folder, WAIT_S)
    run_id = Journal(folder, None, None, {}).run_id
    expected = [(step, 0.5 * step) for step in steps]
    assert points(config, run_id, "train/loss") == expected
    (folder / "journal.ack").unlink()  # a journal brought to another machine
    assert main([str(folder), f"tracking.uri={config.uri}"]) == 0
    assert points(config, run_id, "train/loss") == expected
    assert len(points(config, run_id, "train/lr")) == len(steps)
    assert num_runs(config) == 1


def test_training_goes_on_without_mlflow(
    config: MlflowConfig, dead_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down = MlflowConfig(dead_uri, send_interval_s=0.0)
    tracker = open_run(down, tmp_path / "journal")
    assert tracker.run_id is None
    tracker.log_params({"model.depth": 4})
    for step in range(50):
        tracker.log_metrics({"train/loss": step}, step)
    tracker.log_text("hello", "note.txt")
    tracker.log_checkpoint("file:///c", 50)
    assert not tracker.flush(0.1)
    tracker.close("KILLED", timeout_s=0.1)
    assert "figures; they wait in" in caplog.text
    assert "python -m framework.tracking" in caplog.text

    # The journal is all that is needed once MLflow is there; the first process is long gone.
    again = open_run(config, tmp_path / "journal")
    again.log_metrics({"train/loss": 50.0}, 50)
    assert again.flush(WAIT_S)
    assert points(config, again.run_id, "train/loss") == [(s, float(s)) for s in range(51)]
    run = client(config.uri).get_run(again.run_id)
    assert (run.info.status, run.data.params) == ("RUNNING", {"model.depth": "4"})
    assert [file.path for file in client(config.uri).list_artifacts(again.run_id)] == ["note.txt"]
    again.close()


def test_what_mlflow_refuses_holds_up_nothing(
    config: MlflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow-artifacts").write_text("a file where the folder should be")
    tracker = open_run(config, tmp_path / "journal")
    tracker.log_text("lost", "note.txt")
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.log_metrics({"train//loss": 1.0}, 0)  # not a name that MLflow takes
    tracker.log_metrics({"train/loss": 2.0}, 1)
    tracker.set_tags({"status": "fine"})
    while not tracker.flush(0.2):  # each flush tries again at once
        pass
    tracker.close()
    assert points(config, tracker.run_id, "train/loss") == [(0, 1.0), (1, 2.0)]
    assert client(config.uri).get_run(tracker.run_id).data.tags["status"] == "fine"
    assert "2 entries were refused" in caplog.text


def strange_journal(folder: Path, *entries: dict[str, Any], **header: Any) -> Path:
    """A run's journal as a stranger may write it."""
    lines = [{"op": "run", "key": "key", "run_id": None, "name": "a", **header}, *entries]
    folder.mkdir(parents=True)
    (folder / Journal.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_strange_journal_sends_and_deletes_no_file_but_its_own(
    config: MlflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    names = [
        str(private / "key"),
        "../private/key",
        "artifacts/../../private/key",
        "artifacts/000000000000/..",
        "artifacts/00000000000a/key",  # a folder that is a link
        "artifacts/00000000000b/key",  # a file that is one
        "journal.jsonl",
        None,
        7,
    ]
    entries = [{"op": "artifact", "file": name, "folder": ""} for name in names]
    folder = strange_journal(tmp_path / "run/journal", *entries, {"op": "artifact"})
    (folder / "artifacts/00000000000b").mkdir(parents=True)
    (folder / "artifacts/00000000000a").symlink_to(private)
    (folder / "artifacts/00000000000b/key").symlink_to(private / "key")
    assert config.replay(folder, WAIT_S)
    run_id = Journal(folder, None, None, {}).run_id
    assert client(config.uri).list_artifacts(run_id) == []
    assert (private / "key").read_text() == "secret"
    assert f"{len(names) + 1} entries were refused" in caplog.text


def test_a_strange_journal_writes_nothing_elsewhere(tmp_path: Path) -> None:
    folder = strange_journal(tmp_path / "keyed", key="../../out")
    (folder / "journal-..").mkdir()
    Journal(folder, "another", None, {})  # sets the other run's aside
    assert not (tmp_path / "out.jsonl").exists()
    assert (folder / "journal-.._.._out.jsonl").is_file()
    for key in (None, "", "' OR name != '"):
        with pytest.raises(ValueError, match="no key of a run"):
            Journal(strange_journal(tmp_path / f"key {key}", key=key), None, None, {})
    (tmp_path / "notes").write_text("a line\nwithout an end")
    for name in (Journal.NAME, "journal.ack", "journal.ack.tmp", "artifacts"):
        (tmp_path / f"linked {name}").mkdir()
        (tmp_path / f"linked {name}" / name).symlink_to(tmp_path / "notes")
        with pytest.raises(ValueError, match="is a symbolic link"):
            Journal(tmp_path / f"linked {name}", None, None, {})
    assert (tmp_path / "notes").read_text() == "a line\nwithout an end"


def test_a_journal_does_not_choose_where_it_is_sent(
    config: MlflowConfig, dead_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = strange_journal(tmp_path / "journal", uri=dead_uri)
    for arguments in ([str(folder)], [str(folder), config.uri], [str(folder), "uri="]):
        assert main(arguments) == 2
        assert "JOURNAL_FOLDER tracking.uri=URI" in capsys.readouterr().err
    assert main([str(folder), f"tracking.uri={config.uri}"]) == 0
    assert f"the journal names MLflow at {dead_uri!r}; it is sent to" in capsys.readouterr().err
    assert num_runs(config) == 1


def test_a_long_journal_starts_over_once_it_is_sent(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "key", None, {"name": "a"})
    for number in range(9):
        journal.append({"op": "x", "text": str(number) * (1 << 20)})
    entries = journal.read(max_lines=5)
    assert [entry.get("text", "-")[0] for entry, _ in entries] == ["-", "0", "1", "2", "3"]
    journal.ack(entries[-1][1], "run")
    again = Journal(tmp_path, "key", "run", {})
    entries = again.read(max_lines=100)
    assert [entry["text"][0] for entry, _ in entries] == ["4", "5", "6", "7", "8"]
    again.ack(entries[-1][1], "run")
    assert again.path.stat().st_size < 1000
    assert not again.read(max_lines=100)
    again.append({"op": "y"})
    last = Journal(tmp_path, "key", "run", {})
    assert last.header["name"] == "a"
    assert [entry for entry, _ in last.read(max_lines=9)] == [{"op": "y"}]


def test_a_torn_line_was_never_logged(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "key", None, {})
    journal.append({"op": "x"})
    with open(journal.path, "ab") as file:
        file.write(b'{"op": "to')
    again = Journal(tmp_path, "key", None, {})
    again.append({"op": "y"})
    assert [entry["op"] for entry, _ in again.read(max_lines=9)] == ["run", "x", "y"]


def test_configs_refuse_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///runs/mlflow\.db"):
        MlflowConfig("file:///runs/mlruns")
    with pytest.raises(ValueError, match="2 nodes"):
        MlflowConfig().check(num_nodes=2)
    with pytest.raises(ValueError, match="http_timeout_s=0"):
        MlflowConfig(http_timeout_s=0)
    with pytest.raises(ValueError, match="holds no journal"):
        MlflowConfig().replay(tmp_path, 1.0)
    MlflowConfig().check(num_nodes=1)
    MlflowConfig("http://mlflow:5000").check(num_nodes=64)
    NoTrackerConfig().check(num_nodes=64)
    assert MlflowConfig().absolute(tmp_path).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert MlflowConfig("http://mlflow:5000").absolute(tmp_path).uri == "http://mlflow:5000"
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2


def test_no_tracker_takes_the_same_calls(tmp_path: Path) -> None:
    tracker: Tracker = NoTrackerConfig().build("a", tmp_path)
    assert isinstance(tracker, NoTracker)
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_artifact("nowhere")
    tracker.log_text("a", "b")
    tracker.set_tags({})
    tracker.log_checkpoint("a", 1)
    assert tracker.flush(0.0)
    tracker.close()
    assert (tracker.run_id, tracker.journal_path) == (None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "way"),
    [
        ("http://user:s3cret@mlflow:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("https://s3cret@mlflow", "MLFLOW_TRACKING_PASSWORD, or in ~/.mlflow/credentials"),
        ("https://mlflow/x?api_key=s3cret", "MLFLOW_TRACKING_USERNAME"),
        ("postgresql://user:s3cret@host/mlflow", "PGPASSWORD, or in ~/.pgpass"),
        ("postgresql+psycopg://host/mlflow?user=u&password=s3cret", "PGPASSWORD"),
        ("postgresql://:s3cret@host/mlflow", "PGPASSWORD"),
        ("postgresql://user%3As3cret%40host/mlflow", "PGPASSWORD"),
        ("mysql+pymysql://u:s3cret@host/mlflow", r"read_default_file=~/\.my\.cnf"),
        ("mssql+pyodbc://u:s3cret@host/mlflow", "`mlflow server`"),
        ("mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BUID%3Du%3BPWD%3Ds3cret", "`mlflow server`"),
    ],
)
def test_a_uri_with_a_password_is_refused(uri: str, way: str) -> None:
    with pytest.raises(ValueError, match=way) as caught:
        MlflowConfig(uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://mlflow:5000/a", "postgresql://user@host/mlflow?sslmode=require"),
        *("sqlite:////a:b@c/x.db", "mysql+pymysql://host/mlflow?read_default_file=~/.my.cnf"),
        *("postgresql://user:***@host/mlflow", "http://***@mlflow"),  # as earlier runs keep it
    ],
)
def test_a_uri_without_one_is_taken(uri: str) -> None:
    assert MlflowConfig(uri).uri == uri


class Server:
    """`mlflow server` in a process group of its own, which can be stopped and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        database = f"sqlite:///{folder}/mlflow.db"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", database),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + WAIT_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(empty_database: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(tmp_path, port)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_a_server_that_hangs_and_dies_and_comes_back(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    config = MlflowConfig(server.uri, send_interval_s=0.0)
    tracker = open_run(config, tmp_path / "journal")
    tracker.log_metrics({"eval/loss": float("nan")}, 0)
    for step in range(100):
        tracker.log_metrics({"train/loss": step, "train/grad_norm": float("inf")}, step)
    assert tracker.flush(WAIT_S)

    # It takes connections and answers none. That the loop ends shows that no call waits for it.
    server.signal(signal.SIGSTOP)
    for step in range(100, 200):
        tracker.log_metrics({"train/loss": step}, step)
    tracker.log_text("sample", "samples/note.txt")
    while "they wait in" not in caplog.text:  # a request ran into its time-out
        assert not tracker.flush(0.1)

    server.signal(signal.SIGCONT)  # what was under way is answered to nobody, and sent again
    assert tracker.flush(WAIT_S)
    server.stop()
    for step in range(150, 300):
        tracker.log_metrics({"train/loss": step}, step)
    assert not tracker.flush(0.1)
    server.start()
    tracker.close(timeout_s=WAIT_S)

    steps = [step for step, _ in points(config, tracker.run_id, "train/loss")]
    assert Counter(steps) == Counter(range(300))
    assert num_runs(config) == 1
    mlflow = client(config.uri)
    assert mlflow.get_run(tracker.run_id).info.status == "FINISHED"
    (file,) = mlflow.list_artifacts(tracker.run_id, "samples")
    assert file.path == "samples/note.txt"
    grad_norms = points(config, tracker.run_id, "train/grad_norm")
    assert len(grad_norms) == 100
    assert min(value for _, value in grad_norms) > 1e300
    ((_, value),) = points(config, tracker.run_id, "eval/loss")
    assert value != value
