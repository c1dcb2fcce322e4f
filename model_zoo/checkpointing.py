"""Activation checkpointing: which blocks are computed again in the backward pass."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model_zoo.attention import ATTENTION_OPERATORS
from model_zoo.checks import check_choice

CheckpointMode = Literal["none", "full", "every_k", "selective"]


@dataclass(frozen=True)
class CheckpointPolicy:
    """Which blocks are computed again in the backward pass instead of keeping their activations.

    "full": all; "every_k": the first of each `every` blocks, for less memory saved and less time
    lost; "selective": all, but for the attention itself, whose outputs are kept: they are a small
    part of the memory, and the part that grows with the square of a clip's length; "none".
    """

    mode: CheckpointMode = "none"
    every: int = 1

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, CheckpointMode)
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1; 1 means all blocks")

    def applies(self, block: int) -> bool:
        """Whether the block of this index is computed again."""
        if self.mode == "every_k":
            return block % self.every == 0
        return self.mode in ("full", "selective")

    def run(self, block: nn.Module, index: int, *inputs: Any) -> Any:
        """`block(*inputs)`, by this policy."""
        if self.applies(index) and torch.is_grad_enabled():
            # Nothing in a block is random, so no generator's state need be kept.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if self.mode == "selective":
                options["context_fn"] = _keeping_attention
            return checkpoint(block, *inputs, **options)
        return block(*inputs)


def _keeping_attention() -> Any:
    return create_selective_checkpoint_contexts(list(ATTENTION_OPERATORS))


class PackedModel(nn.Module):
    """What every model over packs is: a network that runs its blocks by `checkpointing`."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = CheckpointPolicy()

    def set_checkpointing(self, policy: CheckpointPolicy) -> None:
        """Choose which blocks are computed again in the backward pass."""
        self.checkpointing = policy
