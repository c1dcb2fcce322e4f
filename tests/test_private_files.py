"""The cache of a user is nobody else's: not to read, and not to be led elsewhere by."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from framework.private_files import no_link, user_cache


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_it_is_of_mode_0700_under_any_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    before = os.umask(0)
    try:
        folder = user_cache("run", "logs")
    finally:
        os.umask(before)
    assert folder == tmp_path / "cache/longtake/run/logs"
    assert [mode(path) for path in (folder, *folder.parents[:2])] == [0o700] * 3
    folder.chmod(0o755)  # as earlier releases made it
    assert mode(user_cache("run", "logs")) == 0o700


@pytest.mark.parametrize("name", ["longtake", "longtake/run"])
def test_what_somebody_else_made_first_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / name
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{folder} must be a folder of this user"):
        user_cache("run")
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="nobody else may write to"):
        user_cache("run")
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(ValueError, match="must be a folder of this user"):
            user_cache("run")


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
def test_without_a_home_it_is_a_new_folder_each_time(home: str, tmp_path: Path) -> None:
    program = (
        "import stat; from framework.private_files import user_cache; "
        "f = user_cache('a'); assert f == user_cache('a'); "
        "print(f, [oct(p.stat().st_mode & 0o777) for p in (f, f.parent)])"
    )
    environment = {"HOME": home, "TMPDIR": str(tmp_path)}
    said = [
        subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        for _ in range(2)
    ]
    assert said[0] != said[1]
    assert all(line.startswith(f"{tmp_path}/longtake-") for line in said)
    assert all("['0o700', '0o700']" in line for line in said)


def test_a_link_is_not_opened(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("private")
    link.symlink_to(target)
    for flags in (os.O_RDONLY, os.O_WRONLY | os.O_APPEND):
        with pytest.raises(ValueError, match="link is a symbolic link"):
            no_link(str(link), flags)
    with open(target, opener=no_link) as file:
        assert file.read() == "private"
