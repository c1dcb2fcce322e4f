"""Nothing that a user writes makes Hydra call a function: neither overrides nor YAML files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from framework.config import compose, conf_dir
from framework.kinds import Kinds, Package

OVERRIDES = (
    "hydra.callbacks.x._target_=os.mkdir",
    "+hydra.callbacks.x={_target_: os.mkdir, path: /x}",
    "++hydra.callbacks.x._target_=os.mkdir",
    "hydra.job_logging.handlers.x={(): os.mkdir}",
    "+hydra.job.env_set.LD_PRELOAD=/x.so",
    "hydra.searchpath=[file:///x]",
    "hydra.searchpath=[pkg://x]",
    "hydra/callbacks=x",
    "+hydra/callbacks=x",
    "hydra/job_logging=x,none",
    "~hydra.callbacks",
    "hydra={callbacks: {x: {_target_: os.mkdir}}}",
    "+model@hydra.callbacks.x=dit",
    "+model@_global_.hydra.callbacks=dit",
    "+model@_global_._name_=hydra",
    "hydra.launcher._target_=os.mkdir",
    "hydra.launcher.x={_target_: os.mkdir}",
    "hydra.launcher.x=${model}",
    "hydra.launcher.x.y=1",
    "hydra/launcher=../callbacks/x",
    "hydra.sweeper.params={hydra.callbacks.x._target_: os.mkdir}",
    "hydra.sweeper.params=1",
    "hydra.run={dir: x}",
    "hydra.run.dir=a,b",
    "experiment=../hydra/callbacks/x",
    "experiment=[demo,../../evil]",
    "+experiment=demo,../../evil",
    "+anything=//tmp/evil",
    "model=dit_xs.yml",
)
OPTIONS = (
    *(
        "--config-dir=/x",
        "-cd",
        "--config-path=/x",
        "-cp",
        "--config-name=x",
        "-cn",
        "--config-d=/x",
    ),
    *("--experimental-rerun=/x", "--exp=/x", "-cd=/x", "--", "-mcd"),
)
YAML = {
    "a section": "hydra:\n  callbacks: {x: {_target_: os.mkdir}}\n",
    "an escaped name": '"\\x68ydra":\n  callbacks: {x: {_target_: os.mkdir}}\n',
    "a merged section": "<<: {hydra: {callbacks: {x: {_target_: os.mkdir}}}}\n",
    "a header": "# @package hydra.callbacks\nx: {_target_: os.mkdir}\n",
    "a header of the whole": "#  @package _global_.hydra\ncallbacks: {x: {_target_: os.mkdir}}\n",
    "a header by name": "# @package _global_._name_\ncallbacks: {x: {_target_: os.mkdir}}\n",
    "a choice": "defaults:\n  - override hydra/job_logging: x\n",
    "a choice elsewhere": "defaults:\n  - /model@hydra.callbacks.x: dit\n",
    "a choice of the whole": "defaults:\n  - /model@_global_.hydra: dit\n",
    "a file": "defaults: [/hydra/callbacks/x]\n",
    "a file outside": "defaults: [../../evil]\n",
    "a file of the machine": "defaults: [//tmp/evil]\n",
    "a file of another ending": "defaults: [evil.yml]\n",
    "a file that is named later": "defaults: ['${oc.env:EVIL}']\n",
}
GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_of_hydras_own_section_is_refused(override: str) -> None:
    with pytest.raises(ValueError, match=r"of Hydra's own section|cannot be read|no such choice"):
        compose(["experiment=demo", override])


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_names_another_file_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match="no such option; YAML of your own comes by packages="):
        compose(["experiment=demo", option])


@pytest.mark.parametrize(
    "override",
    [
        *(
            "hydra.run.dir=x/${now:%H}",
            "++hydra.sweep.dir=x",
            "hydra.sweep.subdir='${hydra.job.num}'",
        ),
        *("hydra/launcher=basic", "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2"),
        *("data={shards: 's3://bucket/x', manifest: ../m}", "data.shards=../x"),
    ],
)
def test_the_short_list_is_taken(override: str) -> None:
    assert compose(["experiment=demo", override]).choices["experiment"] == "demo"


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_reaches_hydras_own_section_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "conf/experiment/evil.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(YAML[name] if "@package" in YAML[name] else GLOBAL + YAML[name])
    with pytest.raises(ValueError, match=r"experiment/evil\.yaml: .* is refused; only conf/config"):
        Kinds(tmp_path / "conf")
    with pytest.raises(ValueError, match=r"evil\.yaml: .* is refused"):
        Kinds(conf_dir(), [Package("team", tmp_path / "conf")])


@pytest.mark.parametrize("name", ["hydra/callbacks/x.yaml", "hydra.yaml"])
def test_a_folder_for_hydra_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("x: {_target_: os.mkdir}\n")
    with pytest.raises(ValueError, match="is refused; only conf/config"):
        Kinds(tmp_path)


def test_a_linked_folder_is_read_as_hydra_reads_it(tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/x.yaml").write_text(GLOBAL + YAML["a section"])
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/experiment").symlink_to(tmp_path / "evil")
    (tmp_path / "conf/loop").symlink_to(tmp_path / "conf")
    with pytest.raises(ValueError, match=r"experiment/x\.yaml: 'hydra' is refused"):
        Kinds(tmp_path / "conf")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["override", "YAML"])
def test_a_command_calls_nothing(how: str, tmp_path: Path) -> None:
    made, conf = tmp_path / "made", tmp_path / "conf"
    shutil.copytree(conf_dir(), conf)
    callbacks = f"hydra: {{callbacks: {{x: {{_target_: os.mkdir, path: {made}}}}}}}\n"
    if how == "YAML":
        (conf / "experiment/evil.yaml").write_text(GLOBAL + callbacks)
        command = ["experiment=evil"]
    else:
        command = ["experiment=demo", f"+hydra.callbacks.x={{_target_: os.mkdir, path: {made}}}"]
    done = subprocess.run(
        [sys.executable, "-m", "framework.train", *command],
        env={**os.environ, "LONGTAKE_CONF": str(conf)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not made.exists()
