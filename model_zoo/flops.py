"""Parameters and FLOPs of a `DiT` in closed form, for MFU, plans and tests.

A multiplication with its addition is two FLOPs; only matrix products count, as in
`torch.utils.flop_counter`. Shapes: n_b video and k_b text tokens of clip b, D width.
"""

from collections.abc import Sequence

from model_zoo.dit import TIME_FEATURES, DiTConfig


def _linear(size_in: int, size_out: int) -> int:
    return size_in * size_out + size_out


def parameter_count(
    config: DiTConfig, token_size: int, text_vocab: int | None, text_dim: int | None
) -> int:
    """Number of parameters of `config.build(token_size, text_vocab, text_dim)`."""
    d, qk_norms = config.width, 2 * config.head_dim
    self_attention = _linear(d, 3 * d) + qk_norms + _linear(d, d)
    cross_attention = _linear(d, d) + _linear(d, 2 * d) + qk_norms + _linear(d, d)
    ffn = _linear(d, config.ffn) + _linear(config.ffn, d)
    block = 6 * d + self_attention + 2 * d + cross_attention + ffn
    head = 2 * d + _linear(d, token_size)
    time = _linear(TIME_FEATURES, d) + _linear(d, d) + _linear(d, 6 * d)
    if text_vocab is not None:
        text_block = 4 * d + self_attention + _linear(d, 4 * d) + _linear(4 * d, d)
        tables = (text_vocab + config.text_max_length) * d
        text = tables + config.text_depth * text_block + 2 * d
    else:
        text = _linear(text_dim or 0, d) + _linear(d, d)
    pool = _linear(d, d)
    return _linear(token_size, d) + text + pool + time + config.depth * block + head


def video_weights(config: DiTConfig, token_size: int) -> int:
    """Weights in matrices that each video token passes: MFU's N.

    Left out are those that act once a clip (time, modulation) or on text tokens only.
    """
    d = config.width
    block = 3 * d * d + d * d + 2 * d * d + 2 * d * config.ffn  # qkv, out, cross q and out, ffn
    return 2 * token_size * d + config.depth * block


def forward_flops(
    config: DiTConfig,
    token_size: int,
    video_lengths: Sequence[int],
    text_lengths: Sequence[int],
    text_dim: int | None,
) -> int:
    """FLOPs of one forward pass of a pack whose segments have these lengths (n_b), (k_b).

    `text_dim` as in `build`; None where text comes as ids.
    """
    d, layers, segments = config.width, config.depth, len(video_lengths)
    num_tokens, num_text = sum(video_lengths), sum(text_lengths)
    self_pairs = sum(n * n for n in video_lengths)
    cross_pairs = sum(n * k for n, k in zip(video_lengths, text_lengths, strict=True))
    video = 2 * video_weights(config, token_size) * num_tokens
    attention = 4 * d * layers * (self_pairs + cross_pairs)  # q k^T and weights v
    text = 2 * layers * 2 * d * d * num_text  # keys and values of every block
    if text_dim is None:
        text += config.text_depth * 2 * 12 * d * d * num_text
        text += config.text_depth * 4 * d * sum(k * k for k in text_lengths)
    else:
        text += 2 * (text_dim * d + d * d) * num_text
    conditions = 2 * segments * (TIME_FEATURES * d + d * d + 6 * d * d)  # t and t = 0
    once_a_clip = 2 * (conditions + segments * d * d)
    return video + attention + text + once_a_clip


def training_flops_per_token(
    config: DiTConfig, token_size: int, video_lengths: Sequence[int]
) -> float:
    """FLOPs that MFU counts for one video token: 6 N + 12 layers D (sum n_b^2 / sum n_b).

    Forward and backward, without recomputation; N is `video_weights`. Cross-attention's scores and
    all work on text are left out (PaLM's convention, Chowdhery et al. 2022, appendix B).
    """
    mean_length = sum(n * n for n in video_lengths) / max(1, sum(video_lengths))
    weights = video_weights(config, token_size)
    return 6 * weights + 12 * config.depth * config.width * mean_length


def cost_coefficients(config: DiTConfig, token_size: int, text_tokens: int) -> tuple[int, int]:
    """(linear, quadratic): a clip of n tokens takes linear * n + quadratic * n^2 forward FLOPs.

    `text_tokens` is the usual length of a caption, whose cross-attention is part of the linear
    term. These are constants for a recipe; the text's own cost, equal for all clips, is left out.
    """
    attention = 4 * config.depth * config.width
    return 2 * video_weights(config, token_size) + attention * text_tokens, attention
