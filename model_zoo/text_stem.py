"""From what a text encoder gives to text tokens of a model's width.

Text comes as ids, which a small encoder reads that is trained along, or as embeddings of a frozen
encoder, each token by itself. Shapes: B segments, K text tokens, D width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from model_zoo.attention import Segments
from model_zoo.layers import FeedForward, Gelu, SelfAttention


class TextStemConfig(Protocol):
    """What a model's config says of its text."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def num_heads(self) -> int:
        """Of the encoder of ids."""

    @property
    def text_depth(self) -> int:
        """Its layers."""

    @property
    def text_max_length(self) -> int:
        """Its positions."""

    @property
    def gelu(self) -> Gelu:
        """Of all feed-forwards."""


def build_text_stem(
    config: TextStemConfig, text_vocab: int | None, text_dim: int | None
) -> "TextIdStem | TextEmbeddingStem":
    """The stem for ids (K,) below `text_vocab`, or for embeddings (K, text_dim).

    ValueError where not exactly one of the two is given.
    """
    check_text_source(text_vocab, text_dim)
    if text_vocab is not None:
        return TextIdStem(config, text_vocab)
    assert text_dim is not None
    return TextEmbeddingStem(text_dim, config.hidden_size)


def check_text_source(text_vocab: int | None, text_dim: int | None) -> None:
    """ValueError unless text is either ids below `text_vocab` or embeddings of `text_dim`."""
    if (text_vocab is None) == (text_dim is None):
        raise ValueError(
            f"text_vocab={text_vocab} and text_dim={text_dim}: give exactly one; "
            "an encoder of ids has a vocab_size, one of embeddings a dim"
        )


class TextIdStem(nn.Module):
    """Text ids to text tokens: embedding, positions, a packed pre-norm transformer encoder."""

    def __init__(self, config: TextStemConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.text_max_length, config.hidden_size)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, text: Tensor, segments: Segments, segment_ids: Tensor) -> Tensor:
        """text (K,) int64, segment_ids (K,) -> (K, D)."""
        position = torch.arange(text.shape[0], device=text.device)
        position = position - segments.cu_q.long()[segment_ids]
        # Only the padding segment, which nobody reads, may be longer than the table.
        position = position.clamp(max=self.positions.num_embeddings - 1)
        x = self.embedding(text) + self.positions(position)  # (K, D)
        for block in self.blocks:
            x = block(x, segments)
        return self.norm(x)


class TextBlock(nn.Module):
    """A pre-norm transformer block over text tokens."""

    def __init__(self, config: TextStemConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = SelfAttention(config.hidden_size, config.num_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.ffn = FeedForward(config.hidden_size, 4 * config.hidden_size, gelu=config.gelu)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """(K, D) -> (K, D)."""
        x = x + self.attention(self.norm1(x), segments)
        return x + self.ffn(self.norm2(x))


class TextEmbeddingStem(nn.Module):
    """Embeddings of a text encoder to text tokens, each by itself; as in PixArt-alpha and Wan."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = FeedForward(text_dim, hidden_size, hidden_size)

    def forward(self, text: Tensor, segments: Segments, segment_ids: Tensor) -> Tensor:
        """text (K, text_dim) -> (K, D)."""
        return self.mlp(text.to(self.mlp.up.weight.dtype))


def stem_weights(config: TextStemConfig, text_dim: int | None) -> int:
    """Weights in matrices that each text token passes in the stem; `text_dim` as in the builder."""
    d = config.hidden_size
    return config.text_depth * 12 * d * d if text_dim is None else text_dim * d + d * d


def mean_by_segment(x: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of x (K, D) over each segment -> (B, D) float32; zeros for an empty segment."""
    lengths = cu_seqlens.diff()  # (B,)
    total = torch.zeros(lengths.shape[0], x.shape[1], device=x.device)
    total = total.index_add(0, segment_ids, x.float())  # (B, D)
    return total / lengths.clamp(min=1)[:, None]
