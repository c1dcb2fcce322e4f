"""Both engines on real gloo ranks. This file is also the script that starts the ranks."""

import contextlib
import dataclasses
import math
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from framework.run.sharded_state import load_state, shapes_of
from framework.storage import Store
from framework.train.engine import zero
from framework.train.engine.optimizer import AdamWConfig, ParameterGroup
from framework.train.engine.plain import PlainConfig
from framework.train.engine.protocol import KINDS, Engine
from framework.train.engine.zero import Sizes, ZeroConfig, derive_sizes
from model_zoo.memory import training_memory

CPU = torch.device("cpu")
WIDTH, PACKS, STEPS, SAVED = 16, 4, 5, 3
GATES = ParameterGroup("blocks.*.gate", lr_scale=0.5, weight_decay=0.2)
OPTIMIZER = AdamWConfig(
    lr=1e-2,
    weight_decay=0.1,
    max_grad_norm=0.5,
    schedule="trapezoid",
    warmup_steps=2,
    groups=(GATES, ParameterGroup("embed.*", lr_scale=2.0)),
)
CONFIGS = {
    "plain": PlainConfig(ema_decay=0.9),
    "zero": ZeroConfig(ema_decay=0.9),
    "zero1": ZeroConfig(stage=1, ema_decay=0.9),
    "zero2": ZeroConfig(stage=2, ema_decay=0.9),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Three blocks, recomputed in the backward pass; `pair` is smaller than some world sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.pair = nn.Parameter(torch.randn(2))
        self.sometimes = nn.Parameter(torch.randn(3, 3))
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x: Tensor, with_sometimes: bool = False) -> Tensor:
        x = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        out = self.head(x) * self.scale[0] + self.pair.sum()
        return out + self.sometimes.sum() if with_sometimes else out


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def pack(step: int, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    x = torch.randn(7, 5, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def loss_of_step(engine: Engine, step: int, rank: int, world: int, factor: float = 1.0) -> float:
    """The backward passes of a step over this rank's share of PACKS packs; the step's loss."""
    total = torch.zeros((), dtype=torch.float64)
    for call in range(math.ceil(PACKS / world)):
        index = rank + call * world
        x, target = pack(step, index % PACKS)
        weight = float(index < PACKS)  # beyond the last pack: a dummy that bears no loss
        output = engine.model(x, step == 0)
        loss = weight * (output.float() - target).square().sum() / (7 * PACKS)
        engine.backward(factor * loss * world)
        total += loss.item()
    if world > 1:
        distributed.all_reduce(total)
    return total.item()


def train(engine: Engine, steps: range, rank: int, world: int) -> list[tuple[float, ...]]:
    """(loss, gradient norm, learning rate) of each step."""
    rows = []
    for step in steps:
        loss = loss_of_step(engine, step, rank, world)
        stats = engine.step()
        rows.append((loss, stats.grad_norm, stats.lr))
    return rows


# ------------------------------------------------------------------------- what a rank does


def build(kind: str, **changes: Any) -> Any:
    return dataclasses.replace(CONFIGS[kind], **changes).build(make_model, OPTIMIZER, STEPS, CPU)


def gradients(engine: Any) -> dict[str, Tensor]:
    """The step's averaged gradient, whole, before `step`; of stages 1 and 2 see `CaughtGradients`.

    These reduce it, or lay it out for the optimizer, only in `step`.
    """
    if hasattr(engine, "zero"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).clone() for name, p in engine.params.items()}
    found = {}
    for name, p in engine.params.items():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        distributed.all_reduce(found[name])
        found[name] /= engine.dp_size
    return found


class CaughtGradients:
    """What DeepSpeed gives to the optimizer of an engine of stage 1 or 2."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.flats: list[Tensor] = []
        engine.zero.optimizer.register_step_pre_hook(self.catch)

    def catch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self.flats += [flat.grad.clone() for flat in group["params"] if flat.numel()]

    def before_clipping(self, grad_norm: float) -> dict[str, Tensor]:
        """The last step's averaged gradient, whole."""
        found = {}
        for name, place in self.engine.stage.places.items():
            found[name] = torch.zeros(self.engine.numels[name])
            found[name][place.start : place.start + place.size] = place.of(self.flats)
            distributed.all_reduce(found[name])
            found[name] *= max(1, (grad_norm + 1e-6) / OPTIMIZER.max_grad_norm)
            found[name] = found[name].view(self.engine.shapes[name])
        self.flats.clear()
        return found


class Gate(Store):
    """A store that writes nothing before it is open."""

    def __init__(self, url: Path) -> None:
        super().__init__(url)
        self.is_open = threading.Event()

    def write(self, name: str, data: Any) -> None:
        assert self.is_open.wait(timeout=200)
        super().write(name, data)


def held(engine: Any) -> dict[str, int]:
    """Bytes that DeepSpeed keeps on this rank, by the names of `model_zoo.memory.Memory`."""
    flats = engine.stage.flats
    moments = [engine.zero.optimizer.state[flat][k] for flat in flats for k in KINDS[1:3]]
    found = {
        "weights": sum(getattr(p, "ds_tensor", p).nbytes for p in engine.params.values()),
        "optimizer": sum(tensor.nbytes for tensor in (*flats, *moments)),
        "ema": sum(piece.values.nbytes for piece in engine.state["ema"].values()),
    }
    if engine.config.stage == 3:
        found["gradients"] = engine.zero.grad_partitions_flat_buffer.nbytes
    return found


def refuses(action: Callable[[], Any], error: type[Exception] = AssertionError) -> bool:
    try:
        action()
    except error:
        return True
    return False


def job_train(rank: int, world: int, folder: Path) -> Any:
    """Train both engines and save on the way."""
    result: dict[str, Any] = {}
    for kind in CONFIGS:
        engine = build(kind)
        grads, rows, weights, emas = [], [], [engine.full_state()], [engine.full_state("ema")]
        norms, gate = [engine.weight_norm()], Gate(folder / f"{kind}-{world}-snapshot")
        caught = CaughtGradients(engine) if kind in ("zero1", "zero2") else None
        for step in range(STEPS):
            if step == SAVED:
                engine.save(Store(folder / f"{kind}-{world}"))
                writing = threading.Thread(target=engine.snapshot().write, args=(gate,))
                writing.start()  # and training goes on
            loss = loss_of_step(engine, step, rank, world)
            if step < 2 and caught is None:
                grads.append(gradients(engine))
            stats = engine.step()
            if caught is not None and step < 2:
                grads.append(caught.before_clipping(stats.grad_norm))
            rows.append((loss, stats.grad_norm, stats.lr))
            weights.append(engine.full_state())
            emas.append(engine.full_state("ema"))
            norms.append(engine.weight_norm())
        early = [refuses(engine.snapshot), refuses(partial(engine.save, gate))]
        gate.is_open.set()
        writing.join()
        engine.snapshot().write(Store(folder / f"{kind}-{world}-end"))
        result[kind] = {"grads": grads, "rows": rows, "weights": weights, "emas": emas}
        result[kind] |= {"norms": norms, "early": early}
    return result


def job_resume(rank: int, world: int, folder: Path) -> Any:
    """New processes take over from what `job_train` saved, on as many ranks."""
    result = {}
    for kind in CONFIGS:
        engine = build(kind)
        engine.load(Store(folder / f"{kind}-{world}"))
        rows = train(engine, range(SAVED, STEPS), rank, world)
        result[kind] = {
            "rows": rows,
            "weights": engine.full_state(),
            "ema": engine.full_state("ema"),
        }
        # Back in time, in the same process: no gathered copy of the weights may survive.
        engine.load(Store(folder / f"{kind}-{world}-snapshot"))
        result[kind]["snapshot"] = train(engine, range(SAVED, STEPS), rank, world)
    return result


def job_reshard(rank: int, world: int, folder: Path) -> Any:
    """Take over from two ranks of either engine with either engine on another number of ranks."""
    result = {}
    for saved in CONFIGS:
        for kind in CONFIGS:
            engine = build(kind)
            engine.load(Store(folder / f"{saved}-2"))
            engine.save(Store(folder / f"{saved}-2-{kind}-{world}"))
            result[saved, kind] = train(engine, range(SAVED, STEPS), rank, world)
    return result


def job_odd(rank: int, world: int, folder: Path) -> Any:
    """What should not happen, and bf16."""
    result: dict[str, Any] = {}
    offloads = ("optimizer", "all")
    for kind in (*CONFIGS, *offloads):
        engine = build("zero", offload=kind) if kind in offloads else build(kind)
        before = engine.full_state()
        loss_of_step(engine, 0, rank, world, factor=float("nan") if rank == 1 else 1.0)
        stats = engine.step()
        result[kind] = {"stats": stats.__dict__, "before": before, "after": engine.full_state()}
        result[kind]["rows"] = train(engine, range(1, 3), rank, world)
        before = engine.full_state()
        loss_of_step(engine, 3, rank, world)
        stats = engine.skip()
        result[kind]["skip"] = {"stats": stats.__dict__, "progress": dict(vars(engine.progress))}
        result[kind]["skip"] |= {"before": before, "after": engine.full_state()}
        result[kind]["rows"] += train(engine, range(4, 5), rank, world)
        if kind in offloads:
            engine.load(Store(folder / f"zero-{world}"))
            engine.save(Store(folder / f"{kind}-{world}"))
            result[kind]["resumed"] = train(engine, range(SAVED, STEPS), rank, world)
            result[kind]["weights"] = engine.full_state()
    for kind in ("plain", "zero"):
        engine = build(kind, ema_decay=0.0)
        train(engine, range(1), rank, world)
        engine.save(Store(folder / f"{kind}-no-ema"))
        result[kind]["no ema"] = engine.full_state("ema"), engine.full_state()
        engine.load(Store(folder / f"{kind}-{world}"))  # which has one
        averaging = build(kind)
        averaging.load(Store(folder / f"{kind}-no-ema"))
        result[kind]["new ema"] = averaging.full_state("ema")
    for stage in (1, 2, 3):
        result["held", stage, 4] = held(build("zero", stage=stage))
        bf16 = build("zero", stage=stage, dtype="bf16")
        result["held", stage, 2] = held(bf16)
        result["bf16", stage] = {"initial": bf16.full_state()}
        result["bf16", stage]["rows"] = train(bf16, range(STEPS), rank, world)
        result["bf16", stage]["dtype"] = str(next(bf16.model.parameters()).dtype)
        before = bf16.full_state()
        loss_of_step(bf16, 0, rank, world, factor=float("nan") if rank == 1 else 1.0)
        result["bf16", stage]["nan"] = bf16.step().grad_norm
        loss_of_step(bf16, 0, rank, world)
        bf16.skip()
        result["bf16", stage]["kept"] = all_equal(bf16.full_state(), before)
        loss_of_step(bf16, 1, rank, world)
        result["bf16", stage]["after"] = bf16.step().grad_norm
    result["stage 0"] = train(build("zero", stage=0), range(STEPS), rank, world)

    class Late(Model):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.head.weight)

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stems = nn.ModuleList(nn.Linear(5, 1) for _ in range(2))

        def forward(self, x: Tensor, with_sometimes: bool) -> Tensor:
            return self.stems[0](x) + self.stems[1](x)

    for name, model in (("late", Late), ("parallel", Parallel)):
        try:
            loss_of_step(ZeroConfig().build(model, AdamWConfig(), STEPS, CPU), 0, rank, world)
        except ValueError as error:
            result[name] = str(error)
    return result


