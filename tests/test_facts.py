"""Configs state the facts: planning, estimates, readers and exports build no network."""

import typing
from pathlib import Path

import pytest

from framework.assembly import Assembly
from framework.config import GROUPS, RunConfig, compose, conf_dir
from framework.data.manifest.table import read_manifest
from framework.export.__main__ import network_of
from framework.run.checkpoint import Checkpoint
from framework.storage import Store
from framework.train.driver.estimate import estimate
from framework.train.job import Job
from model_zoo.folder import folder_format

# A codec and a text encoder as ours, of which nobody may build the network.
UNBUILDABLE = '''
from dataclasses import dataclass

from model_zoo.codecs.haar import HaarConfig
from model_zoo.text.byte import ByteTextConfig


@dataclass(frozen=True)
class CodecConfig(HaarConfig):
    """Haar's facts."""

    def build(self):
        raise AssertionError("a codec is built to learn a fact")


@dataclass(frozen=True)
class TextConfig(ByteTextConfig):
    """The facts of byte text."""

    def build(self):
        raise AssertionError("a text encoder is built to learn a fact")
'''


@pytest.fixture
def unbuildable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that choose them, from a package."""
    name = f"facts_{tmp_path.name.replace('-', '_')}"
    files = {
        "__init__.py": "",
        "parts.py": UNBUILDABLE,
        "conf/codec/unbuildable.yaml": f"_target_: {name}.parts.CodecConfig\n",
        "conf/text/unbuildable.yaml": (
            f"_target_: {name}.parts.TextConfig\nmax_tokens: 64\nmultiple_of: 16\n"
        ),
    }
    for path, text in files.items():
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / path).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [f"packages=[{name}]", "codec=unbuildable", "text=unbuildable"]


@pytest.fixture
def config(unbuildable: list[str], small_line: list[str], small_data: list[str]) -> RunConfig:
    return compose([*small_line, *small_data, *unbuildable])


def test_they_cannot_be_built(config: RunConfig) -> None:
    for part in (config.codec, config.text):
        with pytest.raises(AssertionError, match="built to learn a fact"):
            part.build()


def test_a_plan_needs_no_network(config: RunConfig, tmp_path: Path) -> None:
    job, said = Job.of(config), []
    job.check()
    job.assembly.check_data()
    plan = job.assembly.planner().make(Store(tmp_path / "run"), 2, said.append)
    assert said
    assert plan.num_steps(0) > 0
    ours = Assembly.of(compose(["experiment=demo"]))
    assert job.assembly.encoding()["codec"] == ours.encoding()["codec"]


def test_an_estimate_needs_no_network(config: RunConfig) -> None:
    found = estimate(Job.of(config), config.hardware)
    assert found.knows_activations
    assert found.fits


def test_a_rank_sets_itself_up_without_a_network(config: RunConfig) -> None:
    assembly = Assembly.of(config)
    reader = assembly.reader(read_manifest(config.data.manifest).shards_url)
    assert reader.token_size == assembly.token_size == 144
    assert assembly.build_objective().token_std.shape == (144,)
    assert assembly.build_model().embed.in_features == 144


def test_an_export_needs_no_network(config: RunConfig, tmp_path: Path) -> None:
    checkpoint = Checkpoint(1, Store(tmp_path), {"config": dict(config.identity.values)})
    network = network_of(checkpoint, config.packages)
    assert (network.channels, network.text_vocab, network.text_dim) == (144, 258, None)
    assert folder_format(network).config["channels"] == 144


def choices() -> list[tuple[str, str]]:
    paths = sorted(conf_dir().glob("*/*.yaml"))
    return [(path.parent.name, path.stem) for path in paths if path.parent.name in GROUPS]


@pytest.mark.parametrize(("group", "name"), choices())
def test_every_config_states_what_its_protocol_asks(group: str, name: str) -> None:
    try:
        config = getattr(compose([f"{group}={name}", "data.shards=/shards"]), group)
    except ValueError:  # a kind that has no sizes of its own
        pytest.skip("begun by other files of its group")
    protocol = typing.get_type_hints(RunConfig)[group]
    asked = [member for member in vars(protocol) if not member.startswith("_")]
    assert asked
    for member in asked:
        assert hasattr(config, member), member


def test_text_comes_as_ids_or_as_embeddings() -> None:
    for group, name in choices():
        if group == "text":
            text = compose([f"text={name}", "data.shards=/shards"]).text
            assert (text.vocab_size is None) != (text.dim is None)
            assert 1 <= text.num_tokens("") <= text.num_tokens("x" * 10_000) == text.max_tokens
