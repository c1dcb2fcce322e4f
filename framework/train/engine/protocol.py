"""What a training engine is, and the little that both engines share.

One optimizer step is any number of `backward` calls, the same on every rank, and one `step`.
Gradients are averaged over ranks and summed over the calls, so that a caller passes
`local_sum * dp_size / N` and nothing else scales it.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

from framework.storage import Store
from framework.train.engine.snapshot import Snapshot
from model_zoo.memory import Memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What is kept of each parameter, in float32. A checkpoint holds it as `<kind>.<parameter name>`.
# With ema_decay=0 there is no "ema": nothing is kept, and the weights stand for it.
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step was.

    `grad_norm`: L2 norm of the averaged gradient before clipping; infinite where it was not a
    number, and then nothing was updated; nan where nobody asked, after `skip`. `lr`: the schedule's
    learning rate of the step.
    """

    grad_norm: float
    lr: float


class Engine(Protocol):
    """A model in training on one rank. Every rank makes the same calls in the same order.

    `group` is the checkpoint's own process group; None where there is one process alone.
    """

    group: distributed.ProcessGroup | None

    @property
    def model(self) -> nn.Module:
        """What the objective calls; its outputs may go to `backward`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar `loss`, averaged over the ranks, to that of the step."""
        ...

    def step(self) -> StepStats:
        """Clip, update weights and EMA at this step's learning rate, forget the gradient."""
        ...

    def skip(self) -> StepStats:
        """Instead of `step`: count the step and forget its gradient, without an update."""
        ...

    def snapshot(self) -> Snapshot:
        """Copy the whole training state to the CPU; its `write` may go on beside training.

        Each rank calls `write` once, from any thread. Before all of it is written there is no
        second snapshot, no `save` and no `load`: AssertionError.
        """
        ...

    def save(self, store: Store) -> None:
        """What `snapshot().write(store)` does, without the copy."""
        ...

    def load(self, store: Store) -> None:
        """Take the training state from a checkpoint's folder, whoever wrote it."""
        ...

    def full_state(self, which: str = "weights") -> dict[str, Tensor]:
        """The float32 "weights" or their "ema", whole, on the CPU of rank 0; empty elsewhere.

        The weights in any case where no EMA is kept.
        """
        ...

    def weight_norm(self) -> float:
        """L2 norm of all float32 weights as one vector, on every rank."""
        ...


class OptimizerConfig(Protocol):
    """What an engine wants of the config of an optimizer: AdamW's state and its own schedule."""

    @property
    def max_grad_norm(self) -> float:
        """L2 norm over all gradients to clip to; 0 means no clipping."""

    def lr_at(self, step: int, num_steps: int) -> float:
        """The learning rate of step `step` (from 0) of a run of `num_steps` steps."""
        ...

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
        """The optimizer; each of its groups has an `lr_scale`."""
        ...


class EngineConfig(Protocol):
    """What a run wants of the config of an engine of any kind."""

    @property
    def dtype(self) -> str:
        """One of DTYPES: what the model computes in."""

    @property
    def ema_decay(self) -> float:
        """Of the moving average of the weights; 0 keeps none."""

    def build(
        self,
        model_factory: Callable[[], nn.Module],
        optimizer: OptimizerConfig,
        num_steps: int,
        device: torch.device,
    ) -> Engine:
        """The engine at step 0 of `num_steps`; `model_factory` seeds itself, builds on the CPU."""
        ...

    def memory(
        self, num_parameters: int, largest_block: int, num_ranks: int, activations: int
    ) -> Memory:
        """Bytes on one of `num_ranks` GPUs; nothing is built.

        `largest_block`: values of the largest block. `activations`: bytes of a pack, 0 where they
        are not known.
        """
        ...


@dataclass
class Progress:
    """How far the engine is; `steps` sets the learning rate, `updates` the EMA's ramp."""

    steps: int = 0  # calls of step()
    updates: int = 0  # those of them that changed the weights

    def as_tensor(self) -> Tensor:
        """(2,) int64."""
        return torch.tensor([self.steps, self.updates])

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Progress":
        """The reverse of `as_tensor`."""
        steps, updates = tensor.tolist()
        return cls(steps, updates)


def create_adam_state(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Give AdamW the state that its first step would make, so that there is one to load into."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }


def checkpoint_group() -> distributed.ProcessGroup | None:
    """A process group for the checkpoint's own collectives; None where the default one will do.

    It works on the CPU, and apart from training's, whose collectives it must not be mixed up with.
    """
    if not distributed.is_initialized():
        return None
    return distributed.new_group(backend="gloo")


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """() float64: the squares of all values, added up."""
    return torch.nn.utils.get_total_norm(tensors).double().square()


def silence_renamed_collectives() -> None:
    """torch 2.13 renames collectives and warns at each call; libraries still use the old names."""
    warnings.filterwarnings("ignore", r".*torch\.distributed\..*is deprecated", FutureWarning)
