"""The Engine on DeepSpeed's ZeRO-3 (Rajbhandari et al. 2020): weights, gradients and Adam's moments
are cut over the ranks, and weights are gathered as the model comes to them.

The only module that touches DeepSpeed, at the first `build`: reading a config does not import it.
We take its partitioning and nothing else: not its optimizers, schedulers, checkpoints or losses'
scaling. Of a flat parameter of n values, rank r of W holds values [r * c, (r + 1) * c), c =
ceil(n / W); a checkpoint is of such pieces, and is the plain engine's as well.

Measured on two gloo ranks of one thread, in milliseconds of CPU time a step: a 1.8 M parameter
transformer of 113 tensors takes 214 in plain torch, 304 with DeepSpeed's defaults, 239 with ours;
the demo's DiT (2.2 M in 171 tensors, 768 tokens) 200 in plain torch, 260 with ours. What made the
difference, and what is left is Python that DeepSpeed runs for each module and each tensor:
- blocks as leaf modules: hooks for a block, not for each of its layers (-20);
- no persistent parameters: DeepSpeed gathers each of those by a collective of its own at every
  step, but all others in as few as the bucket holds (-30, and a hundred round trips);
- `reduce_scatter: false` on gloo: one all-reduce of a contiguous buffer.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode

from framework.sharded_state import Piece, load_state, persistent_buffers, save_state, shapes_of
from framework.storage import Store
from framework.train.ema import check_decay, update_ema
from framework.train.engine import (
    DTYPES,
    KINDS,
    Progress,
    StepStats,
    checkpoint_group,
    create_adam_state,
    silence_renamed_collectives,
    sum_of_squares,
)
from framework.train.optimizer import AdamWConfig
from framework.train.snapshot import Snapshot


@dataclass(frozen=True)
class ZeroConfig:
    """Options of `ZeroEngine`.

    `dtype`: of weights and gradients as the model sees them; the master weights are float32.
    `bucket_numel`: values gathered ahead, and values reduced, in one collective; less where the
    model is smaller. `persistence_threshold`: parameters of up to so many values stay gathered
    between steps. `overlap_comm`: communicate beside computing (CUDA only).
    `memory_efficient_linear`: replaces torch's linear function, in the whole process, by one that
    does not hold on to gathered weights; for large models without activation checkpointing.
    """

    dtype: str = "fp32"
    ema_decay: float = 0.999
    bucket_numel: int = 50_000_000
    persistence_threshold: int = 0
    overlap_comm: bool = True
    memory_efficient_linear: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        check_decay(self.ema_decay)
        if self.bucket_numel < 1:
            raise ValueError(f"bucket_numel={self.bucket_numel} must be at least 1; try 50000000")
        if self.persistence_threshold < 0:
            raise ValueError(f"persistence_threshold={self.persistence_threshold} must be >= 0")

    def build(
        self,
        model_factory: Callable[[], nn.Module],
        optimizer: AdamWConfig,
        num_steps: int,
        device: torch.device,
    ) -> "ZeroEngine":
        """The engine at step 0 of `num_steps`; every rank of the default process group calls it.

        `model_factory` seeds itself. Each parameter is drawn whole on the CPU of every rank, one
        module at a time, and cut at once: the same weights on any number of ranks.
        """
        if not distributed.is_initialized():
            raise ValueError("ZeRO-3 needs a process group; start under torchrun or Ray Train")
        return ZeroEngine(self, model_factory, optimizer, num_steps, device)


class ZeroEngine:
    """See `framework.train.engine.Engine`."""

    def __init__(
        self,
        config: ZeroConfig,
        model_factory: Callable[[], nn.Module],
        optimizer: AdamWConfig,
        num_steps: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.optimizer_config = optimizer
        self.num_steps = num_steps
        self.progress = Progress()
        self.rank, self.dp_size = distributed.get_rank(), distributed.get_world_size()
        self.group = checkpoint_group()
        deepspeed = _import_deepspeed(device)

        settings = self._settings(device, 1, "fp32")
        # No overrides: tensors made in constructors stay float32, and on the CPU until cut.
        init = deepspeed.zero.Init(
            config_dict_or_path=settings, dtype=torch.float32, tensor_overrides=[]
        )
        with init, _RefuseLateInit():
            module = model_factory()
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        # Any: DeepSpeed hangs ds_tensor (the shard), ds_numel and ds_shape on each parameter.
        self.params: dict[str, Any] = dict(module.named_parameters())
        initial = [p.ds_tensor.clone() for p in self.params.values()]
        for parameter in self.params.values():
            parameter.data = parameter.data.to(DTYPES[config.dtype])
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(DTYPES[config.dtype])
        for blocks in module.modules():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    deepspeed.utils.set_z3_leaf_module(block, True)
                    block.register_forward_pre_hook(_check_leaf_inputs, with_kwargs=True)

        numel = sum(p.ds_numel for p in self.params.values())
        self.model, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.build(self.params.items()),
            config=self._settings(device, numel, config.dtype),
        )
        self.zero = self.model.optimizer  # DeepSpeedZeroOptimizer_Stage3
        create_adam_state(self.zero.optimizer, self.zero.fp32_partitioned_groups_flat)

        # Views of this rank's float32 shards, padded to equal length on all ranks. DeepSpeed works
        # in place on the flat tensors behind them.
        local, state = (
            deepspeed.utils.safe_get_local_fp32_param,
            deepspeed.utils.safe_get_local_optimizer_state,
        )
        weights = {name: local(p).detach() for name, p in self.params.items()}
        torch._foreach_copy_(list(weights.values()), initial)
        self.shards: dict[str, dict[str, Tensor]] = {
            "weights": weights,
            "exp_avg": {n: state(p, "exp_avg") for n, p in self.params.items()},
            "exp_avg_sq": {n: state(p, "exp_avg_sq") for n, p in self.params.items()},
            "ema": {name: shard.clone() for name, shard in weights.items()},
        }
        self.shapes = shapes_of(module)
        self._snapshot = Snapshot(self.shapes, self.group)

    def _settings(self, device: torch.device, numel: int, dtype: str) -> dict[str, Any]:
        config, on_gpu = self.config, device.type == "cuda"
        bucket = min(config.bucket_numel, numel)
        return {
            "train_micro_batch_size_per_gpu": 1,
            # Every step() is a boundary; backward() before it may be called any number of times.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.optimizer_config.max_grad_norm,  # DeepSpeed's default is 1
            "zero_allow_untested_optimizer": True,  # torch.optim.AdamW
            "bf16": {"enabled": dtype == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": dtype,
            "zero_optimization": {
                "stage": 3,
                "contiguous_gradients": True,
                "overlap_comm": config.overlap_comm and on_gpu,
                "reduce_scatter": on_gpu,
                "reduce_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
                "stage3_param_persistence_threshold": config.persistence_threshold,
                "memory_efficient_linear": config.memory_efficient_linear,
            },
        }

    def backward(self, loss: Tensor) -> None:
        """Add to this rank's share of the gradient; averages over the ranks at once."""
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepStats:
        """Clip, update this rank's share of weights and EMA."""
        lr = self.optimizer_config.lr_at(self.progress.steps, self.num_steps)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.model.step()
        # A parameter without a gradient in the next step would be given this one's again.
        self.zero.grad_partitions_flat_buffer.zero_()
        if not self.zero.overflow:
            update_ema(
                list(self.shards["ema"].values()),
                list(self.shards["weights"].values()),
                self.config.ema_decay,
                self.progress.updates,
            )
            self.progress.updates += 1
        self.progress.steps += 1
        return StepStats(float(self.model.get_global_grad_norm()), lr)

    def skip(self) -> StepStats:
        """DeepSpeed skips a step whose gradient is not a number: so that is what it is given."""
        lr = self.optimizer_config.lr_at(self.progress.steps, self.num_steps)
        self.zero.grad_partitions_flat_buffer.fill_(math.nan)
        self.model.step()
        assert self.zero.overflow
        self.zero.grad_partitions_flat_buffer.zero_()
        self.progress.steps += 1
        return StepStats(math.nan, lr)

    def snapshot(self) -> Snapshot:
        """Each rank copies its shards."""
        return self._snapshot.take(self._state(self.progress.as_tensor()))

    def save(self, store: Store) -> None:
        """Each rank writes its shards."""
        self._snapshot.check_written()
        save_state(self._state(self.progress.as_tensor()), self.shapes, store, self.group)

    def load(self, store: Store) -> None:
        """Each rank reads its shards, however they were cut when they were written."""
        self._snapshot.check_written()
        progress = self.progress.as_tensor()
        load_state(self._state(progress), self.shapes, store, self.group)
        self.progress = Progress.from_tensor(progress)
        for state in self.zero.optimizer.state.values():
            state["step"].fill_(self.progress.updates)
        # What the model computes with follows the master weights: gathered copies are dropped.
        self.model.empty_partition_cache()
        for name, parameter in self.params.items():
            parameter.ds_tensor.data.copy_(self.shards["weights"][name])

    def full_state(self, which: str = "weights") -> dict[str, Tensor]:
        """Gather the weights or the EMA to rank 0, a tensor at a time."""
        full = {}
        for name, shard in self.shards[which].items():
            parts = (
                [torch.empty_like(shard) for _ in range(self.dp_size)] if self.rank == 0 else None
            )
            distributed.gather(shard.contiguous(), parts, 0)
            if parts is not None:
                shape = self.shapes[name]
                numel = self.params[name].ds_numel
                full[name] = torch.cat(parts)[:numel].view(shape).cpu()
        return full

    def weight_norm(self) -> float:
        """Each rank adds up its shards, which have no part in common."""
        total = sum_of_squares(
            [self._piece(n, w).values for n, w in self.shards["weights"].items()]
        )
        distributed.all_reduce(total)
        return total.sqrt().item()

    def _state(self, progress: Tensor) -> dict[str, Tensor | Piece]:
        state: dict[str, Tensor | Piece] = {"progress": progress}
        for kind in KINDS:
            for name, shard in self.shards[kind].items():
                state[f"{kind}.{name}"] = self._piece(name, shard)
        buffers = persistent_buffers(self.model.module)
        return state | {name: buffer.view(-1) for name, buffer in buffers.items()}

    def _piece(self, name: str, shard: Tensor) -> Piece:
        """A shard without its padding, which is the same on all ranks but nothing to keep."""
        start, numel = self.rank * shard.numel(), self.params[name].ds_numel
        return Piece(shard[: max(0, numel - start)], start, numel)


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for `device`, quietly, on the process group that there is."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":  # DeepSpeed takes the device that LOCAL_RANK names
        index = torch.cuda.current_device() if device.index is None else device.index
        os.environ["LOCAL_RANK"] = str(index)
    os.environ.setdefault("LOCAL_RANK", "0")
    silence_renamed_collectives()
    import deepspeed

    # On a CPU it would compile a kernel for inference that training never calls (45 s). This table,
    # which would else be made by running compilers, is the only thing that it asks.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(dist_backend=distributed.get_backend())
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Of its Muon it asks only whether an optimizer is one. Compiling that, at import, brings
    # Inductor: 3 s of a core.
    as_it_is = mock.patch.object(
        deepspeed.runtime.compiler, "compile", return_value=lambda kernel: kernel
    )
    with as_it_is:
        import deepspeed.runtime.zero.muon.muon_optimizer
    # Ranges for a GPU profiler: 1,500 a step, 5 % of the step of a small model on a CPU.
    deepspeed.utils.nvtx.enable_nvtx = device.type == "cuda"
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
