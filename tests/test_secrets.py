"""A secret that a user put into the config is in nothing that a run writes or prints."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.run.identity import read_config
from framework.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PASSWORD = "pl4nted"
MODEL = """
from dataclasses import dataclass

from framework.mapping import free
from model_zoo.models.dit import DiTConfig


@dataclass(frozen=True)
class KeyedConfig(DiTConfig):
    api_key: str = free("")
"""
FILES = {
    "__init__.py": "",
    "keyed.py": MODEL,
    "conf/model/keyed.yaml": "defaults: [dit_xs, _self_]\n_target_: team_keyed.keyed.KeyedConfig\n",
}


def holding(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if PASSWORD.encode() in path.read_bytes()]


def test_a_planted_password_is_nowhere(
    small_line: list[str],
    small_data: list[str],
    finish: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a field that is named for one, and in a URL."""
    for name, text in FILES.items():
        path = tmp_path / "team_keyed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    secrets = [f"model.api_key={PASSWORD}", f"export.licence=https://me:{PASSWORD}@host/licence"]
    # Nobody listens there: the run trains on, and says where its figures wait.
    where = ["tracking.uri=postgresql://someone@127.0.0.1:9/mlflow", "train.steps=4"]
    chosen = ["packages=team_keyed", "model=keyed"]
    printed = finish("framework.train", *small_line, *small_data, *where, *chosen, *secrets)
    assert not holding(tmp_path)
    assert PASSWORD not in printed
    kept = read_config(Store(tmp_path / "runs/small"))
    assert kept["model.api_key"] == "***"
    assert kept["export.licence"] == "https://me:***@host/licence"
    files = {path.name for path in tmp_path.rglob("*")}
    assert files >= {"config.json", "journal.jsonl", "COMMITTED"}


def test_a_refused_uri_leaves_nothing(
    small_line: list[str],
    small_data: list[str],
    start: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
) -> None:
    uri = f"postgresql://someone:{PASSWORD}@127.0.0.1:9/mlflow"
    process = start("framework.train", *small_line, *small_data, f"tracking.uri={uri}")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2, said
    assert said.startswith("error: tracking: uri holds a password")
    assert len(said.splitlines()) == 1
    assert "PGPASSWORD" in said
    assert PASSWORD not in said
    assert not holding(tmp_path)
    assert not (tmp_path / "runs").exists()
