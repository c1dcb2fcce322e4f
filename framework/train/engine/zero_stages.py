"""Where DeepSpeed's optimizers keep a rank's float32 state, and how to make them forget a gradient.

Stage 3 cuts each parameter by itself: of n values, rank r of W holds [r * c, (r + 1) * c),
c = ceil(n / W). Stages 1 and 2 lay the parameters of a group end to end and cut the whole: a rank
holds any piece of a parameter, most often all of it or nothing.

DeepSpeed works in place on a few flat tensors; we hold views of them. None of that is public, so
PRIVATE_PARTS lists all that we use of it, and an engine that does not find it does not start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# What we read, set and call beyond DeepSpeed's public API, by the class or thing that has it, and
# for what. Seen in 0.19.8.
_OF_EACH = {
    "optimizer": "torch's AdamW, which it drives: state to save and load, learning rates",
    "overflow": "whether the last step met a gradient that is no number, and so changed nothing",
}
_OF_STAGES_1_AND_2 = {
    "zero_grad": "to forget gradients",
    "update_lp_params": "to make the model compute with loaded float32 weights",
}
PRIVATE_PARTS: dict[str, dict[str, str]] = {
    "DeepSpeedZeroOptimizer_Stage3": _OF_EACH
    | {
        "fp32_partitioned_groups_flat": "the float32 weights",
        "grad_position": "where a parameter lies in them",
        "get_param_id": "the key of a parameter in `grad_position`",
        "grad_partitions_flat_buffer": "the gradients, to be cleared after each step",
        "loss_scale": "what `_overflow_clean_up` wants",
        "_pre_step": "to skip a step as it does itself",
        "_overflow_clean_up": "likewise",
        "_partition_all_parameters": "to drop gathered weights; see `Stage3.take_weights`",
    },
    "DeepSpeedZeroOptimizer": _OF_EACH
    | _OF_STAGES_1_AND_2
    | {
        "single_partition_of_fp32_groups": "the float32 weights",
        "micro_step_id": "to forget gradients",
        "averaged_gradients": "likewise",
        "all_grad_tensors": "likewise",
    },
    "BF16_Optimizer": _OF_EACH
    | _OF_STAGES_1_AND_2
    | {"fp32_groups_flat_partition": "the float32 weights, and what tells this class"},
    "parameter of stage 3": {
        "ds_tensor": "this rank's shard, in the dtype of the model",
        "ds_numel": "the size of the whole",
        "ds_shape": "the shape of the whole, for an error",
    },
    "parameter of stages 1 and 2": {"_hp_mapping": "None, or where a parameter lies"},
    "_hp_mapping": {
        "hp_fragment_address": "where it lies in the float32 weights",
        "lp_fragment_address": "which of its values these are",
        "param_group_index": "which of the flat tensors",
    },
}


def check_parts(kind: str, found: Any) -> None:
    """ValueError where this DeepSpeed does not have what PRIVATE_PARTS lists of `kind`."""
    if missing := [name for name in PRIVATE_PARTS[kind] if not hasattr(found, name)]:
        raise ValueError(
            f"this DeepSpeed's {kind} has no {', '.join(missing)}, which ZeRO is built on here; "
            "install the deepspeed that pyproject.toml names"
        )


@dataclass(frozen=True)
class Place:
    """Values [start, start + size) of a parameter are [offset, offset + size) of a flat tensor."""

    flat: int
    offset: int
    size: int
    start: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """A view."""
        return flats[self.flat].detach().narrow(0, self.offset, self.size)


class Stage(Protocol):
    """What the engine asks of a DeepSpeed optimizer; `flats` are its float32 weights."""

    flats: list[Tensor]
    places: dict[str, Place]

    def finish_step(self) -> None:
        """After each step of the optimizer."""
        ...

    def forget_gradients(self) -> None:
        """Instead of a step: as if there had been no backward pass."""
        ...

    def take_weights(self) -> None:
        """Make the model compute with what `flats` hold now."""
        ...


class Stage3:
    """Of `DeepSpeedZeroOptimizer_Stage3`."""

    def __init__(self, zero: Any, params: Mapping[str, Any], rank: int) -> None:
        check_parts("DeepSpeedZeroOptimizer_Stage3", zero)
        self.zero, self.params = zero, params
        self.flats: list[Tensor] = self.zero.fp32_partitioned_groups_flat
        self.places = {}
        for name, parameter in params.items():
            flat, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(rank * size, parameter.ds_numel)  # the last ranks' shards are padded
            self.places[name] = Place(flat, offset, min(size, parameter.ds_numel - start), start)

    def finish_step(self) -> None:
        """A parameter without a gradient in the next step would be given this one's again."""
        self.zero.grad_partitions_flat_buffer.zero_()
        for flat in self.flats:
            if flat.grad is not None:  # kept for offloading
                flat.grad.zero_()

    def forget_gradients(self) -> None:
        """What its step does where a gradient is not a number."""
        self.zero._pre_step()
        self.zero._partition_all_parameters()
        self.zero._overflow_clean_up(self.zero.loss_scale)
        self.finish_step()

    def take_weights(self) -> None:
        """Into the shards; gathered copies are dropped."""
        self.zero._partition_all_parameters()  # its public name also collects garbage: .2 s
        for name, place in self.places.items():
            self.params[name].ds_tensor.data[: place.size].copy_(place.of(self.flats))


class Stage1And2:
    """Of `DeepSpeedZeroOptimizer`, and of `BF16_Optimizer`, which is stage 1 in bf16."""

    def __init__(self, zero: Any, params: Mapping[str, Any]) -> None:
        self.zero, self.params = zero, params
        self.is_bf16_optimizer = hasattr(self.zero, "fp32_groups_flat_partition")
        check_parts("BF16_Optimizer" if self.is_bf16_optimizer else "DeepSpeedZeroOptimizer", zero)
        self.flats: list[Tensor] = (
            self.zero.fp32_groups_flat_partition
            if self.is_bf16_optimizer
            else self.zero.single_partition_of_fp32_groups
        )
        self.places = {}
        for name, parameter in params.items():
            self.places[name] = Place(0, 0, 0, 0)
            check_parts("parameter of stages 1 and 2", parameter)
            if (mapping := parameter._hp_mapping) is not None:
                check_parts("_hp_mapping", mapping)
                flat, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                self.places[name] = Place(
                    mapping.param_group_index, flat.start, flat.numel, whole.start
                )

    def finish_step(self) -> None:
        """Nothing: the step has cleared all gradients."""

    def forget_gradients(self) -> None:
        """What its step does where a gradient is not a number."""
        self.zero.zero_grad(set_to_none=True)
        if not self.is_bf16_optimizer:
            self.zero.micro_step_id = -1
            for gradients in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))

    def take_weights(self) -> None:
        """Gather them from all ranks."""
        with torch.no_grad():
            self.zero.update_lp_params()
