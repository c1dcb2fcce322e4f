"""MMDiT over packs of video clips: video and text attend to one another in one sequence.

Kong et al. 2024, "HunyuanVideo: a systematic framework for large video generative models", sec.
4.2; blocks as in github.com/Tencent/HunyuanVideo, hyvideo/modules/models.py. Double-stream blocks,
with weights of their own for video and for text (Esser et al. 2024, SD3), come first, then
single-stream blocks with shared weights, attention beside feed-forward (Black Forest Labs 2024,
Flux). Text is refined by `token_refiner`. Two things differ from HunyuanVideo: the mean text
embedding stands for CLIP's pooled one, and there is no guidance embedding (it distils). Text as ids
is read first by a small encoder that is trained along. Modulation starts at zero, gates at
`gate_init`.

Shapes: B segments, L video tokens, K text tokens, P values in one patch, D width, N heads, d head
dim. Every module runs in every forward pass, whatever the data: under ZeRO-3 all ranks must gather
the same parameters in the same order.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.attention import packed_attention
from model_zoo.checkpointing import CheckpointPolicy, PackedModel
from model_zoo.checks import check_positive, head_dim
from model_zoo.flops import Work
from model_zoo.layers import (
    FeedForward,
    Gelu,
    Linear,
    Modulation,
    QKNorm,
    add_gated,
    check_shared,
    modulate,
    sinusoidal_embedding,
)
from model_zoo.models.token_refiner import TIME_FEATURES, TimeTextEmbedding, TokenRefiner
from model_zoo.pack import (
    JointSequence,
    backend_for,
    both_times,
    condition_rows,
    join_pack,
    text_segment_ids,
)
from model_zoo.protocols import Layout
from model_zoo.rope import AxisPairs, pack_rotations, rotate
from model_zoo.text_stem import TextIdStem, check_text_source, mean_by_segment


@dataclass(frozen=True)
class MMDiTConfig:
    """Size and options of an `MMDiT`; `build` makes it.

    `double_depth`, `single_depth`: blocks with two streams, then with one. `patch_size`: latent
    positions in time, height and width that make one token; whoever feeds the model patchifies.
    `rope_axes`: channels of a head that turn with time, height and width; `rope_theta`: base of
    their frequencies. `gate_init`: where gates start; see `DiTConfig`. `gelu`: "tanh" as
    HunyuanVideo, or "none" for the exact one. `refiner_depth`: layers of the token refiner.
    `text_depth`, `text_max_length`: layers and positions of the encoder of text ids; unused where
    text comes as embeddings. `attention`: see `choose_backend`.
    """

    hidden_size: int
    ffn: int
    num_heads: int
    double_depth: int
    single_depth: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    gate_init: float = 0.0
    gelu: Gelu = "tanh"
    refiner_depth: int = 2
    text_depth: int = 2
    text_max_length: int = 512
    # The kernel that computes attention depends on the machine; the weights do not depend on it.
    attention: str = field(default="auto", metadata={"free": True})

    def __post_init__(self) -> None:
        # No depth may be zero: of a text stream that nobody reads, weights would have no gradient.
        check_positive(self, "hidden_size", "ffn", "num_heads", "text_max_length")
        check_positive(self, "double_depth", "single_depth", "refiner_depth")
        if sum(self.rope_axes) != self.head_dim or any(n < 0 or n % 2 for n in self.rope_axes):
            raise ValueError(
                f"rope_axes={self.rope_axes} must be even and add up to head_dim={self.head_dim}"
            )
        check_shared(self)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return head_dim(self.hidden_size, self.num_heads)

    @property
    def rope_pairs(self) -> AxisPairs:
        """Channel pairs of a head that turn with time, height and width."""
        time, height, hidden_size = self.rope_axes
        return time // 2, height // 2, hidden_size // 2

    @property
    def drops_tokens(self) -> bool:
        """Whether it can do with some of a clip's tokens, as masked training wants."""
        return True

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> "MMDiT":
        """The model, on torch's default device, for tokens of `token_size` values.

        Give `text_vocab` where text comes as ids (K,) or `text_dim` where it comes as embeddings
        (K, text_dim). Raises ValueError where not exactly one of them is given.
        """
        check_text_source(text_vocab, text_dim)
        encoder = None if text_vocab is None else TextIdStem(self, text_vocab)
        return MMDiT(self, token_size, encoder, text_dim or self.hidden_size)

    def work(self, token_size: int, text_dim: int | None) -> Work:
        """What a forward pass of the model takes; `text_dim` is None where text comes as ids."""
        d, depth = self.hidden_size, self.double_depth + self.single_depth
        # qkv, out, ffn: as many in a stream of a double block as in a single one.
        blocks = depth * (4 * d * d + 2 * d * self.ffn)
        encoder_depth = self.text_depth if text_dim is None else 0
        text_dim = text_dim or d
        refine, refine_once = TokenRefiner.weights(text_dim, d, self.refiner_depth)
        time, pooled = TimeTextEmbedding.weights(text_dim, d)
        # Tables of d each, made for both times of a clip; those of the text stream for one alone.
        modulation = (2 * 6 + 6) * self.double_depth + 2 * 3 * self.single_depth + 2 * 2
        return Work(
            video_weights=2 * token_size * d + blocks,
            text_weights=encoder_depth * 12 * d * d + refine + blocks,
            clip_weights=2 * time + pooled + refine_once + modulation * d * d,
            joint_widths=depth * d,
            text_widths=(encoder_depth + self.refiner_depth) * d,
        )

    def activation_bytes(self, value_bytes: int, tokens: int, policy: CheckpointPolicy) -> None:
        """Not known."""


