"""Layers that transformers over packed tokens share.

Shapes: B segments, L video tokens, K text tokens, D width, N heads, d head dim. Query, key and
value projections are fused: ZeRO-3 gathers few, large parameters. Linear weights start as Xavier
uniform with zero bias (as in DiT and Wan), from torch's global generator.
"""

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.attention import Segments, check_backend_name, packed_attention
from model_zoo.checks import check_choice, check_limit
from model_zoo.rope import rotate

QKNormOver = Literal["head", "width"]
Gelu = Literal["tanh", "none"]


class Linear(nn.Linear):
    """`nn.Linear` with Xavier uniform weights; `chunks` matrices that are stacked start apart.

    Weights are set in here alone: under `deepspeed.zero.Init` a parent would find them partitioned.
    """

    def __init__(
        self, in_features: int, out_features: int, chunks: int = 1, zero: bool = False
    ) -> None:
        self.chunks, self.zero = chunks, zero
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw the weights anew, each chunk by its own fan-out, or zero them; biases are zero."""
        for weight in self.weight.chunk(self.chunks):
            nn.init.xavier_uniform_(weight, gain=0.0 if self.zero else 1.0)
        nn.init.zeros_(self.bias)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weights' type or autocast say.

    Modulation wants it: bf16 cannot tell 1 + 0.001 from 1. It acts once a clip, so it costs little.
    """

    def __init__(self, in_features: int, out_features: int, zero: bool = False) -> None:
        self.zero = zero
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Normal weights of deviation .02, as in DiT and Wan, or zero; biases zero."""
        nn.init.normal_(self.weight, std=0.0 if self.zero else 0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class Modulation(Float32Linear):
    """A condition to the tables of a block: shifts, scales and gates (Peebles and Xie 2023, adaLN).

    `tables`: how many; those at the indices `gates` start at `gate_init`, all others at zero,
    whatever the condition. SiLU of the condition is the caller's: it is the same for all blocks.
    """

    def __init__(
        self, hidden_size: int, tables: int, gates: tuple[int, ...] = (), gate_init: float = 0.0
    ) -> None:
        self.tables, self.gates, self.gate_init = tables, gates, gate_init
        super().__init__(hidden_size, tables * hidden_size)

    def reset_parameters(self) -> None:
        """Zero weights; biases zero, or `gate_init` where a gate is."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        for i, bias in enumerate(self.bias.chunk(self.tables)):
            if i in self.gates:
                nn.init.constant_(bias, self.gate_init)

    def forward(self, condition: Tensor) -> Tensor:
        """condition (R, D) -> (tables, R, D) float32."""
        return super().forward(condition).unflatten(-1, (self.tables, -1)).transpose(0, 1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, in float32, with one weight for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d)."""
        # 1e-6 as in Wan.
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


class QKNorm(RMSNorm):
    """RMS norm of queries or keys (n, N, d): over each head, or over all heads together as Wan."""

    def __init__(self, hidden_size: int, num_heads: int, over: QKNormOver) -> None:
        super().__init__(hidden_size // num_heads if over == "head" else hidden_size)
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        """(n, N, d) -> (n, N, d)."""
        if self.over == "head":
            return super().forward(x)
        return super().forward(x.flatten(-2)).view_as(x)


class SelfAttention(nn.Module):
    """Attention of each segment to itself; queries and keys are normalised, then rotated.

    `qk_norm` None leaves the norms out, as the first transformers did.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: QKNormOver | None = "head"
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, chunks=3)
        self.q_norm = QKNorm(hidden_size, num_heads, qk_norm) if qk_norm else nn.Identity()
        self.k_norm = QKNorm(hidden_size, num_heads, qk_norm) if qk_norm else nn.Identity()
        self.out = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, segments: Segments, rotation: Tensor | None = None) -> Tensor:
        """x (L, D) -> (L, D); rotation (L, 1, d/2, 2), or None for no rotary positions."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (L, 3, N, d)
        q, k, v = qkv.unbind(1)  # 3 x (L, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(packed_attention(q, k, v, segments).flatten(1))  # (L, D)


class CrossAttention(nn.Module):
    """Attention of each segment's video tokens to its text tokens; no text gives only the bias."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: QKNormOver = "head") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size, 2 * hidden_size, chunks=2)
        self.q_norm = QKNorm(hidden_size, num_heads, qk_norm)
        self.k_norm = QKNorm(hidden_size, num_heads, qk_norm)
        self.out = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor, segments: Segments) -> Tensor:
        """x (L, D), text (K, D) -> (L, D)."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))  # (L, N, d)
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(1)  # 2 x (K, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.out(packed_attention(q, k, v, segments).flatten(1))  # (L, D)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them.

    gelu: "tanh" as in DiT and Wan, or "none" for the exact one: they differ by less than 5e-4, and
    on a CPU the tanh kernel takes three times as long (6.2 against 2.1 ms forward and backward for
    1536 x 512).
    """

    def __init__(
        self, hidden_size: int, hidden: int, out: int | None = None, gelu: Gelu = "tanh"
    ) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = Linear(hidden_size, hidden)
        self.down = Linear(hidden, out or hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(L, in) -> (L, out)."""
        return self.down(F.gelu(self.up(x), approximate=self.gelu))


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights, (…, D) -> (…, D) float32; eps as in Wan."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in float32 (Peebles and Xie 2023, adaLN).

    x (L, D); shift, scale (R, D): a row a condition; rows (L,): the row of each token -> (L, D) of
    x's type. Rows are gathered one table at a time, which is twice as fast as all tables at once.
    """
    scale, shift = (1 + scale).index_select(0, rows), shift.index_select(0, rows)  # 2 x (L, D)
    return torch.addcmul(shift, norm(x), scale).to(x.dtype)


def add_gated(x: Tensor, update: Tensor, gate: Tensor, rows: Tensor) -> Tensor:
    """x + gate * update, in float32; x, update (L, D), gate (R, D), rows (L,) -> (L, D)."""
    gate = gate.index_select(0, rows)  # (L, D)
    return torch.addcmul(x.float(), gate, update.float()).to(x.dtype)


def sinusoidal_embedding(position: Tensor, dim: int) -> Tensor:
    """(…,) -> (…, dim) float32: cosines, then sines, of frequencies 10000^(-2i/dim)."""
    half = dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.float()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class SharedOptions(Protocol):
    """The options that every model's config has."""

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent positions in time, height and width that make one token."""

    @property
    def text_depth(self) -> int:
        """Layers of the encoder of text ids."""

    @property
    def gelu(self) -> Gelu:
        """Of all feed-forwards."""

    @property
    def attention(self) -> str:
        """See `choose_backend`."""


def check_shared(config: SharedOptions) -> None:
    """ValueError where a field that every model's config has is out of its range."""
    if min(config.patch_size) < 1:
        raise ValueError(
            f"patch_size={config.patch_size} must be at least 1 in time, height and width"
        )
    if config.text_depth < 0:
        raise ValueError(f"text_depth={config.text_depth} must not be negative")
    check_limit("text_depth", config.text_depth)
    for size in config.patch_size:
        check_limit("patch_size", size)
    check_choice("gelu", config.gelu, Gelu)
    check_backend_name(config.attention)
