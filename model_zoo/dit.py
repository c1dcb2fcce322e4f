"""DiT over packs of video clips: a diffusion transformer of the Wan 2 lineage.

Wan Team 2025, "Wan: open and advanced large-scale video generative models"; blocks as in
github.com/Wan-Video/Wan2.2, wan/modules/model.py: adaLN modulation from one shared time projection
plus a table a block, rotary self-attention, ungated cross-attention to text, feed-forward. We
differ in four things: queries and keys are normalised over each head (Wan: over the full width);
the mean text token joins the time embedding; text may come as ids, read by a small encoder that is
trained along; gates start from `gate_init`, shifts and scales at zero (Wan: random).

Shapes: B segments, L video tokens, K text tokens, P values in one patch, D width, N heads, d head
dim. Every module runs in every forward pass, whatever the data: under ZeRO-3 all ranks must gather
the same parameters in the same order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_zoo.attention import AttentionBackend, Segments, check_backend_name, choose_backend
from model_zoo.layers import (
    CheckpointPolicy,
    CrossAttention,
    FeedForward,
    Float32Linear,
    Linear,
    SelfAttention,
    add_gated,
    modulate,
    sinusoidal_embedding,
)
from model_zoo.protocols import Layout
from model_zoo.rope import axis_pairs, pack_rotations

TIME_FEATURES = 256  # sinusoids of the time embedding, as in DiT and Wan


@dataclass(frozen=True)
class DiTConfig:
    """Size and options of a `DiT`; `build` makes it.

    `patch`: latent positions in time, height and width that make one token; whoever feeds the model
    patchifies. `rope_theta`: base of the rotary frequencies. `gate_init`: where the gates of
    attention and feed-forward start; 0 is adaLN-zero (Peebles and Xie 2023), the safe choice at
    scale, while .3 lets a small model learn sooner. `text_depth`, `text_max_length`: layers and
    positions of the encoder of text ids; unused where text comes as embeddings. `attention`: see
    `choose_backend`.
    """

    width: int
    ffn: int
    num_heads: int
    depth: int
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0
    gate_init: float = 0.0
    text_depth: int = 2
    text_max_length: int = 512
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name in ("width", "ffn", "num_heads", "depth", "text_max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.num_heads:
            fitting = next(n for n in range(self.num_heads, 0, -1) if self.width % n == 0)
            raise ValueError(
                f"width={self.width} must be divisible by num_heads={self.num_heads}; try {fitting}"
            )
        axis_pairs(self.head_dim)
        if min(self.patch) < 1:
            raise ValueError(f"patch={self.patch} must be at least 1 in time, height and width")
        if self.text_depth < 0:
            raise ValueError(f"text_depth={self.text_depth} must not be negative")
        check_backend_name(self.attention)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> "DiT":
        """The model, on torch's default device, for tokens of `token_size` values.

        Give `text_vocab` where text comes as ids (K,) or `text_dim` where it comes as embeddings
        (K, text_dim). Raises ValueError where not exactly one of them is given.
        """
        if (text_vocab is None) == (text_dim is None):
            raise ValueError(
                f"text_vocab={text_vocab} and text_dim={text_dim}: give exactly one; "
                "an encoder of ids has a vocab_size, one of embeddings a dim"
            )
        stem: nn.Module
        if text_vocab is not None:
            stem = TextIdStem(self, text_vocab)
        else:
            assert text_dim is not None
            stem = TextEmbeddingStem(self, text_dim)
        return DiT(self, token_size, stem)


class TextIdStem(nn.Module):
    """Text ids to text tokens: embedding, positions, a packed pre-norm transformer encoder."""

    def __init__(self, config: DiTConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(config.text_max_length, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(config.width)

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

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config.width, 4 * config.width)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """(K, D) -> (K, D)."""
        x = x + self.attention(self.norm1(x), segments)
        return x + self.ffn(self.norm2(x))


class TextEmbeddingStem(nn.Module):
    """Embeddings of a text encoder to text tokens, each by itself."""

    def __init__(self, config: DiTConfig, text_dim: int) -> None:
        super().__init__()
        self.mlp = FeedForward(text_dim, config.width, config.width)

    def forward(self, text: Tensor, segments: Segments, segment_ids: Tensor) -> Tensor:
        """text (K, text_dim) -> (K, D)."""
        return self.mlp(text.to(self.mlp.up.weight.dtype))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and last are modulated."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        # Rows: shift, scale and gate of attention, then of feed-forward.
        self.modulation = nn.Parameter(torch.zeros(6, width))
        with torch.no_grad():
            self.modulation[2::3] = config.gate_init
        self.attention = SelfAttention(width, config.num_heads)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross_attention = CrossAttention(width, config.num_heads)
        self.ffn = FeedForward(width, config.ffn)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rows: Tensor,
        text: Tensor,
        rotation: Tensor,
        video_segments: Segments,
        cross_segments: Segments,
    ) -> Tensor:
        """x (L, D), condition (2B, 6, D) float32, rows (L,) into it, text (K, D) -> (L, D)."""
        tables = condition + self.modulation.float()  # (2B, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = tables.unbind(1)  # 6 x (2B, D)
        y = self.attention(modulate(x, shift1, scale1, rows), video_segments, rotation)
        x = add_gated(x, y, gate1, rows)
        x = x + self.cross_attention(self.cross_norm(x), text, cross_segments)
        return add_gated(x, self.ffn(modulate(x, shift2, scale2, rows)), gate2, rows)


class Head(nn.Module):
    """Modulated norm and the last projection, which starts at zero."""

    def __init__(self, width: int, token_size: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(2, width))  # shift, scale
        self.out = Linear(width, token_size, zero=True)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor) -> Tensor:
        """x (L, D), condition (2B, D) float32, rows (L,) -> (L, P)."""
        shift, scale = (condition[:, None] + self.modulation.float()).unbind(1)  # 2 x (2B, D)
        return self.out(modulate(x, shift, scale, rows))


class DiT(nn.Module):
    """A `Denoiser`: noisy tokens, time and text to an output for each token."""

    def __init__(self, config: DiTConfig, token_size: int, text_stem: nn.Module) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.checkpointing = CheckpointPolicy()
        self.embed = Linear(token_size, width)
        self.text_stem = text_stem
        self.text_pool = Float32Linear(width, width)
        self.time_embedding = nn.Sequential(
            Float32Linear(TIME_FEATURES, width), nn.SiLU(), Float32Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(width, token_size)

    def set_checkpointing(self, policy: CheckpointPolicy) -> None:
        """Choose which blocks are computed again in the backward pass."""
        self.checkpointing = policy

    def forward(self, tokens: Tensor, t: Tensor, layout: Layout, text: Tensor) -> Tensor:
        """tokens (L, P), t (B,), layout, text (K,) or (K, text_dim) -> (L, P) float32.

        Tokens of `layout.given_mask` are modulated with t = 0, the others with their clip's t.
        """
        num_segments, segment_ids = t.shape[0], layout.segment_ids  # B, (L,)
        video_segments, cross_segments, text_segments = self._segments(layout)
        text_ids = torch.repeat_interleave(
            torch.arange(num_segments, device=text.device),
            layout.cu_text.diff().long(),
            output_size=text.shape[0],
        )  # (K,)
        rotation = pack_rotations(layout, self.config.head_dim, self.config.rope_theta)

        text = self.text_stem(text, text_segments, text_ids)  # (K, D)
        pooled = self.text_pool(mean_by_segment(text, text_ids, layout.cu_text))  # (B, D)

        # Both conditions of every clip, t and t = 0; each token takes one of the 2B rows.
        both = torch.cat([t, torch.zeros_like(t)])  # (2B,)
        time = self.time_embedding(sinusoidal_embedding(1000 * both, TIME_FEATURES))
        condition = time + pooled.repeat(2, 1)  # (2B, D)
        tables = self.time_projection(condition).unflatten(-1, (6, -1))  # (2B, 6, D)
        rows = segment_ids + num_segments * layout.given_mask  # (L,)

        x = self.embed(tokens.to(self.embed.weight.dtype))  # (L, D)
        for i, block in enumerate(self.blocks):
            inputs = (x, tables, rows, text, rotation, video_segments, cross_segments)
            if self.checkpointing.applies(i) and torch.is_grad_enabled():
                # Nothing in a block is random, so no generator's state need be kept.
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return self.head(x, condition, rows).float()  # (L, P)

    def _segments(self, layout: Layout) -> tuple[Segments, Segments, Segments]:
        """Of video to video, video to text, text to text; boundaries are read to the host once."""
        backend = self._backend(layout.cu_seqlens.device)
        video, text = torch.stack([layout.cu_seqlens, layout.cu_text]).tolist()
        return (
            Segments.of(layout.cu_seqlens, layout.cu_seqlens, backend, (video, video)),
            Segments.of(layout.cu_seqlens, layout.cu_text, backend, (video, text)),
            Segments.of(layout.cu_text, layout.cu_text, backend, (text, text)),
        )

    def _backend(self, device: torch.device) -> AttentionBackend:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.embed.weight.dtype
        return choose_backend(self.config.attention, device, dtype)


def mean_by_segment(x: Tensor, segment_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of x (K, D) over each segment -> (B, D) float32; zeros for an empty segment."""
    lengths = cu_seqlens.diff()  # (B,)
    total = torch.zeros(lengths.shape[0], x.shape[1], device=x.device)
    total = total.index_add(0, segment_ids, x.float())  # (B, D)
    return total / lengths.clamp(min=1)[:, None]
