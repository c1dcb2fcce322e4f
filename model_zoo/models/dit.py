"""DiT over packs of video clips: a diffusion transformer of the Wan 2 lineage.

Wan Team 2025, "Wan: open and advanced large-scale video generative models"; blocks as in
github.com/Wan-Video/Wan2.2, wan/modules/model.py: adaLN modulation from one shared time projection
plus a table a block, rotary self-attention, ungated cross-attention to text, feed-forward. With
`qk_norm="width"` and text embeddings it is Wan, whose weights `model_zoo.convert` reads and writes.
Our own additions are options: queries and keys normalised over each head, the mean text token
beside the time, text as ids with a small encoder that is trained along. Gates start from
`gate_init`, shifts and scales at zero (Wan: random).

Shapes: B segments, L video tokens, K text tokens, P values in one patch, D width, N heads, d head
dim. Every module runs in every forward pass, whatever the data: under ZeRO-3 all ranks must gather
the same parameters in the same order.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from model_zoo.attention import Segments
from model_zoo.checkpointing import CheckpointPolicy, PackedModel
from model_zoo.checks import check_choice, check_positive, head_dim
from model_zoo.flops import Work
from model_zoo.layers import (
    CrossAttention,
    FeedForward,
    Float32Linear,
    Gelu,
    Linear,
    QKNormOver,
    SelfAttention,
    add_gated,
    check_shared,
    modulate,
    sinusoidal_embedding,
)
from model_zoo.pack import (
    Span,
    backend_for,
    both_times,
    condition_rows,
    pack_segments,
    space_and_time,
    text_segment_ids,
)
from model_zoo.protocols import Layout
from model_zoo.rope import axis_pairs, pack_rotations
from model_zoo.text_stem import build_text_stem, mean_by_segment, stem_weights

AttentionSpan = Literal["full", "alternate"]

TIME_FEATURES = 256  # sinusoids of the time embedding, as in DiT and Wan


@dataclass(frozen=True)
class DiTConfig:
    """Size and options of a `DiT`; `build` makes it.

    `patch_size`: latent positions in time, height and width that make one token; whoever feeds the
    model patchifies. More than one in time is ViViT's tubelet embedding (Arnab et al. 2021, sec.
    3.2); its uniform frame sampling is one in time and a lower `fps` of the data's views.
    `rope_theta`: base of the rotary frequencies. `gate_init`: where the gates of attention and
    feed-forward start; 0 is adaLN-zero (Peebles and Xie 2023), the safe choice at scale, while .3
    lets a small model learn sooner. `qk_norm`: over each "head", or over the whole "width" as Wan.
    `pooled_text`: the mean text token joins the time embedding. `gelu`: "tanh" as Wan, or "none"
    for the exact one. `text_depth`, `text_max_length`: layers and positions of the encoder of text
    ids; unused where text comes as embeddings. `attention`: see `choose_backend`. `attention_span`:
    self-attention sees the "full" clip, or with "alternate" a time step in even blocks and a place
    over time in odd ones. That is Latte's variant 1 (Ma et al. 2024); model 3 of ViViT (sec. 3.3)
    has both in every block.
    """

    hidden_size: int
    ffn: int
    num_heads: int
    depth: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0
    gate_init: float = 0.0
    qk_norm: QKNormOver = "head"
    pooled_text: bool = False
    gelu: Gelu = "tanh"
    text_depth: int = 2
    text_max_length: int = 512
    # The kernel that computes attention depends on the machine; the weights do not depend on it.
    attention: str = field(default="auto", metadata={"free": True})
    attention_span: AttentionSpan = "full"

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "ffn", "num_heads", "depth", "text_max_length")
        axis_pairs(self.head_dim)
        check_shared(self)
        check_choice("qk_norm", self.qk_norm, QKNormOver)
        check_choice("attention_span", self.attention_span, AttentionSpan)

    @property
    def drops_tokens(self) -> bool:
        """Whether it can do with some of a clip's tokens, as masked training wants."""
        return self.attention_span == "full"

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return head_dim(self.hidden_size, self.num_heads)

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> "DiT":
        """The model, on torch's default device, for tokens of `token_size` values.

        Give `text_vocab` where text comes as ids (K,) or `text_dim` where it comes as embeddings
        (K, text_dim). Raises ValueError where not exactly one of them is given.
        """
        return DiT(self, token_size, build_text_stem(self, text_vocab, text_dim))

    def work(self, token_size: int, text_dim: int | None) -> Work:
        """What a forward pass of the model takes; `text_dim` is None where text comes as ids."""
        d = self.hidden_size
        full = self.attention_span == "full"
        once = 2 * (TIME_FEATURES * d + d * d + 6 * d * d) + self.pooled_text * d * d
        return Work(
            # qkv, out, the queries of cross-attention and its out, ffn
            video_weights=2 * token_size * d + self.depth * (6 * d * d + 2 * d * self.ffn),
            text_weights=stem_weights(self, text_dim) + self.depth * 2 * d * d,
            clip_weights=once,
            self_widths=self.depth * d if full else 0,
            space_widths=0 if full else (self.depth + 1) // 2 * d,
            time_widths=0 if full else self.depth // 2 * d,
            cross_widths=self.depth * d,
            text_widths=self.text_depth * d if text_dim is None else 0,
        )

    def activation_bytes(self, value_bytes: int, tokens: int, policy: CheckpointPolicy) -> int:
        """What is kept of a forward pass of `tokens` video tokens, and of the blocks done again.

        Counted tensor by tensor (tests/model_zoo/test_memory.py). Text and what acts once a clip
        are left out. `value_bytes`: 2 for bf16, 4 for fp32.
        """
        d = self.hidden_size
        block = self._block_bytes(value_bytes)
        kept = {
            "none": block,
            "full": d * value_bytes,
            "selective": 3 * d * value_bytes + 8 * self.num_heads,  # and what both attentions give
        }
        total = 0
        for i in range(self.depth):
            mode = policy.mode
            if mode == "every_k":
                mode = "full" if policy.applies(i) else "none"
            total += kept[mode]
        if policy.mode != "none":
            total += block  # of the one that is computed again
        # Its rotation, two numbers a pair; and the head's norm in float32, shift, scale and input.
        once = 4 * self.head_dim + 3 * 4 * d + value_bytes * d
        return tokens * (total + once)

    def _block_bytes(self, value_bytes: int) -> int:
        """Kept of one block for one token: norms, gates and modulation in float32, the rest as
        weights.

        In float32, two of them are one and the same tensor.
        """
        d, f = self.hidden_size, self.ffn
        # Means, deviations and logarithms of sums, float32.
        per_head = 3 if self.qk_norm == "head" else 0
        small = 4 * (6 + (per_head + 2) * self.num_heads)
        if value_bytes == 4:
            return 4 * (28 * d + 2 * f) + small
        return 4 * 16 * d + value_bytes * (14 * d + 2 * f) + small


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and last are modulated."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        # Rows: shift, scale and gate of attention, then of feed-forward.
        self.modulation = nn.Parameter(torch.zeros(6, hidden_size))
        with torch.no_grad():
            self.modulation[2::3] = config.gate_init
        self.attention = SelfAttention(hidden_size, config.num_heads, config.qk_norm)
        self.cross_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attention = CrossAttention(hidden_size, config.num_heads, config.qk_norm)
        self.ffn = FeedForward(hidden_size, config.ffn, gelu=config.gelu)

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

    def __init__(self, hidden_size: int, token_size: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(2, hidden_size))  # shift, scale
        self.out = Linear(hidden_size, token_size, zero=True)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor) -> Tensor:
        """x (L, D), condition (2B, D) float32, rows (L,) -> (L, P)."""
        shift, scale = (condition[:, None] + self.modulation.float()).unbind(1)  # 2 x (2B, D)
        return self.out(modulate(x, shift, scale, rows))


