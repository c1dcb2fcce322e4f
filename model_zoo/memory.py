"""Bytes that training takes on one GPU, in closed form: states by ZeRO stage, and activations.

Rajbhandari et al. 2020 ("ZeRO"), sec. 3 and 5, for the states, but with gradients summed in
float32; activations are what autograd keeps of our blocks, counted tensor by tensor
(tests/model_zoo/test_memory.py). Not counted: the allocator's fragments, communication buckets, the
CUDA context and kernels' workspaces, some 3 to 6 GiB together.
"""

from dataclasses import dataclass, fields

from model_zoo.layers import CheckpointPolicy
from model_zoo.models.dit import DiTConfig

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


def activation_bytes(
    config: DiTConfig, value_bytes: int, tokens: int, policy: CheckpointPolicy
) -> int:
    """What is kept of a forward pass of `tokens` video tokens, and of the blocks done again.

    Text and what acts once a clip are left out.
    """
    hidden_size, heads = config.hidden_size, config.num_heads
    block = _block_bytes(config, value_bytes)
    kept = {
        "none": block,
        "full": hidden_size * value_bytes,
        "selective": 3 * hidden_size * value_bytes + 8 * heads,  # and what both attentions give
    }
    total = 0
    for i in range(config.depth):
        mode = policy.mode
        if mode == "every_k":
            mode = "full" if policy.applies(i) else "none"
        total += kept[mode]
    if policy.mode != "none":
        total += block  # of the one that is computed again
    # Its rotation, two numbers a pair; and the head's norm in float32, shift, scale and input.
    once = 4 * config.head_dim + 3 * 4 * hidden_size + value_bytes * hidden_size
    return tokens * (total + once)


def _block_bytes(config: DiTConfig, value_bytes: int) -> int:
    """Kept of one block for one token: norms, gates and modulation in float32, the rest as weights.

    In float32, two of them are one and the same tensor.
    """
    d, f = config.hidden_size, config.ffn
    if value_bytes == 4:
        return 4 * (28 * d + 2 * f) + _small(config)
    return 4 * 16 * d + value_bytes * (14 * d + 2 * f) + _small(config)


def _small(config: DiTConfig) -> int:
    """Means, deviations and logarithms of sums, float32."""
    per_head = 3 if config.qk_norm == "head" else 0
    return 4 * (6 + (per_head + 2) * config.num_heads)
