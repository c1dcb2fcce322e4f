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

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.time = _silu_mlp(TIME_FEATURES, width)
        self.text = _silu_mlp(text_dim, width)

    def forward(self, times: Tensor, pooled: Tensor) -> Tensor:
        """times (R, 256) with R a multiple of B, pooled (B, text_dim) -> (R, D) float32."""
        text = self.text(pooled)  # (B, D)
        return self.time(times) + text.repeat(times.shape[0] // text.shape[0], 1)

    @staticmethod
    def weights(text_dim: int, width: int) -> tuple[int, int]:
        """In matrices: passed by each time, and by each pooled text."""
        return TIME_FEATURES * width + width * width, text_dim * width + width * width


def _silu_mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(Float32Linear(inputs, width), nn.SiLU(), Float32Linear(width, width))


class TokenRefiner(nn.Module):
    """Text embeddings to text tokens: a transformer encoder whose gates follow time and text."""

    def __init__(
        self, text_dim: int, width: int, num_heads: int, depth: int, gate_init: float
    ) -> None:
        super().__init__()
        self.condition = TimeTextEmbedding(text_dim, width)
        self.embed = Linear(text_dim, width)
        self.blocks = nn.ModuleList(RefinerBlock(width, num_heads, gate_init) for _ in range(depth))

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
    def weights(text_dim: int, width: int, depth: int) -> tuple[int, int]:
        """In matrices: passed by each text token, and once by each clip."""
        each_token = text_dim * width + depth * 12 * width * width
        return each_token, sum(TimeTextEmbedding.weights(text_dim, width)) + depth * 2 * width**2


class RefinerBlock(nn.Module):
    """A pre-norm transformer block over text tokens; its two branches are gated."""

    def __init__(self, width: int, num_heads: int, gate_init: float) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2, gates=(0, 1), gate_init=gate_init)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, num_heads, qk_norm=None)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.ffn = nn.Sequential(Linear(width, 4 * width), nn.SiLU(), Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor, text_ids: Tensor, segments: Segments) -> Tensor:
        """x (K, D), condition (B, D) float32, text_ids (K,) rows of it -> (K, D)."""
        gate1, gate2 = self.modulation(condition)  # 2 x (B, D)
        x = add_gated(x, self.attention(self.norm1(x), segments), gate1, text_ids)
        return add_gated(x, self.ffn(self.norm2(x)), gate2, text_ids)