class DiT(PackedModel):
    """A `Network`: noisy tokens, time and text to an output for each token."""

    def __init__(self, config: DiTConfig, token_size: int, text_stem: nn.Module) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.config = config
        self.embed = Linear(token_size, hidden_size)
        self.text_stem = text_stem
        self.text_pool = Float32Linear(hidden_size, hidden_size) if config.pooled_text else None
        self.time_embedding = nn.Sequential(
            Float32Linear(TIME_FEATURES, hidden_size),
            nn.SiLU(),
            Float32Linear(hidden_size, hidden_size),
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(hidden_size, 6 * hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(hidden_size, token_size)

    def forward(self, tokens: Tensor, t: Tensor, layout: Layout, text: Tensor) -> Tensor:
        """tokens (L, P), t (B,), layout, text (K,) or (K, text_dim) -> (L, P) float32.

        Tokens of `layout.given_mask` are modulated with t = 0, the others with their clip's t.
        """
        segment_ids = layout.segment_ids  # (L,)
        backend = backend_for(self.config.attention, self.embed.weight, tokens.device)
        video_segments, cross_segments, text_segments = pack_segments(layout, backend)
        text_ids = text_segment_ids(layout, text.shape[0])  # (K,)
        rotation = pack_rotations(layout, self.config.head_dim, self.config.rope_theta)
        text = self.text_stem(text, text_segments, text_ids)  # (K, D)

        # Both conditions of every clip, t and t = 0; each token takes one of the 2B rows.
        times = sinusoidal_embedding(1000 * both_times(t), TIME_FEATURES)
        condition = self.time_embedding(times)  # (2B, D)
        if self.text_pool is not None:
            pooled = self.text_pool(mean_by_segment(text, text_ids, layout.cu_text))  # (B, D)
            condition = condition + pooled.repeat(2, 1)
        tables = self.time_projection(condition).unflatten(-1, (6, -1))  # (2B, 6, D)
        rows = condition_rows(layout, segment_ids)  # (L,)

        x = self.embed(tokens.to(self.embed.weight.dtype))  # (L, D)
        spans: tuple[Span, ...] = (Span(video_segments),)
        if self.config.attention_span == "alternate":
            spans = space_and_time(layout, backend)
        places = [(span.arrange(rows), span.arrange(rotation)) for span in spans]
        for i, block in enumerate(self.blocks):
            span, (at, turn) = spans[i % len(spans)], places[i % len(spans)]
            inputs = (span.arrange(x), tables, at, text, turn, span.segments, cross_segments)
            x = span.restore(self.checkpointing.run(block, i, *inputs))
        return self.head(x, condition, rows).float()  # (L, P)
