"""The text side of HunyuanVideo: text embeddings that are refined by time before they meet video.

Kong et al. 2024, "HunyuanVideo", sec. 4.3 and github.com/Tencent/HunyuanVideo,
hyvideo/modules/token_refiner.py: a causal language model's embeddings pass a small transformer in
both directions first. Shapes: B segments, R conditions, K text tokens, D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.attention import Segments
from model_zoo.layers import Float32Linear, Linear, Modulation, SelfAttention, add_gated

TIME_FEATURES = 256  # sinusoids of the time embedding, as in DiT


class TimeTextEmbedding(nn.Module):
    """A time and a pooled text to one condition, before its SiLU; in float32."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.time = _silu_mlp(TIME_FEATURES, hidden_size)
        self.text = _silu_mlp(text_dim, hidden_size)

    def forward(self, times: Tensor, pooled: Tensor) -> Tensor:
        """times (R, 256) with R a multiple of B, pooled (B, text_dim) -> (R, D) float32."""
        text = self.text(pooled)  # (B, D)
        return self.time(times) + text.repeat(times.shape[0] // text.shape[0], 1)

    @staticmethod
    def weights(text_dim: int, hidden_size: int) -> tuple[int, int]:
        """In matrices: passed by each time, and by each pooled text."""
        return (
            TIME_FEATURES * hidden_size + hidden_size * hidden_size,
            text_dim * hidden_size + hidden_size * hidden_size,
        )


def _silu_mlp(inputs: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        Float32Linear(inputs, hidden_size), nn.SiLU(), Float32Linear(hidden_size, hidden_size)
    )


class TokenRefiner(nn.Module):
    """Text embeddings to text tokens: a transformer encoder whose gates follow time and text."""

    def __init__(
        self, text_dim: int, hidden_size: int, num_heads: int, depth: int, gate_init: float
    ) -> None:
        super().__init__()
        self.condition = TimeTextEmbedding(text_dim, hidden_size)
        self.embed = Linear(text_dim, hidden_size)
        self.blocks = nn.ModuleList(
            RefinerBlock(hidden_size, num_heads, gate_init) for _ in range(depth)
        )

    def forward(
        self, text: Tensor, times: Tensor, pooled: Tensor, segments: Segments, text_ids: Tensor
    ) -> Tensor:
        """text (K, text_dim), times (B, 256), pooled (B, text_dim), text_ids (K,) -> (K, D)."""
        condition = F.silu(self.condition(times, pooled))  # (B, D)
        x = self.embed(text.to(self.embed.weight.dtype))  # (K, D)
        for block in self.blocks:
            x = block(x, condition, text_ids, segments)
        return x

    @staticmethod
    def weights(text_dim: int, hidden_size: int, depth: int) -> tuple[int, int]:
        """In matrices: passed by each text token, and once by each clip."""
        each_token = text_dim * hidden_size + depth * 12 * hidden_size * hidden_size
        return each_token, sum(
            TimeTextEmbedding.weights(text_dim, hidden_size)
        ) + depth * 2 * hidden_size**2


class RefinerBlock(nn.Module):
    """A pre-norm transformer block over text tokens; its two branches are gated."""

    def __init__(self, hidden_size: int, num_heads: int, gate_init: float) -> None:
        super().__init__()
        self.modulation = Modulation(hidden_size, 2, gates=(0, 1), gate_init=gate_init)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attention = SelfAttention(hidden_size, num_heads, qk_norm=None)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ffn = nn.Sequential(
            Linear(hidden_size, 4 * hidden_size), nn.SiLU(), Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor, condition: Tensor, text_ids: Tensor, segments: Segments) -> Tensor:
        """x (K, D), condition (B, D) float32, text_ids (K,) rows of it -> (K, D)."""
        gate1, gate2 = self.modulation(condition)  # 2 x (B, D)
        x = add_gated(x, self.attention(self.norm1(x), segments), gate1, text_ids)
        return add_gated(x, self.ffn(self.norm2(x)), gate2, text_ids)