JOBS = {"train": job_train, "resume": job_resume, "reshard": job_reshard, "odd": job_odd}
# Which jobs share processes, for a start takes longer than a job.
TOGETHER = {1: "train+reshard", 2: "train+odd", 3: "train+reshard", 4: "train"}


def main() -> None:
    """Import once, then fork the ranks; 0 where all of them ended well."""
    jobs, world, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_main, args=(jobs, rank, world, folder), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    while alive := [process.sentinel for process in ranks if process.is_alive()]:
        multiprocessing.connection.wait(alive)
        if any(p.exitcode not in (None, 0) for p in ranks):
            break  # the others would wait for it
    sys.exit(any(p.exitcode != 0 for p in ranks))


def rank_main(jobs: str, rank: int, world: int, folder: Path) -> None:
    log = os.open(folder / f"{jobs}-{world}-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    zero.UPDATED_AT_A_TIME = 500  # so that a small model is updated in portions, too
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous-{jobs}-{world}", rank=rank, world_size=world
    )
    for job in jobs.split("+"):
        torch.save(JOBS[job](rank, world, folder), folder / f"{job}-{world}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


# ------------------------------------------------------------------------------- the tests


class Ranks:
    """Runs each job once, in processes of its own, and keeps what rank 0 returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, job: str, world: int) -> Any:
        result = self.folder / f"{job}-{world}-0.pt"
        if not result.exists():
            if world != 2 or job == "resume":
                self.run("train", 2)  # saves what the others load
            self._start("resume" if job == "resume" else TOGETHER[world], world)
        return torch.load(result)

    def _start(self, jobs: str, world: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        environment["PYTHONPATH"] = str(Path(__file__).parents[3])
        process = subprocess.Popen(
            [sys.executable, __file__, jobs, str(world), str(self.folder)],
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=280)
        finally:
            with contextlib.suppress(ProcessLookupError):  # ranks that wait for one that is gone
                os.killpg(process.pid, signal.SIGKILL)
        logs = self.folder.glob(f"{jobs}-{world}-*.log")
        assert code == 0, "\n".join(log.read_text()[-3000:] for log in logs)

    def saved(self, name: str) -> dict[str, Tensor]:
        """All tensors of a saved state, whole."""
        model = make_model()
        state = {
            f"{k}.{n}": torch.empty(p.numel()) for k in KINDS for n, p in model.named_parameters()
        }
        state |= {"progress": torch.empty(2, dtype=torch.int64), "buffers.scale": torch.empty(3)}
        load_state(state, shapes_of(model), Store(self.folder / name), alone=True)
        return state


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float = 1e-6) -> float:
    """The largest relative L2 distance of a tensor, above a floor for what is zero anyway."""
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=floor)).item()
        for name in theirs
    )


def all_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def assert_rows_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_zero_agrees_with_the_oracle_on_any_number_of_ranks(ranks: Ranks, world: int) -> None:
    # 4 packs a step: 1 x 4, 2 x 2 and 4 x 1 (ranks x calls), and 3 ranks with dummies.
    oracle, found = ranks.run("train", 1)["plain"], ranks.run("train", world)
    for kind in CONFIGS:
        assert all_equal(found[kind]["weights"][0], oracle["weights"][0])
        for ours, theirs in zip(found[kind]["grads"], oracle["grads"], strict=True):
            assert distance(ours, theirs) <= 1e-5
        assert_rows_close(found[kind]["rows"], oracle["rows"])
        assert distance(found[kind]["weights"][-1], oracle["weights"][-1]) <= 1e-5
        assert distance(found[kind]["emas"][-1], oracle["emas"][-1]) <= 1e-5


def test_clipping_binds_and_a_parameter_without_gradient_gets_none(ranks: Ranks) -> None:
    found = ranks.run("train", 1)
    for kind in CONFIGS:
        assert all(norm > 4 * OPTIMIZER.max_grad_norm for _, norm, _ in found[kind]["rows"])
        assert found[kind]["grads"][0]["sometimes"].norm() > 0
        assert found[kind]["grads"][1]["sometimes"].norm() == 0


@pytest.mark.parametrize("world", [1, 2])
def test_ema_is_the_one_computed_by_hand(ranks: Ranks, world: int) -> None:
    found = ranks.run("train", world)
    for kind in CONFIGS:
        weights, emas = found[kind]["weights"], found[kind]["emas"]
        assert all_equal(emas[0], weights[0])
        for name in weights[0]:
            ema = weights[0][name]
            for step in range(STEPS):
                decay = min(0.9, (1 + step) / (10 + step))
                ema = decay * ema + (1 - decay) * weights[step + 1][name]
                torch.testing.assert_close(emas[step + 1][name], ema, rtol=1e-6, atol=1e-7)


def test_without_ema_the_weights_stand_for_it(ranks: Ranks) -> None:
    found = ranks.run("odd", 2)
    for kind in ("plain", "zero"):
        ema, weights = found[kind]["no ema"]
        assert all_equal(ema, weights)
        assert all_equal(found[kind]["new ema"], weights)
        index = (ranks.folder / f"{kind}-no-ema/state/index.json").read_text()
        assert '"weights.pair"' in index
        assert '"ema.' not in index


def test_resume_is_equal_to_the_bit_to_never_stopping(ranks: Ranks) -> None:
    whole, resumed = ranks.run("train", 2), ranks.run("resume", 2)
    for kind in CONFIGS:
        assert resumed[kind]["rows"] == whole[kind]["rows"][SAVED:]
        assert all_equal(resumed[kind]["weights"], whole[kind]["weights"][-1])
        assert all_equal(resumed[kind]["ema"], whole[kind]["emas"][-1])


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_either_engine_takes_over_from_either_on_another_number_of_ranks(
    ranks: Ranks, world: int
) -> None:
    whole, resharded = ranks.run("train", 2), ranks.run("reshard", world)
    for saved in CONFIGS:
        before = ranks.saved(f"{saved}-2")
        assert before["progress"].tolist() == [SAVED, SAVED]
        assert before["exp_avg_sq.head.weight"].norm() > 0
        for kind in CONFIGS:
            assert all_equal(ranks.saved(f"{saved}-2-{kind}-{world}"), before)
            assert_rows_close(resharded[saved, kind], whole[saved]["rows"][SAVED:])


def test_each_rank_writes_its_part_of_each_tensor(ranks: Ranks) -> None:
    ranks.run("train", 2)
    for kind in CONFIGS:
        sizes = [
            (ranks.folder / f"{kind}-2/state/rank-{rank:05d}-000.bin").stat().st_size
            for rank in range(2)
        ]
        total = 4 * len(KINDS) * sum(p.numel() for p in make_model().parameters()) + 16 + 12
        assert sum(sizes) == total  # nothing twice
        assert min(sizes) > 0.4 * total


@pytest.mark.parametrize("world", WORLDS[:3])
def test_a_snapshot_is_of_its_step_however_long_it_takes_to_write(ranks: Ranks, world: int) -> None:
    found = ranks.run("train", world)
    for kind in CONFIGS:
        assert all_equal(ranks.saved(f"{kind}-{world}-snapshot"), ranks.saved(f"{kind}-{world}"))
        assert found[kind]["early"] == [True, True]
        end = ranks.saved(f"{kind}-{world}-end")  # the second, in the buffers of the first
        for name, weight in found[kind]["weights"][-1].items():
            assert torch.equal(end[f"weights.{name}"], weight.view(-1))
        assert end["progress"].tolist() == [STEPS, STEPS]


def test_training_through_a_save_is_equal_to_the_bit_to_training_from_it(ranks: Ranks) -> None:
    through, resumed = ranks.run("train", 2), ranks.run("resume", 2)
    for kind in CONFIGS:
        assert resumed[kind]["snapshot"] == through[kind]["rows"][SAVED:]


def test_weight_norm_is_that_of_all_weights_as_one_vector(ranks: Ranks) -> None:
    found = ranks.run("train", 2)
    for kind in CONFIGS:
        for norm, weights in zip(found[kind]["norms"], found[kind]["weights"], strict=True):
            vector = torch.cat([w.double().view(-1) for w in weights.values()])
            assert norm == pytest.approx(vector.norm().item(), rel=1e-6)


def test_a_skipped_step_counts_and_leaves_no_gradient(ranks: Ranks) -> None:
    found = ranks.run("odd", 2)
    for kind in CONFIGS:
        skip = found[kind]["skip"]
        assert math.isnan(skip["stats"]["grad_norm"])
        assert skip["stats"]["lr"] == OPTIMIZER.lr_at(3, STEPS)
        assert skip["progress"] == {"steps": 4, "updates": 2}
        assert all_equal(skip["after"], skip["before"])
        assert_rows_close(found[kind]["rows"], found["plain"]["rows"])  # the last is of step 4


def test_a_step_that_is_not_a_number_changes_nothing(ranks: Ranks) -> None:
    found = ranks.run("odd", 2)
    for kind in CONFIGS:
        assert found[kind]["stats"] == {"grad_norm": math.inf, "lr": OPTIMIZER.lr_at(0, STEPS)}
        assert all_equal(found[kind]["after"], found[kind]["before"])
        assert all(math.isfinite(norm) for _, norm, _ in found[kind]["rows"])
        assert_rows_close(found[kind]["rows"], found["plain"]["rows"])


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloading_changes_nothing_but_where_things_are(ranks: Ranks, offload: str) -> None:
    found, whole = ranks.run("odd", 2), ranks.run("train", 2)["zero"]
    assert all_equal(found[offload]["after"], found[offload]["before"])  # not a number
    assert all_equal(found[offload]["skip"]["after"], found[offload]["skip"]["before"])
    assert_rows_close(found[offload]["rows"], found["zero"]["rows"])
    assert all_equal(ranks.saved(f"{offload}-2"), ranks.saved("zero-2"))
    assert_rows_close(found[offload]["resumed"], whole["rows"][SAVED:])
    assert distance(found[offload]["weights"], whole["weights"][-1]) <= 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_float32_master_weights(ranks: Ranks, stage: int) -> None:
    found, oracle = ranks.run("odd", 2)["bf16", stage], ranks.run("train", 2)["plain"]
    assert found["dtype"] == "torch.bfloat16"
    assert all_equal(found["initial"], oracle["weights"][0])
    losses = torch.tensor(found["rows"])[:, 0] / torch.tensor(oracle["rows"])[:, 0]
    # bf16 has 8 bits of mantissa; five steps of a small model drift by a few per cent.
    torch.testing.assert_close(losses, torch.ones(STEPS), rtol=0, atol=0.1)
    assert found["nan"] == math.inf
    assert found["kept"]
    assert math.isfinite(found["after"])


@pytest.mark.parametrize("value_bytes", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_holds_what_an_estimate_says(ranks: Ranks, stage: int, value_bytes: int) -> None:
    numel = sum(p.numel() for p in make_model().parameters())
    formula = training_memory(numel, stage, 2, value_bytes)
    for name, size in ranks.run("odd", 2)["held", stage, value_bytes].items():
        assert size == pytest.approx(getattr(formula, name), rel=0.03), name  # padding


def test_stage_0_is_the_plain_engine(ranks: Ranks) -> None:
    assert ranks.run("odd", 2)["stage 0"] == ranks.run("train", 2)["plain"]["rows"]


def test_zero_refuses_what_it_would_get_wrong_in_silence(ranks: Ranks) -> None:
    found = ranks.run("odd", 2)
    assert "(zero_) after the constructor of its own module" in found["late"]
    assert "no argument of it needs a gradient" in found["parallel"]


def test_zero_wants_a_process_group() -> None:
    with pytest.raises(ValueError, match="process group"):
        ZeroConfig().build(make_model, OPTIMIZER, STEPS, CPU)


def test_plain_without_a_process_group_is_adamw(tmp_path: Path) -> None:
    engine = build("plain")
    rows = train(engine, range(STEPS), 0, 1)
    model = make_model()
    adam = torch.optim.AdamW(
        [{"params": [p]} for p in model.parameters()], betas=OPTIMIZER.betas, weight_decay=0
    )
    for step in range(STEPS):
        for index in range(PACKS):
            x, target = pack(step, index)
            loss = (model(x, step == 0) - target).square().sum() / (7 * PACKS)
            loss.backward()
        if model.sometimes.grad is None:
            model.sometimes.grad = torch.zeros(3, 3)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        assert norm.item() == pytest.approx(rows[step][1], rel=1e-5)
        lr = OPTIMIZER.lr_at(step, STEPS)
        with torch.no_grad():
            for (name, p), group in zip(model.named_parameters(), adam.param_groups, strict=True):
                decay = OPTIMIZER.weight_decay * (p.dim() > 1)
                group["lr"] = lr
                if name.startswith("embed."):
                    group["lr"] = 2 * lr
                if name.endswith(".gate"):
                    group["lr"], decay = lr / 2, GATES.weight_decay
                p.mul_(1 - group["lr"] * decay)
        adam.step()
        adam.zero_grad()
    assert distance(engine.full_state(), dict(model.named_parameters())) <= 1e-5

    engine.save(Store(tmp_path))
    other = build("plain")
    other.load(Store(tmp_path))
    assert all_equal(other.full_state("ema"), engine.full_state("ema"))


def test_sizes_follow_from_the_model() -> None:
    config = ZeroConfig()
    assert derive_sizes(config, 2_000_000, 150_000) == Sizes(2_000_000, 2_000_000, 2_000_000)
    large = derive_sizes(config, 14_000_000_000, 340_000_000)
    assert large == Sizes(50_000_000, 340_000_000, 1_000_000_000)
    huge = derive_sizes(config, 90_000_000_000, 900_000_000)
    assert huge.live == 1_800_000_000
    given = ZeroConfig(bucket_numel=1000, max_live_numel=5000)
    assert derive_sizes(given, 2_000_000, 150_000) == Sizes(1000, 1000, 5000)


def test_configs_refuse_nonsense() -> None:
    for config in (PlainConfig, ZeroConfig):
        with pytest.raises(ValueError, match="dtype='fp8' must be one of fp32, bf16"):
            config(dtype="fp8")
        with pytest.raises(ValueError, match="ema_decay"):
            config(ema_decay=1.0)
    with pytest.raises(ValueError, match="stage=4 must be one of"):
        ZeroConfig(stage=4)
    with pytest.raises(ValueError, match="offload='disk' must be one of none, optimizer, all"):
        ZeroConfig(offload="disk")
    with pytest.raises(ValueError, match="offload='all' wants stage=3"):
        ZeroConfig(stage=2, offload="all")
    with pytest.raises(ValueError, match="bucket_numel"):
        ZeroConfig(bucket_numel=0)


if __name__ == "__main__":
    main()
