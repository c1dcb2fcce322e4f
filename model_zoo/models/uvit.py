"""U-ViT (Bao et al. 2023) over packs of video clips: everything is a token.

"All are worth words: a ViT backbone for diffusion models"; blocks as in github.com/baofff/U-ViT,
libs/uvit.py. Time, text and video of a clip are one sequence, in this order, through plain pre-norm
blocks without modulation; the output of each block of the first half joins the input of its mirror
in the second: concatenated, then a linear layer.

What differs: positions are fixed sines and cosines, since sizes vary, where the paper learns a
table for one size (text has those of its stem). The last layer is the linear one; the paper follows
it with a 3 x 3 convolution over the image, a small gain (sec. 3.1), but packed tokens form no
image. That layer starts at zero, and queries, keys and values have biases, as in our other models.

Time is one token a clip, so no token can have a time of its own. Tokens that are given
(`layout.given_mask`) get a learned embedding instead, which starts at zero: they are marked, not
modulated with t = 0, and the time token speaks of the others.

Shapes: B segments, L video tokens, K text tokens, J = B + K + L tokens of all kinds, P values in
one patch, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model_zoo.attention import Segments
from model_zoo.checkpointing import CheckpointPolicy, PackedModel
from model_zoo.checks import check_positive, head_dim
from model_zoo.flops import Work
from model_zoo.layers import (
    FeedForward,
    Gelu,
    Linear,
    SelfAttention,
    check_shared,
    sinusoidal_embedding,
)
from model_zoo.pack import backend_for, join_pack, text_segment_ids
from model_zoo.protocols import Layout
from model_zoo.sincos import pack_sincos
from model_zoo.text_stem import build_text_stem, stem_weights


@dataclass(frozen=True)
class UViTConfig:
    """Size and options of a `UViT`; `build` makes it.

    `depth` counts all blocks, an odd number: as many before the middle one as after it.
    `patch_size`: latent positions in time, height and width that make one token. `gelu`: "none",
    the exact one, as published, or "tanh". `text_depth`, `text_max_length`: layers and positions of
    the encoder of text ids; unused where text comes as embeddings. `attention`: see
    `choose_backend`.
    """

    hidden_size: int
    ffn: int
    num_heads: int
    depth: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    gelu: Gelu = "none"
    text_depth: int = 2
    text_max_length: int = 512
    # The kernel that computes attention depends on the machine; the weights do not depend on it.
    attention: str = field(default="auto", metadata={"free": True})

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "ffn", "num_heads", "depth", "text_max_length")
        head_dim(self.hidden_size, self.num_heads)
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by 4: sines, cosines, two axes"
            )
        if self.depth % 2 == 0:
            raise ValueError(f"depth={self.depth} must be odd; try {self.depth + 1}")
        check_shared(self)

    @property
    def num_skips(self) -> int:
        """Blocks before the middle one, and after it."""
        return self.depth // 2

    @property
    def drops_tokens(self) -> bool:
        """Whether it can do with some of a clip's tokens, as masked training wants."""
        return True

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> "UViT":
        """The model, on torch's default device, for tokens of `token_size` values.

        Give `text_vocab` where text comes as ids (K,) or `text_dim` where it comes as embeddings
        (K, text_dim). Raises ValueError where not exactly one of them is given.
        """
        return UViT(self, token_size, build_text_stem(self, text_vocab, text_dim))

    def work(self, token_size: int, text_dim: int | None) -> Work:
        """What a forward pass of the model takes; `text_dim` is None where text comes as ids."""
        d = self.hidden_size
        # qkv, out, ffn; skips
        blocks = self.depth * (4 * d * d + 2 * d * self.ffn) + self.num_skips * 2 * d * d
        return Work(
            video_weights=2 * token_size * d + blocks,
            text_weights=stem_weights(self, text_dim) + blocks,
            clip_weights=blocks,  # the time token
            clip_tokens=1,
            joint_widths=self.depth * d,
            text_widths=self.text_depth * d if text_dim is None else 0,
        )

    def activation_bytes(self, value_bytes: int, tokens: int, policy: CheckpointPolicy) -> None:
        """Not known."""


class Block(nn.Module):
    """A pre-norm transformer block; in the second half it first takes in a block of the first."""

    def __init__(self, config: UViTConfig, skip: bool) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.skip = Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, config.num_heads, qk_norm=None)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.ffn = FeedForward(hidden_size, config.ffn, gelu=config.gelu)

    def forward(self, x: Tensor, shallow: Tensor | None, segments: Segments) -> Tensor:
        """x (J, D), shallow (J, D) where the block has a skip -> (J, D)."""
        if self.skip is not None:
            assert shallow is not None
            x = self.skip(torch.cat([x, shallow], dim=-1))  # (J, 2D) -> (J, D)
        x = x + self.attention(self.norm1(x), segments)
        return x + self.ffn(self.norm2(x))


class UViT(PackedModel):
    """A `Network`: noisy tokens, time and text to an output for each token."""

    def __init__(self, config: UViTConfig, token_size: int, text_stem: nn.Module) -> None:
        super().__init__()
        hidden_size, num_skips = config.hidden_size, config.num_skips
        self.config = config
        self.embed = Linear(token_size, hidden_size)
        self.given = nn.Parameter(torch.zeros(hidden_size))
        self.text_stem = text_stem
        self.blocks = nn.ModuleList(Block(config, i > num_skips) for i in range(config.depth))
        self.norm = nn.LayerNorm(hidden_size)
        self.out = Linear(hidden_size, token_size, zero=True)

    def forward(self, tokens: Tensor, t: Tensor, layout: Layout, text: Tensor) -> Tensor:
        """tokens (L, P), t (B,), layout, text (K,) or (K, text_dim) -> (L, P) float32."""
        hidden_size, num_skips = self.config.hidden_size, self.config.num_skips
        backend = backend_for(self.config.attention, self.embed.weight, tokens.device)
        text_ids = text_segment_ids(layout, text.shape[0])  # (K,)
        clips = torch.arange(t.shape[0] + 1, device=t.device)  # (B+1,): a clip has one time token
        ends = (clips, layout.cu_text, layout.cu_seqlens)
        ids = (clips[:-1], text_ids, layout.segment_ids)
        joint, (_, text_segments, _) = join_pack(ends, ids, backend)

        time = sinusoidal_embedding(1000 * t, hidden_size)  # (B, D)
        text = self.text_stem(text, text_segments, text_ids)  # (K, D)
        x = self.embed(tokens.to(self.embed.weight.dtype))  # (L, D)
        given = layout.given_mask[:, None] * self.given  # (L, D)
        x = (x + given + pack_sincos(layout, hidden_size)).to(x.dtype)
        x = joint.join(time.to(x.dtype), text.to(x.dtype), x)  # (J, D)

        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            shallow = skips.pop() if i > num_skips else None
            x = self.checkpointing.run(block, i, x, shallow, joint.segments)
            if i < num_skips:
                skips.append(x)
        _, _, video = joint.split(x)  # (L, D)
        return self.out(self.norm(video)).float()  # (L, P)
