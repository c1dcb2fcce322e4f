"""The Engine in plain torch: every rank holds everything. The oracle that ZeRO-3 is held against.

Gradients are summed locally over the calls of `backward` and averaged over the ranks at `step`, in
one all-reduce. With one rank no process group is needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from framework.run.sharded_state import load_state, persistent_buffers, save_state, shapes_of
from framework.storage import Store
from framework.train.engine.ema import check_decay, update_ema
from framework.train.engine.optimizer import set_lr
from framework.train.engine.protocol import (
    DTYPES,
    OptimizerConfig,
    Progress,
    StepStats,
    checkpoint_group,
    create_adam_state,
    sum_of_squares,
)
from framework.train.engine.snapshot import Snapshot
from model_zoo.memory import Memory, training_memory


@dataclass(frozen=True)
class PlainConfig:
    """Options of `PlainEngine`. `dtype` is that of autocast; weights stay float32.

    `ema_decay`: 0 keeps no average, and no memory for one.
    """

    dtype: str = "fp32"
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        check_decay(self.ema_decay)

    def build(
        self,
        model_factory: Callable[[], nn.Module],
        optimizer: OptimizerConfig,
        num_steps: int,
        device: torch.device,
    ) -> "PlainEngine":
        """The engine at step 0 of `num_steps`; `model_factory` seeds itself, builds on the CPU."""
        return PlainEngine(self, model_factory().to(device), optimizer, num_steps)

    def memory(
        self, num_parameters: int, largest_block: int, num_ranks: int, activations: int
    ) -> Memory:
        """As on one rank, whatever their number."""
        return training_memory(
            num_parameters,
            0,
            num_ranks,
            DTYPES[self.dtype].itemsize,
            activations,
            has_ema=self.ema_decay > 0,
        )


class PlainEngine:
    """See `framework.train.engine.protocol.Engine`."""

    def __init__(
        self, config: PlainConfig, model: nn.Module, optimizer: OptimizerConfig, num_steps: int
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer_config = optimizer
        self.num_steps = num_steps
        self.progress = Progress()
        self.group = checkpoint_group()  # for collectives of `save` and `load`
        self.dp_size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.shapes = shapes_of(model)
        self._snapshot = Snapshot(self.shapes, self.group)
        self.params = dict(model.named_parameters())
        if self.dp_size > 1:
            for parameter in self.params.values():
                distributed.broadcast(parameter.detach(), 0)
        self.optimizer = optimizer.build(self.params.items())
        create_adam_state(self.optimizer, list(self.params.values()))
        self.ema = (
            {n: p.detach().clone() for n, p in self.params.items()} if config.ema_decay else {}
        )
        if config.dtype != "fp32":
            device = next(iter(self.params.values())).device
            autocast = torch.autocast(device.type, DTYPES[config.dtype])
            model.forward = autocast(model.forward)

    def backward(self, loss: Tensor) -> None:
        """Add to the local gradient."""
        loss.backward()

    def step(self) -> StepStats:
        """Average the gradient over ranks, clip it, update weights and EMA."""
        config = self.optimizer_config
        lr = config.lr_at(self.progress.steps, self.num_steps)
        parameters = list(self.params.values())
        for parameter in parameters:
            if parameter.grad is None:  # took no part: a zero gradient, as ZeRO-3 has it
                parameter.grad = torch.zeros_like(parameter)
        self._average_gradients([p.grad for p in parameters if p.grad is not None])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if torch.isfinite(norm):
            if config.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            if self.ema:
                update_ema(
                    list(self.ema.values()),
                    [p.detach() for p in parameters],
                    self.config.ema_decay,
                    self.progress.updates,
                )
            self.progress.updates += 1
        self.optimizer.zero_grad()
        self.progress.steps += 1
        return StepStats(float(norm) if torch.isfinite(norm) else float("inf"), lr)

    def skip(self) -> StepStats:
        """The rate of the step that was not made, and no norm: it would cost the all-reduce."""
        self.optimizer.zero_grad()
        lr = self.optimizer_config.lr_at(self.progress.steps, self.num_steps)
        self.progress.steps += 1
        return StepStats(math.nan, lr)

    def _average_gradients(self, grads: list[Tensor]) -> None:
        if self.dp_size == 1:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads]) / self.dp_size
        distributed.all_reduce(flat)
        for grad, average in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(average.view_as(grad))

    def snapshot(self) -> Snapshot:
        """Every rank copies everything; when it is written, they share the tensors out."""
        return self._snapshot.take(self._state(self.progress.as_tensor()))

    def save(self, store: Store) -> None:
        """Write the state once, whatever the number of ranks: they share the tensors out."""
        self._snapshot.check_written()
        save_state(self._state(self.progress.as_tensor()), self.shapes, store, self.group)

    def load(self, store: Store) -> None:
        """Every rank reads everything."""
        self._snapshot.check_written()
        progress = self.progress.as_tensor()
        load_state(self._state(progress), self.shapes, store, self.group)
        self.progress = Progress.from_tensor(progress)
        for parameter in self.params.values():
            self.optimizer.state[parameter]["step"].fill_(self.progress.updates)

    def full_state(self, which: str = "weights") -> dict[str, Tensor]:
        """Copies of the weights or the EMA, on rank 0."""
        if self.dp_size > 1 and distributed.get_rank() > 0:
            return {}
        weights = {n: p.detach() for n, p in self.params.items()}
        kept = self.ema if which == "ema" and self.ema else weights
        return {name: tensor.cpu().clone() for name, tensor in kept.items()}

    def weight_norm(self) -> float:
        """Without communication: every rank holds all weights."""
        return sum_of_squares([p.detach() for p in self.params.values()]).sqrt().item()

    def _state(self, progress: Tensor) -> dict[str, Tensor]:
        state = {"progress": progress}
        for name, p in self.params.items():
            adam = self.optimizer.state[p]
            state[f"weights.{name}"] = p.detach()
            state[f"exp_avg.{name}"] = adam["exp_avg"]
            state[f"exp_avg_sq.{name}"] = adam["exp_avg_sq"]
        state |= {f"ema.{name}": ema for name, ema in self.ema.items()}
        state |= persistent_buffers(self.model)
        return {name: tensor.view(-1) for name, tensor in state.items()}
