"""How the clips lie in a pack, as the models want it.

Shapes: B segments, L video tokens, K text tokens.
"""

import torch
from torch import Tensor

from model_zoo.attention import AttentionBackend, Segments, choose_backend
from model_zoo.protocols import Layout


def backend_for(name: str, weight: Tensor, device: torch.device) -> AttentionBackend:
    """The attention kernel `name` for a model whose weights are like `weight`, or its autocast."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    return choose_backend(name, device, dtype)


def pack_segments(layout: Layout, backend: AttentionBackend) -> tuple[Segments, Segments, Segments]:
    """Of video to video, video to text, text to text; boundaries are read to the host once."""
    video, text = torch.stack([layout.cu_seqlens, layout.cu_text]).tolist()
    return (
        Segments.of(layout.cu_seqlens, layout.cu_seqlens, backend, (video, video)),
        Segments.of(layout.cu_seqlens, layout.cu_text, backend, (video, text)),
        Segments.of(layout.cu_text, layout.cu_text, backend, (text, text)),
    )


def text_segment_ids(layout: Layout, num_text: int) -> Tensor:
    """(K,) int64: the segment of each text token."""
    lengths = layout.cu_text.diff().long()
    segments = torch.arange(lengths.shape[0], device=lengths.device)
    return torch.repeat_interleave(segments, lengths, output_size=num_text)


def both_times(t: Tensor) -> Tensor:
    """(B,) -> (2B,): each clip's time, then t = 0, which is the time of tokens that are given."""
    return torch.cat([t, torch.zeros_like(t)])


def condition_rows(layout: Layout, segment_ids: Tensor) -> Tensor:
    """(L,) int64: which of the 2B conditions of `both_times` each video token takes."""
    return segment_ids + layout.grid.shape[0] * layout.given_mask
