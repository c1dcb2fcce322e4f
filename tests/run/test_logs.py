"""Everything that a process says is in a file of the run; the terminal gets ours alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from framework.run.logs import RunLog
from framework.storage import Store

CATCH = """
import os, sys
from framework.run.logs import RunLog
from framework.storage import Store
print("before")
with RunLog(Store(sys.argv[1]), "driver").catch() as terminal:
    print("a library's line")
    os.write(2, b"a line from C\\n")
    os.system("echo a child")
    print("ours", file=terminal)
    if len(sys.argv) > 2:
        raise ValueError("a mistake")
print("after")
"""

COPY = """
import os, sys
from framework.run.logs import RunLog
from framework.storage import Store
RunLog(Store(sys.argv[1]), "rank-00000").copy()
print("a line")
os.write(2, b"a line from C\\n")
sys.stdout.flush()
os.kill(os.getpid(), 11)  # as a crash in C would end it
"""


def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=100
    )


def test_the_terminal_gets_ours_and_the_file_gets_all(tmp_path: Path) -> None:
    done = run(CATCH, str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.split("\n") == ["before", "ours", "after", ""]
    assert done.stderr == ""
    log = (tmp_path / "logs/driver.log").read_text()
    assert set(log.splitlines()) == {"a library's line", "a line from C", "a child", "ours"}


def test_a_mistake_is_in_both(tmp_path: Path) -> None:
    done = run(CATCH, str(tmp_path), "raise")
    assert "ValueError: a mistake" in done.stderr
    assert "ValueError: a mistake" in (tmp_path / "logs/driver.log").read_text()


def test_the_last_words_of_a_crash_are_kept_and_still_shown(tmp_path: Path) -> None:
    done = run(COPY, str(tmp_path))
    assert done.returncode == -11
    assert set(done.stdout.splitlines()) == {"a line", "a line from C"}
    assert set((tmp_path / "logs/rank-00000.log").read_text().splitlines()) == {
        "a line",
        "a line from C",
    }


def test_the_file_goes_to_object_storage_at_the_end(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run(CATCH, f"{s3_bucket}/run")
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "longtake").glob("*/logs/driver-*.log")
    assert b"a line from C" in kept.read_bytes()
    assert {path.stat().st_mode & 0o77 for path in kept.parents[:3]} == {0}
    (name,) = Store(f"{s3_bucket}/run").list("logs")
    assert name.startswith("logs/driver-")
    assert b"a line from C" in Store(f"{s3_bucket}/run").read(name)


def test_a_link_in_the_place_of_a_log_is_not_followed(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    secret = tmp_path / "id_ed25519"
    secret.write_text("private")
    log = RunLog(Store(f"{s3_bucket}/run"), "driver")
    log.path.symlink_to(secret)
    for attack in (log.save, log.copy, log.catch().__enter__):
        with pytest.raises(ValueError, match="is a symbolic link"):
            attack()
    assert secret.read_text() == "private"
    assert not Store(f"{s3_bucket}/run").list()


def test_a_second_start_adds_to_the_file(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with RunLog(Store(tmp_path), "driver").catch():
            os.write(1, f"{word}\n".encode())
    assert (tmp_path / "logs/driver.log").read_text() == "first\nsecond\n"
