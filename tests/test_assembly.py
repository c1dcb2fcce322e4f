"""What an assembly refuses: parts that do not fit together."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor

from framework.assembly import Assembly
from framework.batch import PackedBatch
from framework.config import compose
from framework.data.manifest.table import InStore
from framework.objectives.objective import AveragedOver, Draw, Losses
from framework.storage import TRAINING, Store
from model_zoo.checkpointing import CheckpointPolicy, PackedModel
from model_zoo.flops import Work
from model_zoo.models.dit import DiTConfig


@pytest.fixture
def assembly() -> Assembly:
    return Assembly.of(compose(["experiment=demo"]))


@dataclass(frozen=True)
class Unplaced:
    """A model that learns no position for text."""

    dit: DiTConfig
    patch_size: tuple[int, int, int] = (1, 1, 1)
    text_max_length: ClassVar[None] = None
    drops_tokens: ClassVar[bool] = False

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> PackedModel:
        return self.dit.build(token_size, text_vocab, text_dim)

    def work(self, token_size: int, text_dim: int | None) -> Work:
        return self.dit.work(token_size, text_dim)

    def activation_bytes(self, value_bytes: int, tokens: int, policy: CheckpointPolicy) -> None:
        return None


def test_captions_must_fit_the_positions_that_a_model_learns(assembly: Assembly) -> None:
    assert isinstance(assembly.model, DiTConfig)
    long = replace(assembly.text, max_tokens=1024, multiple_of=16)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"text.max_tokens=1024 is more than model.text_max_le"):
        replace(assembly, text=long).check()
    replace(assembly, text=long, model=Unplaced(assembly.model)).check()


def test_a_model_that_wants_all_tokens_is_given_them(assembly: Assembly) -> None:
    assert isinstance(assembly.model, DiTConfig)
    dropping = replace(assembly, data=replace(assembly.data, keep=((0, 0.5), (10, 1.0))))
    dropping.check()
    with pytest.raises(ValueError, match="wants all tokens of a clip"):
        replace(dropping, model=Unplaced(assembly.model)).check()


@dataclass(frozen=True)
class CaptioningConfig:
    """Trains something that no video can be sampled from."""

    averaged_over: ClassVar[AveragedOver] = "text_tokens"

    def build(self, token_std: Tensor) -> "CaptioningConfig":
        return self

    def draw(self, batch: PackedBatch, seed: int, step: int) -> Draw:
        raise NotImplementedError

    def loss(self, model: PackedModel, batch: PackedBatch, draw: Draw) -> Losses:
        raise NotImplementedError


def test_only_a_diffusion_objective_is_sampled_from(assembly: Assembly) -> None:
    model = assembly.build_model()
    assert assembly.denoiser(model).model is model
    with pytest.raises(ValueError, match="CaptioningConfig is none of diffusion"):
        replace(assembly, objective=CaptioningConfig()).denoiser(model)


def test_all_its_stores_are_tried_by_one_policy(tmp_path: Path, small_data: list[str]) -> None:
    line = Assembly.of(compose(["experiment=demo", *small_data])).with_retry(TRAINING)
    assert line.reader(line.data.shards).shards.retry == TRAINING
    run = Store(tmp_path / "run")
    parts = line.planner().pinned_manifest(run).load
    assert isinstance(parts, InStore)
    assert parts.store.retry == TRAINING
    assert pickle.loads(pickle.dumps(line)) == line
