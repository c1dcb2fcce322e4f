"""The gradient of a step is the same however its packs are dealt out to ranks and calls."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.assembly import Assembly
from framework.batch import PackedBatch
from framework.config import compose
from framework.data.plan.recipe import Recipe
from framework.objectives.objective import Draw, Objective
from framework.train.engine.protocol import StepStats
from framework.train.loop import StepInput, StepOutput, train
from framework.train.rank.largest_packs import largest_packs

LINE = (
    "experiment=demo",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.ffn=64",
    "model.depth=2",
    "data.max_tokens=192",
)
PACKS = 4


class Collecting:
    """One rank's engine, which keeps its gradient; the ranks' mean is the step's."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps, self.skips = model, 0, 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepStats:
        self.steps += 1
        return StepStats(1.0, 0.1)

    def skip(self) -> StepStats:
        self.skips += 1
        return StepStats(math.nan, 0.1)


class Line:
    """A model, an objective, and the packs of one step."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        config = compose([*LINE, *overrides])
        self.assembly = Assembly.of(config)
        self.objective: Objective = self.assembly.build_objective()
        recipe: Recipe = self.assembly.recipe()
        packs = largest_packs(recipe, self.assembly.reader(str(folder)), 64)
        generator = torch.Generator().manual_seed(0)
        self.packs = []
        for index in range(PACKS):
            pack = packs[index % len(packs)]
            has_clip = pack.clip_ids >= 0
            tokens = torch.randn(pack.tokens.shape, generator=generator)
            ids = torch.where(has_clip, pack.clip_ids + 1000 * index, pack.clip_ids)
            self.packs.append(replace(pack, tokens=tokens, clip_ids=ids, pack=index))
        self.loss_tokens = int(sum(p.loss_mask.sum().item() for p in self.packs))

    def spoil(self, change: Callable[[PackedBatch], PackedBatch]) -> None:
        """Change the first pack; the planned number of tokens stays."""
        self.packs[0] = change(self.packs[0])

    def share(self, rank: int, world: int) -> list[tuple[PackedBatch, Draw]]:
        """Packs r, r + W, …, and a dummy where W does not divide their number."""
        share = []
        for call in range(math.ceil(PACKS / world)):
            index = rank + call * world
            pack = self.packs[index % PACKS]
            if index >= PACKS:
                pack = replace(pack, clip_weights=torch.zeros_like(pack.clip_weights))
            share.append((pack, self.objective.draw(pack, seed=0, step=0)))
        return share

    def gradient(self, world: int) -> tuple[dict[str, Tensor], float]:
        """Of a step on so many ranks, one after the other; and its loss."""
        model, losses = self.assembly.build_model(), []
        with torch.no_grad():  # what starts at zero hides the gradients of the rest
            for parameter in model.parameters():
                parameter += 0.02
        for rank in range(world):
            inputs = StepInput(0, 0, 0, self.loss_tokens, 0, self.share(rank, world))
            outputs: list[StepOutput] = []
            train(
                Collecting(model),  # type: ignore[arg-type]
                self.objective,
                [inputs],
                lambda inputs, loss: (loss.item(), ""),
                lambda output, outputs=outputs: outputs.append(output) is None,  # type: ignore[misc]
                dp_size=world,
                device=torch.device("cpu"),
            )
            losses.append(outputs[0].loss)
        grads = {n: p.grad / world for n, p in model.named_parameters() if p.grad is not None}
        return grads, sum(losses)


def given(pack: PackedBatch) -> PackedBatch:
    mask = torch.zeros_like(pack.given_mask)
    mask[: int(pack.cu_seqlens[1]) // 2] = True
    return replace(pack, given_mask=mask)


def failed(pack: PackedBatch) -> PackedBatch:
    weights = pack.clip_weights.clone()
    weights[0] = 0.0
    return replace(pack, clip_weights=weights)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("overrides", "change"),
    [([], None), ([], given), ([], failed), (["data.keep=[[0,0.5]]"], None)],
    ids=["whole", "given frames", "a failed clip", "dropped tokens"],
)
def test_a_step_does_not_know_the_cluster(
    tmp_path: Path, world: int, overrides: list[str], change: Any
) -> None:
    line = Line(overrides, tmp_path)
    if change is not None:
        line.spoil(change)
    expected, loss = line.gradient(1)
    found, loss_found = line.gradient(world)
    assert loss_found == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for name, grad in expected.items():
        difference = float((found[name] - grad).norm())
        assert difference <= 1e-5 * float(grad.norm()) + 1e-7 * largest, name


def test_steps_are_skipped_as_told(tmp_path: Path) -> None:
    line = Line([], tmp_path)
    engine = Collecting(line.assembly.build_model())
    steps = [
        StepInput(n, 0, n, line.loss_tokens, 0, line.share(0, 1), leave_out=n == 1)
        for n in range(4)
    ]
    outputs: list[StepOutput] = []

    def before(inputs: StepInput, loss_share: Tensor) -> tuple[float, str]:
        if inputs.leave_out:
            assert loss_share == 0.0
            return math.nan, "rolled back"
        return loss_share.item(), "spike" if inputs.step == 2 else ""

    def after(output: StepOutput) -> bool:
        outputs.append(output)
        return True

    train(
        engine,  # type: ignore[arg-type]
        line.objective,
        steps,
        before,
        after,
        dp_size=1,
        device=torch.device("cpu"),
    )
    assert [output.skipped for output in outputs] == ["", "rolled back", "spike", ""]
    assert (engine.steps, engine.skips) == (2, 2)
    assert [len(output.losses) for output in outputs] == [PACKS, 0, PACKS, PACKS]
