"""Bytes that training takes on one GPU, in closed form: states by ZeRO stage.

Rajbhandari et al. 2020 ("ZeRO"), sec. 3 and 5, but with gradients summed in float32. A model's
config knows its activations (`ModelConfig.activation_bytes`). Not counted: the allocator's
fragments, communication buckets, the CUDA context and kernels' workspaces, some 3 to 6 GiB
together.
"""

from dataclasses import dataclass, fields

FLOAT32 = 4  # bytes: of master weights, gradients, the average and each of Adam's two moments


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int  # as the model computes with them
    gradients: int
    optimizer: int  # Adam's moments, and master weights
    ema: int
    gathered: int  # weights that stage 3 holds whole
    activations: int

    host: int  # the CPU's: what is offloaded, and the copy that a checkpoint is written from

    @property
    def total(self) -> int:
        """On the GPU."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


def training_memory(
    num_parameters: int,
    stage: int,
    num_ranks: int,
    value_bytes: int,
    activations: int = 0,
    gathered: int = 0,
    has_ema: bool = True,
    offload: str = "none",
) -> Memory:
    """Of a model that computes in values of `value_bytes` (2 for bf16, 4 for fp32).

    stage: what ZeRO cuts over the ranks: 1 the optimizer, 2 also gradients, 3 all; from 1 on there
    are master weights beside the model's own, also in fp32. 0: nothing is cut, and the master
    weights are the model's (bf16 by autocast). activations: bytes of a pack. gathered: values of
    weights that a rank holds whole at a time in stage 3. offload: as `ZeroConfig` has it.
    """

    def held(bytes_each: int, from_stage: int) -> int:
        return num_parameters * bytes_each // (num_ranks if stage >= from_stage else 1)

    weights = held(value_bytes if stage else FLOAT32, 3)
    gradients = held(FLOAT32, 2)
    optimizer = held((3 if stage else 2) * FLOAT32, 1)
    ema = held(FLOAT32 if has_ema else 0, 1)
    # The copy has weights, moments and average, in float32.
    host = held(3 * FLOAT32, 1) + ema
    if offload != "none":
        host += gradients + optimizer + ema
        gradients = optimizer = ema = 0
    if offload == "all":
        host, weights = host + weights, 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        gathered=gathered * value_bytes if stage == 3 else 0,
        activations=activations,
        host=host,
    )
