"""A pixel autoencoder of a team's own, trained by the same loop, engine, resume and ledger.

It is no diffusion: no noise level, no text, and its loss is averaged over pixels. It lies in a
package outside of Longtake, of which nothing is touched.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.data.plan.store import Plan
from framework.run.checkpoint import Checkpoints
from framework.run.ledger import read_ledger
from framework.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

AUTOENCODER = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from framework.objectives.objective import Losses
from framework.seeding import draws
from model_zoo.checkpointing import PackedModel
from model_zoo.flops import Work
from model_zoo.layers import Linear


@dataclass(frozen=True)
class AutoencoderConfig:
    """A token of pixels through a narrow layer and back."""

    hidden_size: int = 8
    patch_size: tuple[int, int, int] = (1, 8, 8)
    text_max_length: ClassVar[None] = None
    drops_tokens: ClassVar[bool] = True

    def build(self, token_size, text_vocab, text_dim):
        return Autoencoder(token_size, self.hidden_size)

    def work(self, token_size, text_dim):
        return Work(video_weights=2 * token_size * self.hidden_size)

    def activation_bytes(self, value_bytes, tokens, policy):
        return None


class Autoencoder(PackedModel):
    def __init__(self, token_size, hidden_size):
        super().__init__()
        self.encode, self.decode = Linear(token_size, hidden_size), Linear(hidden_size, token_size)

    def forward(self, tokens):
        return self.decode(self.encode(tokens).tanh())


@dataclass(frozen=True)
class ReconstructionConfig:
    noise: float = 0.1

    def build(self, token_std):
        return Reconstruction(self.noise)


@dataclass(frozen=True)
class Reconstruction:
    noise: float
    averaged_over: ClassVar[str] = "pixels"

    def draw(self, batch, seed, step):
        """Noise on the inputs, less of it in later steps."""
        values = draws(seed, step, batch.pack, "autoencoder").normal(batch.tokens.numel())
        return torch.from_numpy(values).view(batch.tokens.shape) * self.noise / (1 + step)

    def loss(self, model, batch, draw: Tensor):
        error = (model(batch.tokens + draw) - batch.tokens).square().sum(dim=1) / 3  # by pixel
        sums = torch.zeros(batch.num_segments).index_add(
            0, batch.segment_ids, error * batch.loss_mask
        )
        pixels = 64 * batch.loss_mask.double().sum()
        parts = torch.stack([sums.detach().double().sum(), pixels])
        return Losses(sums, {"loss/reconstruction": parts})
'''
STEPS = 12


@pytest.fixture
def line(tmp_path: Path, small_data: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    package = tmp_path / "our_team"
    (package / "conf/model").mkdir(parents=True)
    (package / "conf/objective").mkdir()
    (package / "__init__.py").touch()
    (package / "autoencoder.py").write_text(AUTOENCODER)
    for group, name, kind in (
        ("model", "autoencoder", "AutoencoderConfig"),
        ("objective", "reconstruction", "ReconstructionConfig"),
    ):
        target = f"_target_: our_team.autoencoder.{kind}\n"
        (package / "conf" / group / f"{name}.yaml").write_text(target)
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *([path] if path else [])]))
    return [
        *small_data,
        *("packages=our_team", "model=autoencoder", "objective=reconstruction", "codec=identity"),
        *("data.max_tokens=256", "data.views.frames=[8]", "tracking=none"),
        *("optimizer.lr=1e-2", "optimizer.warmup_steps=1"),
        *(f"train.steps={STEPS}", "train.checkpoint_every=4", "train.log_every=2"),
        *("train.deterministic=true", "cluster.num_cpus=3", f"run.root={tmp_path}/runs"),
    ]


def test_an_objective_of_another_kind_touches_nothing_else(
    line: list[str],
    tmp_path: Path,
    start: Callable[..., "object"],
    finish: Callable[..., str],
    wait_for_commit: Callable[..., int],
) -> None:
    assert "autoencoder" not in finish("framework.train", *line, "estimate=true")
    finish("framework.train", *line, "run.name=straight")
    straight = Store(tmp_path / "runs/straight")
    expected = read_ledger(straight)
    assert sorted(expected) == list(range(STEPS))
    losses = [expected[step]["loss"] for step in sorted(expected)]
    assert losses[-1] < losses[0] / 2

    # The first loss by hand would be the mean square of pixels; it is of one pixel, so of order 1.
    assert 0.01 < losses[0] < 3.0
    latest = Checkpoints(straight.child("checkpoints")).latest()
    assert latest is not None
    assert latest.meta["config"]["objective.kind"] == "reconstruction"
    plan = Plan(straight, latest.meta["plan_digest"])
    assert plan.totals(0, 0).averaged_over("pixels") > plan.totals(0, 0).tokens

    command = [*line, "run.name=killed"]
    process = start("framework.train", *command)
    killed = Store(tmp_path / "runs/killed")
    wait_for_commit(process, killed)
    os.killpg(process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    finish("framework.train", *command)
    assert read_ledger(killed) == expected
