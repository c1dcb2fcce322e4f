"""The original DiT (Peebles and Xie 2023), over packs of video clips.

"Scalable diffusion models with transformers"; blocks as in github.com/facebookresearch/DiT,
models.py: adaLN-Zero from a linear layer in each block, attention without a norm of queries and
keys, a feed-forward of four times the width, fixed sine-cosine positions (`model_zoo.sincos` says
how time joins them). A clip of one frame gets DiT's own numbers from DiT's own weights.

The condition of a clip is time plus text, and there is no attention to text. With `text_depth=0`
and one id a clip, the id of its class, text is DiT's: a row of a label table, in which the null
condition (the empty caption) is a row as well. Otherwise it is the mean of the clip's text tokens,
so that captions work too, with what a mean can tell; no text at all adds nothing.

Shapes: B segments, L video tokens, K text tokens, P values in one patch, D width.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.attention import Segments
from model_zoo.checkpointing import CheckpointPolicy, PackedModel
from model_zoo.checks import check_positive, head_dim
from model_zoo.flops import Work
from model_zoo.layers import (
    FeedForward,
    Float32Linear,
    Gelu,
    Linear,
    SelfAttention,
    add_gated,
    check_shared,
    modulate,
    sinusoidal_embedding,
)
from model_zoo.pack import (
    backend_for,
    both_times,
    condition_rows,
    pack_segments,
    text_segment_ids,
)
from model_zoo.protocols import Layout
from model_zoo.sincos import pack_sincos
from model_zoo.text_stem import build_text_stem, mean_by_segment, stem_weights

TIME_FEATURES = 256  # sinusoids of the time embedding
FFN_RATIO = 4  # the feed-forward's hidden channels, over the width


@dataclass(frozen=True)
class OriginalDiTConfig:
    """Size and options of an `OriginalDiT`; `build` makes it.

    `patch_size`: latent positions in time, height and width that make one token. `gelu`: "tanh" as
    published, or "none" for the exact one. `learn_sigma`: the last layer gives 2P values as the
    published weights do, of which the first P are the prediction. The others say where the variance
    of a reverse step lies between its bounds (Nichol and Dhariwal 2021, eq. 15); no objective of
    ours reads them, so they are cut off and get no gradient. `text_depth`, `text_max_length`: of
    the encoder of text ids; depth 0 is the label table. `attention`: see `choose_backend`.
    """

    hidden_size: int
    num_heads: int
    depth: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    gelu: Gelu = "tanh"
    learn_sigma: bool = False
    text_depth: int = 0
    text_max_length: int = 512
    # The kernel that computes attention depends on the machine; the weights do not depend on it.
    attention: str = field(default="auto", metadata={"free": True})

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_heads", "depth", "text_max_length")
        head_dim(self.hidden_size, self.num_heads)
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by 4: sines, cosines, two axes"
            )
        check_shared(self)

    @property
    def drops_tokens(self) -> bool:
        """Whether it can do with some of a clip's tokens, as masked training wants."""
        return True

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> "OriginalDiT":
        """The model, on torch's default device, for tokens of `token_size` values.

        Give `text_vocab` where text comes as ids (K,) or `text_dim` where it comes as embeddings
        (K, text_dim). Raises ValueError where not exactly one of them is given.
        """
        if self.text_depth == 0 and text_vocab is not None and text_dim is None:
            return OriginalDiT(self, token_size, LabelTable(text_vocab, self.hidden_size))
        return OriginalDiT(self, token_size, build_text_stem(self, text_vocab, text_dim))

    def work(self, token_size: int, text_dim: int | None) -> Work:
        """What a forward pass of the model takes; `text_dim` is None where text comes as ids."""
        d, outputs = self.hidden_size, token_size * (1 + self.learn_sigma)
        modulation = self.depth * 6 * d * d + 2 * d * d
        return Work(
            # qkv, out, ffn
            video_weights=(token_size + outputs) * d + self.depth * (4 + 2 * FFN_RATIO) * d * d,
            text_weights=stem_weights(self, text_dim),
            clip_weights=2 * (TIME_FEATURES * d + d * d + modulation),  # for t and for t = 0
            self_widths=self.depth * d,
            text_widths=self.text_depth * d if text_dim is None else 0,
        )

    def activation_bytes(self, value_bytes: int, tokens: int, policy: CheckpointPolicy) -> None:
        """Not known."""