class QKV(nn.Module):
    """Queries, keys and values; the first two are normalised over each head, then rotated."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, chunks=3)
        self.q_norm = QKNorm(hidden_size, num_heads, "head")
        self.k_norm = QKNorm(hidden_size, num_heads, "head")

    def forward(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, D) -> 3 x (n, N, d); rotation (n, 1, d/2, 2), None for no positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # 3 x (n, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v


class DoubleBlock(nn.Module):
    """Two streams, video and text, that meet in attention alone."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        hidden_size, heads, gate = config.hidden_size, config.num_heads, config.gate_init
        # Shift, scale and gate of attention, then of feed-forward.
        self.video_modulation = Modulation(hidden_size, 6, gates=(2, 5), gate_init=gate)
        self.text_modulation = Modulation(hidden_size, 6, gates=(2, 5), gate_init=gate)
        self.video_qkv, self.text_qkv = QKV(hidden_size, heads), QKV(hidden_size, heads)
        self.video_out, self.text_out = (
            Linear(hidden_size, hidden_size),
            Linear(hidden_size, hidden_size),
        )
        self.video_ffn = FeedForward(hidden_size, config.ffn, gelu=config.gelu)
        self.text_ffn = FeedForward(hidden_size, config.ffn, gelu=config.gelu)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        condition: Tensor,
        rows: Tensor,
        text_ids: Tensor,
        rotation: Tensor,
        joint: JointSequence,
    ) -> tuple[Tensor, Tensor]:
        """x (L, D), text (K, D), condition (2B, D) float32 -> (L, D), (K, D).

        rows (L,) and text_ids (K,): the condition of each token; text takes its clip's t.
        """
        at_t, _ = condition.chunk(2)  # (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.video_modulation(condition)  # (2B, D)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.text_modulation(at_t)

        video_qkv = self.video_qkv(modulate(x, shift1, scale1, rows), rotation)  # 3 x (L, N, d)
        text_qkv = self.text_qkv(modulate(text, t_shift1, t_scale1, text_ids), None)
        q, k, v = (joint.join(*pair) for pair in zip(video_qkv, text_qkv, strict=True))
        y = packed_attention(q, k, v, joint.segments).flatten(1)  # (L+K, D)
        y, text_y = joint.split(y)  # (L, D), (K, D)

        x = add_gated(x, self.video_out(y), gate1, rows)
        x = add_gated(x, self.video_ffn(modulate(x, shift2, scale2, rows)), gate2, rows)
        text = add_gated(text, self.text_out(text_y), t_gate1, text_ids)
        text_y = self.text_ffn(modulate(text, t_shift2, t_scale2, text_ids))
        return x, add_gated(text, text_y, t_gate2, text_ids)


