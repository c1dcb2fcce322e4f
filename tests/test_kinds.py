"""Names of kinds: one file states a class, a package adds its own, nothing else is built."""

from pathlib import Path

import pytest

from framework.config import conf_dir
from framework.kinds import Kinds, Package


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


TEAM_MODEL = '''
from dataclasses import dataclass, field

from model_zoo.models.dit import DiTConfig


@dataclass(frozen=True)
class WideConfig(DiTConfig):
    """A DiT of a team's own."""

    bold: bool = field(default=True, metadata={"free": True})
'''


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package outside of Longtake, with a model and YAML of its own; its name."""
    name = f"team_{tmp_path.name.replace('-', '_')}"
    write(tmp_path / name / "__init__.py", "")
    write(tmp_path / name / "wide.py", TEAM_MODEL)
    write(
        tmp_path / name / "conf/model/wide.yaml",
        f"defaults: [dit_xs, _self_]\n_target_: {name}.wide.WideConfig\ndepth: 2\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_team_adds_a_model_without_a_fork(team: str) -> None:
    from framework.config import compose, from_flat, group_from_flat

    overrides = ["experiment=demo", "model=wide", f"packages={team}", "model.bold=false"]
    config = compose(overrides)
    assert (config.choices["model"], config.kinds["model"]) == ("wide", "wide")
    assert type(config.model).__name__ == "WideConfig"
    assert (config.model.depth, config.model.bold) == (2, False)
    values = config.identity.values
    assert "model.bold" in config.identity.free
    assert from_flat(values) == config
    assert group_from_flat(values, "model", [team]) == config.model
    with pytest.raises(ValueError, match=r"model.kind='wide' is not known; there are dit, "):
        group_from_flat(values, "model")  # a stranger's config names no code


def test_its_yaml_may_lie_elsewhere(team: str, tmp_path: Path) -> None:
    from framework.config import compose

    (tmp_path / team / "conf").rename(tmp_path / "their yaml")
    with pytest.raises(ValueError, match="is no folder"):
        Package.parse(team)
    config = compose(["model=wide", f"packages=['{team}:{tmp_path}/their yaml']"])
    assert config.model.depth == 2


def test_two_files_may_not_state_one_class(team: str, tmp_path: Path) -> None:
    package = Package.parse(team)
    write(tmp_path / team / "conf/model/again.yaml", f"_target_: {team}.wide.WideConfig\n")
    with pytest.raises(ValueError, match=r"as again\.yaml does; .* `defaults: \[again\]`"):
        Kinds(conf_dir(), [package]).config_class("model", "wide")


@pytest.mark.parametrize("taken", ["model/dit_s.yaml", "experiment/demo.yaml", "config.yaml"])
def test_a_file_that_would_not_be_read_is_refused(team: str, tmp_path: Path, taken: str) -> None:
    """Hydra reads the first file of a name: another model than the team's would be trained."""
    from framework.config import compose

    write(tmp_path / team / "conf" / taken, f"_target_: {team}.wide.WideConfig\n")
    with pytest.raises(ValueError, match=r"has the name of .*; rename it"):
        compose([f"packages={team}"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=wide"], "no such choice; .*packages=NAME"),
        (["packages={team}", "model=wid"], "did you mean wide?"),
        (["experiment=dem"], "did you mean demo?"),
        (["packages={team},other"], r"write several packages as 'packages=\[.*,other\]'"),
        (["packages=[{team},{team}]"], "has the name of"),
    ],
)
def test_a_wrong_choice_is_a_sentence(team: str, overrides: list[str], sentence: str) -> None:
    from framework.config import compose

    with pytest.raises(ValueError, match=sentence):
        compose([text.replace("{team}", team) for text in overrides])


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("class LameConfig:\n    width: int = 3", "LameConfig lacks activation_bytes, build, "),
        ("class LameConfig(:", "SyntaxError"),
        ("class LameConfig:\n    width: int = undefined", "NameError: name 'undefined'"),
    ],
)
def test_what_a_class_lacks_is_said_at_once(
    team: str, tmp_path: Path, code: str, sentence: str
) -> None:
    from framework.config import compose

    lines = f"from dataclasses import dataclass\n\n@dataclass(frozen=True)\n{code}\n"
    write(tmp_path / team / "lame.py", lines)
    write(tmp_path / team / "conf/model/lame.yaml", f"_target_: {team}.lame.LameConfig\n")
    with pytest.raises(ValueError, match=sentence):
        compose([f"packages={team}", "model=lame"])


def test_broken_yaml_is_named(team: str, tmp_path: Path) -> None:
    from framework.config import compose

    write(tmp_path / team / "conf/model/broken.yaml", "width: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is no YAML: "):
        compose([f"packages={team}", "model=broken"])


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("os.system", "only names under framework. and model_zoo. are built"),
        ("model_zoo.models.dit.DiT", "not a frozen config dataclass"),
        ("model_zoo.nothing.Config", "No module named"),
        ("model_zoo.models.dit.Nothing", "no attribute"),
    ],
)
def test_only_a_frozen_dataclass_of_ours_is_built(
    tmp_path: Path, target: str, sentence: str
) -> None:
    write(tmp_path / "conf/model/x.yaml", f"_target_: {target}\n")
    with pytest.raises(ValueError, match=sentence):
        Kinds(tmp_path / "conf").config_class("model", "x")


def test_each_kind_of_conf_can_be_built() -> None:
    kinds = Kinds(conf_dir())
    for folder in conf_dir().iterdir():
        for path in folder.glob("*.yaml") if folder.is_dir() else ():
            if "_target_" in path.read_text():
                assert kinds.config_class(folder.name, path.stem), path
