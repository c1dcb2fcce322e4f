"""The Engine on DeepSpeed's ZeRO (Rajbhandari et al. 2020), in its stages:

0  every rank holds everything: the plain engine
1  Adam's moments and the float32 weights are cut over the ranks
2  gradients as well
3  weights as well, which are gathered as the model comes to them

This module and deepspeed_patches.py alone import DeepSpeed, at the first `build`: reading a config
does not.
We take its partitioning and nothing else: not its optimizers, schedulers, checkpoints or losses'
scaling. A checkpoint is of pieces of tensors and does not tell who wrote it: any stage on any
number of ranks takes over from any other.

Measured for stage 3 on two gloo ranks of one thread, in milliseconds of CPU time a step: a
1.8 M parameter transformer of 113 tensors takes 214 in plain torch, 304 with DeepSpeed's defaults,
239 with ours; the demo's DiT (2.2 M in 171 tensors, 768 tokens) 200 in plain torch, 260 with ours.
What made the difference, and what is left is Python that DeepSpeed runs for each module and each
tensor:
- blocks as leaf modules: hooks for a block, not for each of its layers (-20);
- no persistent parameters: DeepSpeed gathers each of those by a collective of its own at every
  step, but all others in as few as the bucket holds (-30, and a hundred round trips);
- `reduce_scatter: false` on gloo: one all-reduce of a contiguous buffer.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode

from framework.mapping import free
from framework.run.sharded_state import Piece, load_state, persistent_buffers, save_state, shapes_of
from framework.storage import Store
from framework.train.engine import deepspeed_patches
from framework.train.engine.ema import check_decay, update_ema
from framework.train.engine.optimizer import set_lr
from framework.train.engine.plain import PlainConfig, PlainEngine
from framework.train.engine.protocol import (
    DTYPES,
    OptimizerConfig,
    Progress,
    StepStats,
    checkpoint_group,
    create_adam_state,
    silence_renamed_collectives,
    sum_of_squares,
)
from framework.train.engine.snapshot import Snapshot
from framework.train.engine.zero_stages import Stage, Stage1And2, Stage3, check_parts
from model_zoo.memory import Memory, training_memory

OFFLOADS = ("none", "optimizer", "all")

# Of a rank's values, stage 3 updates so many at a time, and copies their gradients for it: 400 MB.
# DeepSpeed's default is ten times as many, and so up to 4 GB. Chosen by hand.
UPDATED_AT_A_TIME = 100_000_000


@dataclass(frozen=True)
class ZeroConfig:
    """Options of `ZeroEngine`.

    `stage`: 0 to 3, see above; 0 in bf16 is autocast, as the plain engine has it.
    `dtype`: of weights and gradients as the model sees them; the master weights are float32.
    `ema_decay`: 0 keeps no average, and no memory for one.
    `offload`: what stage 3 keeps in the CPU's memory, from where it is slow to fetch: "optimizer"
    (float32 weights, moments, EMA; the CPU updates them), "all" (these and the shards of what the
    model computes with) or "none".
    `bucket_numel`: values gathered ahead, and values reduced, in one collective; never more than
    the model has. `max_live_numel`: values gathered at a time in stage 3. Both follow from the
    model where they are not given, see `derive_sizes`.
    `persistence_threshold`: parameters of up to so many values stay gathered
    between steps. `overlap_comm`: communicate beside computing (CUDA only).
    `memory_efficient_linear`: replaces torch's linear function, in the whole process, by one that
    does not hold on to gathered weights; for large models without activation checkpointing.
    """

    stage: int = free(3)
    dtype: str = "fp32"
    ema_decay: float = 0.999
    offload: str = free("none")
    bucket_numel: int | None = free(None)
    max_live_numel: int | None = free(None)
    persistence_threshold: int = free(0)
    overlap_comm: bool = free(True)
    memory_efficient_linear: bool = free(False)

    def __post_init__(self) -> None:
        if self.stage not in range(4):
            raise ValueError(f"stage={self.stage} must be one of 0, 1, 2, 3")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        check_decay(self.ema_decay)
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload={self.offload!r} must be one of {', '.join(OFFLOADS)}")
        if self.offload != "none" and self.stage != 3:
            raise ValueError(
                f"offload={self.offload!r} wants stage=3, which is {self.stage}; try offload=none"
            )
        for name in ("bucket_numel", "max_live_numel"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; leave it out to derive it")
        if self.persistence_threshold < 0:
            raise ValueError(f"persistence_threshold={self.persistence_threshold} must be >= 0")

    def build(
        self,
        model_factory: Callable[[], nn.Module],
        optimizer: OptimizerConfig,
        num_steps: int,
        device: torch.device,
    ) -> "ZeroEngine | PlainEngine":
        """The engine at step 0 of `num_steps`; every rank of the default process group calls it.

        `model_factory` seeds itself. Each parameter is drawn whole on the CPU of every rank, in
        stage 3 one module at a time and cut at once: the same weights on any number of ranks.
        """
        if not distributed.is_initialized():
            raise ValueError("ZeRO needs a process group; start under torchrun or Ray Train")
        if self.stage == 0:
            plain = PlainConfig(self.dtype, self.ema_decay)
            return plain.build(model_factory, optimizer, num_steps, device)
        return ZeroEngine(self, model_factory, optimizer, num_steps, device)

    def memory(
        self, num_parameters: int, largest_block: int, num_ranks: int, activations: int
    ) -> Memory:
        """By the stage, and by what is offloaded."""
        return training_memory(
            num_parameters,
            self.stage,
            num_ranks,
            DTYPES[self.dtype].itemsize,
            activations,
            gathered=derive_sizes(self, num_parameters, largest_block).live,
            has_ema=self.ema_decay > 0,
            offload=self.offload,
        )


@dataclass(frozen=True)
class Sizes:
    """In values, not bytes: of collectives, and of what stage 3 holds gathered."""

    reduced: int
    gathered: int
    live: int


def derive_sizes(config: ZeroConfig, numel: int, block_numel: int) -> Sizes:
    """Sizes for a model of `numel` values, the largest block of which has `block_numel`.

    Few collectives are better than many (see above), so that a small model is gathered, and its
    gradient reduced, in one. From 50 million values on, which are 100 MB in bf16, a collective's
    latency is nothing beside its transfer: chosen by hand, and 10^9 is DeepSpeed's default.
    A block is gathered as a whole. Therefore what is gathered ahead has room for the next one, and
    what is live for the one that computes beside it, however large blocks are.
    """
    reduced = config.bucket_numel or 50_000_000
    gathered = config.bucket_numel or max(reduced, block_numel)
    live = config.max_live_numel or max(1_000_000_000, block_numel + gathered)
    return Sizes(min(reduced, numel), min(gathered, numel), min(live, numel))


class ZeroEngine:
    """See `framework.train.engine.protocol.Engine`."""

    def __init__(
        self,
        config: ZeroConfig,
        model_factory: Callable[[], nn.Module],
        optimizer: OptimizerConfig,
        num_steps: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.optimizer_config = optimizer
        self.num_steps = num_steps
        self.progress = Progress()
        self.device = device
        self.rank, self.dp_size = distributed.get_rank(), distributed.get_world_size()
        self.group = checkpoint_group()
        deepspeed = _import_deepspeed(device)

        if config.stage == 3:
            module, initial = self._build_in_shards(deepspeed, model_factory, device)
        else:
            module = model_factory()
            initial = {n: p.detach().flatten().clone() for n, p in module.named_parameters()}
        # Any: DeepSpeed hangs much on each parameter.
        self.params: dict[str, Any] = dict(module.named_parameters())
        self.shapes = shapes_of(module)
        self.numels = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.model, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.build(self.params.items()),
            config=self._settings(
                device, config.dtype, sum(self.numels.values()), largest_block(module)
            ),
        )
        self.zero = self.model.optimizer
        self.stage: Stage = (
            Stage3(self.zero, self.params, self.rank)
            if config.stage == 3
            else Stage1And2(self.zero, self.params)
        )
        flats = self.stage.flats
        create_adam_state(self.zero.optimizer, flats)

        adam = [self.zero.optimizer.state[flat] for flat in flats]
        # What this rank holds in float32, of each kind and parameter. For `initial` see there.
        weights = self._pieces(flats)
        for name, piece in weights.items():
            first = 0 if config.stage == 3 else piece.start
            piece.values.copy_(initial.pop(name)[first : first + piece.values.numel()])
        self.state: dict[str, dict[str, Piece]] = {
            "weights": weights,
            "exp_avg": self._pieces([state["exp_avg"] for state in adam]),
            "exp_avg_sq": self._pieces([state["exp_avg_sq"] for state in adam]),
        }
        if config.ema_decay:
            self.state["ema"] = {n: replace(w, values=w.values.clone()) for n, w in weights.items()}
        self._snapshot = Snapshot(self.shapes, self.group)

    def _build_in_shards(
        self, deepspeed: Any, model_factory: Callable[[], nn.Module], device: torch.device
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """The module as stage 3 wants it, and this rank's initial float32 shards."""
        # No overrides: tensors made in constructors stay float32, and on the CPU until cut.
        init = deepspeed.zero.Init(
            config_dict_or_path=self._settings(device, "fp32"),
            dtype=torch.float32,
            tensor_overrides=[],
        )
        with init, _RefuseLateInit():
            module = model_factory()
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        initial, dtype = {}, DTYPES[self.config.dtype]
        for name, parameter in module.named_parameters():
            check_parts("parameter of stage 3", parameter)
            shard: Any = parameter.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed's
            initial[name] = shard.clone()
            parameter.data, shard.data = parameter.data.to(dtype), shard.data.to(dtype)
        for block in _blocks(module):
            deepspeed.utils.set_z3_leaf_module(block, True)
            block.register_forward_pre_hook(_check_leaf_inputs, with_kwargs=True)
        return module, initial

    def _pieces(self, flats: list[Tensor]) -> dict[str, Piece]:
        return {
            name: Piece(place.of(flats), place.start, self.numels[name])
            for name, place in self.stage.places.items()
        }

    def _settings(
        self, device: torch.device, dtype: str, numel: int = 1, block_numel: int = 1
    ) -> dict[str, Any]:
        config, on_gpu = self.config, device.type == "cuda"
        sizes = derive_sizes(config, numel, block_numel)
        by_stage: dict[str, Any] = {
            "allgather_bucket_size": sizes.gathered + sizes.gathered % 2,  # it wants an even one
        }
        if config.stage == 3:
            by_stage = {
                "stage3_prefetch_bucket_size": sizes.gathered,
                "stage3_max_live_parameters": sizes.live,
                "sub_group_size": UPDATED_AT_A_TIME,
                "stage3_param_persistence_threshold": config.persistence_threshold,
                "memory_efficient_linear": config.memory_efficient_linear,
            }
            in_cpu = {"device": "cpu", "pin_memory": on_gpu}
            if config.offload != "none":
                by_stage["offload_optimizer"] = in_cpu
            if config.offload == "all":
                by_stage["offload_param"] = in_cpu
        return {
            "train_micro_batch_size_per_gpu": 1,
            # Every step() is a boundary; backward() before it may be called any number of times.
            # Stages 1 and 2 are told so by the second line, stage 3 keeps a sum in any case.
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": config.stage == 3,
            "gradient_clipping": self.optimizer_config.max_grad_norm,  # DeepSpeed's default is 1
            "zero_allow_untested_optimizer": True,  # torch.optim.AdamW
            "zero_force_ds_cpu_optimizer": False,  # which would have to be compiled
            "bf16": {"enabled": dtype == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": dtype,
            "zero_optimization": {
                "stage": config.stage,
                "contiguous_gradients": True,
                # Stage 1 reduces at the step: there is nothing to overlap it with.
                "overlap_comm": config.overlap_comm and on_gpu and config.stage > 1,
                "reduce_scatter": on_gpu,
                "reduce_bucket_size": sizes.reduced,
                **by_stage,
            },
        }

    def backward(self, loss: Tensor) -> None:
        """Add to this rank's share of the gradient; stages 2 and 3 average over the ranks here."""
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepStats:
        """Clip, update this rank's share of weights and EMA."""
        lr = self.optimizer_config.lr_at(self.progress.steps, self.num_steps)
        set_lr(self.zero.optimizer, lr)
        self.model.step()
        self.stage.finish_step()
        if not self.zero.overflow:
            if "ema" in self.state:
                update_ema(
                    self._values("ema"),
                    self._values("weights"),
                    self.config.ema_decay,
                    self.progress.updates,
                )
            self.progress.updates += 1
        self.progress.steps += 1
        return StepStats(float(self.model.get_global_grad_norm()), lr)

    def skip(self) -> StepStats:
        """No norm: the optimizer would have to be made to compute it."""
        self.stage.forget_gradients()
        lr = self.optimizer_config.lr_at(self.progress.steps, self.num_steps)
        self.progress.steps += 1
        return StepStats(math.nan, lr)

    def snapshot(self) -> Snapshot:
        """Each rank copies its pieces."""
        return self._snapshot.take(self._state(self.progress.as_tensor()))

    def save(self, store: Store) -> None:
        """Each rank writes its pieces."""
        self._snapshot.check_written()
        save_state(self._state(self.progress.as_tensor()), self.shapes, store, self.group)

    def load(self, store: Store) -> None:
        """Each rank reads its pieces, however they were cut when they were written."""
        self._snapshot.check_written()
        progress = self.progress.as_tensor()
        load_state(self._state(progress), self.shapes, store, self.group)
        self.progress = Progress.from_tensor(progress)
        for state in self.zero.optimizer.state.values():
            state["step"].fill_(self.progress.updates)
        self.stage.take_weights()

    def full_state(self, which: str = "weights") -> dict[str, Tensor]:
        """Gather the weights or the EMA to rank 0, a tensor at a time."""
        full = {}
        for name, piece in self.state.get(which, self.state["weights"]).items():
            whole = torch.zeros(piece.numel, device=self.device)
            whole[piece.start : piece.start + piece.values.numel()] = piece.values
            distributed.reduce(whole, 0)  # a sum, of which one term is not zero
            if self.rank == 0:
                full[name] = whole.view(self.shapes[name]).cpu()
        return full

    def weight_norm(self) -> float:
        """Each rank adds up its pieces, which have no part in common."""
        total = sum_of_squares(self._values("weights")).to(self.device)
        distributed.all_reduce(total)
        return total.sqrt().item()

    def _values(self, kind: str) -> list[Tensor]:
        return [piece.values for piece in self.state[kind].values()]

    def _state(self, progress: Tensor) -> dict[str, Tensor | Piece]:
        state: dict[str, Tensor | Piece] = {"progress": progress}
        for kind, pieces in self.state.items():
            state |= {f"{kind}.{name}": piece for name, piece in pieces.items()}
        buffers = persistent_buffers(self.model.module)
        return state | {name: buffer.view(-1) for name, buffer in buffers.items()}


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [block for m in module.modules() if isinstance(m, nn.ModuleList) for block in m]


def largest_block(module: nn.Module) -> int:
    """Of the blocks that stage 3 gathers as a whole, in values; 0 where there are none."""
    numels = (sum(map(math.prod, shapes_of(block).values())) for block in _blocks(module))
    return max(numels, default=0)


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for `device`, quietly, on the process group that there is."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":  # DeepSpeed takes the device that LOCAL_RANK names
        index = torch.cuda.current_device() if device.index is None else device.index
        os.environ["LOCAL_RANK"] = str(index)
    os.environ.setdefault("LOCAL_RANK", "0")
    silence_renamed_collectives()
    import deepspeed

    deepspeed_patches.apply(device)
    deepspeed.init_distributed(dist_backend=distributed.get_backend())
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _check_leaf_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A leaf's gradients are taken when that of its inputs is known; with none, too soon: as 0."""
    inputs = (*args, *kwargs.values())
    if torch.is_grad_enabled() and not any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    ):
        raise ValueError(
            f"{type(block).__name__} is in an nn.ModuleList, which makes it a leaf for ZeRO-3, but "
            "no argument of it needs a gradient; keep it as an attribute of its own"
        )


class _RefuseLateInit(TorchFunctionMode):
    """Writing to a parameter that is cut already would do nothing, silently: raise instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and args and isinstance(args[0], nn.Parameter) and args[0].numel() == 0:
            shape = tuple(getattr(args[0], "ds_shape", args[0].shape))
            raise ValueError(
                f"a parameter of shape {shape} is initialised ({name}) after the constructor of "
                "its own module: ZeRO-3 has cut it by then; do it in that constructor"
            )
        return func(*args, **(kwargs or {}))