class SingleBlock(nn.Module):
    """One stream of all tokens: attention and feed-forward side by side, added by one projection.

    As in Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters".
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.gelu = config.gelu
        # Shift, scale, gate.
        self.modulation = Modulation(config.hidden_size, 3, gates=(2,), gate_init=config.gate_init)
        self.qkv = QKV(config.hidden_size, config.num_heads)
        self.up = Linear(config.hidden_size, config.ffn)
        self.out = Linear(config.hidden_size + config.ffn, config.hidden_size)

    def forward(
        self, x: Tensor, condition: Tensor, rows: Tensor, rotation: Tensor, joint: JointSequence
    ) -> Tensor:
        """x (L+K, D), condition (2B, D) float32, rows (L+K,) into it -> (L+K, D).

        rotation (L+K, 1, d/2, 2): none where text is.
        """
        shift, scale, gate = self.modulation(condition)  # 3 x (2B, D)
        y = modulate(x, shift, scale, rows)
        q, k, v = self.qkv(y, rotation)  # 3 x (L+K, N, d)
        attended = packed_attention(q, k, v, joint.segments).flatten(1)  # (L+K, D)
        hidden = F.gelu(self.up(y), approximate=self.gelu)  # (L+K, ffn)
        return add_gated(x, self.out(torch.cat([attended, hidden], -1)), gate, rows)


class Head(nn.Module):
    """Modulated norm and the last projection, which starts at zero."""

    def __init__(self, hidden_size: int, token_size: int) -> None:
        super().__init__()
        self.modulation = Modulation(hidden_size, 2)  # shift, scale
        self.out = Linear(hidden_size, token_size, zero=True)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor) -> Tensor:
        """x (L, D), condition (2B, D) float32, rows (L,) -> (L, P)."""
        shift, scale = self.modulation(condition)  # 2 x (2B, D)
        return self.out(modulate(x, shift, scale, rows))


class MMDiT(PackedModel):
    """A `Network`: noisy tokens, time and text to an output for each token."""

    def __init__(
        self, config: MMDiTConfig, token_size: int, text_encoder: TextIdStem | None, text_dim: int
    ) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.config = config
        self.embed = Linear(token_size, hidden_size)
        self.text_encoder = text_encoder
        self.refiner = TokenRefiner(
            text_dim, hidden_size, config.num_heads, config.refiner_depth, config.gate_init
        )
        self.condition = TimeTextEmbedding(text_dim, hidden_size)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.head = Head(hidden_size, token_size)

    def forward(self, tokens: Tensor, t: Tensor, layout: Layout, text: Tensor) -> Tensor:
        """tokens (L, P), t (B,), layout, text (K,) or (K, text_dim) -> (L, P) float32.

        Tokens of `layout.given_mask` are modulated with t = 0, the others and the text with their
        clip's t.
        """
        config, segment_ids = self.config, layout.segment_ids  # (L,)
        backend = backend_for(config.attention, self.embed.weight, tokens.device)
        text_ids = text_segment_ids(layout, text.shape[0])  # (K,)
        ends = (layout.cu_seqlens, layout.cu_text)
        joint, (_, text_segments) = join_pack(ends, (segment_ids, text_ids), backend)
        rotation = pack_rotations(layout, config.head_dim, config.rope_theta, config.rope_pairs)

        # Both conditions of every clip, t and t = 0; each token takes one of the 2B rows.
        times = sinusoidal_embedding(1000 * both_times(t), TIME_FEATURES)  # (2B, 256)
        if self.text_encoder is not None:
            text = self.text_encoder(text, text_segments, text_ids)  # (K, text_dim)
        pooled = mean_by_segment(text, text_ids, layout.cu_text)  # (B, text_dim)
        condition = F.silu(self.condition(times, pooled))  # (2B, D)
        rows = condition_rows(layout, segment_ids)  # (L,)

        x = self.embed(tokens.to(self.embed.weight.dtype))  # (L, D)
        text = self.refiner(text, times.chunk(2)[0], pooled, text_segments, text_ids)  # (K, D)
        for i, block in enumerate(self.double_blocks):
            inputs = (x, text, condition, rows, text_ids, rotation, joint)
            x, text = self.checkpointing.run(block, i, *inputs)

        # From here on in one sequence; text does not turn.
        still = rotation.new_tensor([1.0, 0.0]).expand(text.shape[0], *rotation.shape[1:])  # (K, …)
        together = (condition, joint.join(rows, text_ids), joint.join(rotation, still), joint)
        x = joint.join(x, text)  # (L+K, D)
        for i, block in enumerate(self.single_blocks, start=config.double_depth):
            x = self.checkpointing.run(block, i, x, *together)
        x, _ = joint.split(x)  # (L, D), (K, D)
        return self.head(x, condition, rows).float()  # (L, P)