class LabelTable(nn.Embedding):
    """A text stem that is a row an id: for classes, one id a clip."""

    def reset_parameters(self) -> None:
        """Normal rows of deviation .02."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, text: Tensor, *_: object) -> Tensor:
        """text (K,) int64 -> (K, D)."""
        return super().forward(text)


class Block(nn.Module):
    """Self-attention and feed-forward, both modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: OriginalDiTConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.modulation = Float32Linear(hidden_size, 6 * hidden_size, zero=True)
        self.attention = SelfAttention(hidden_size, config.num_heads, qk_norm=None)
        self.ffn = FeedForward(hidden_size, FFN_RATIO * hidden_size, gelu=config.gelu)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor, segments: Segments) -> Tensor:
        """x (L, D), condition (2B, D) float32, rows (L,) into it -> (L, D)."""
        tables = self.modulation(condition).chunk(6, dim=-1)  # 6 x (2B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = tables
        x = add_gated(x, self.attention(modulate(x, shift1, scale1, rows), segments), gate1, rows)
        return add_gated(x, self.ffn(modulate(x, shift2, scale2, rows)), gate2, rows)


class Head(nn.Module):
    """Modulated norm and the last projection; both start at zero."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.modulation = Float32Linear(hidden_size, 2 * hidden_size, zero=True)
        self.out = Linear(hidden_size, outputs, zero=True)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor) -> Tensor:
        """x (L, D), condition (2B, D) float32, rows (L,) -> (L, P) or, with sigma, (L, 2P)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)  # 2 x (2B, D)
        return self.out(modulate(x, shift, scale, rows))


class OriginalDiT(PackedModel):
    """A `Network`: noisy tokens, time and a class (or captions) to an output for each token."""

    def __init__(self, config: OriginalDiTConfig, token_size: int, text_stem: nn.Module) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.config = config
        self.embed = Linear(token_size, hidden_size)
        self.text_stem = text_stem
        self.time_embedding = nn.Sequential(
            Float32Linear(TIME_FEATURES, hidden_size),
            nn.SiLU(),
            Float32Linear(hidden_size, hidden_size),
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(hidden_size, token_size * (1 + config.learn_sigma))

    def forward(self, tokens: Tensor, t: Tensor, layout: Layout, text: Tensor) -> Tensor:
        """tokens (L, P), t (B,), layout, text (K,) or (K, text_dim) -> (L, P) float32.

        Tokens of `layout.given_mask` are modulated with t = 0, the others with their clip's t.
        """
        backend = backend_for(self.config.attention, self.embed.weight, tokens.device)
        video_segments, _, text_segments = pack_segments(layout, backend)
        text_ids = text_segment_ids(layout, text.shape[0])  # (K,)
        text = self.text_stem(text, text_segments, text_ids)  # (K, D)
        label = mean_by_segment(text, text_ids, layout.cu_text)  # (B, D)

        # Both conditions of every clip, t and t = 0; each token takes one of the 2B rows.
        times = sinusoidal_embedding(1000 * both_times(t), TIME_FEATURES)
        condition = F.silu(self.time_embedding(times) + label.repeat(2, 1))  # (2B, D)
        rows = condition_rows(layout, layout.segment_ids)  # (L,)

        x = self.embed(tokens.to(self.embed.weight.dtype))  # (L, D)
        x = (x + pack_sincos(layout, self.config.hidden_size)).to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = self.checkpointing.run(block, i, x, condition, rows, video_segments)
        return self.head(x, condition, rows)[:, : tokens.shape[1]].float()  # (L, P)
