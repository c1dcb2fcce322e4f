"""How the clips lie in a pack, as the models want it.

Shapes: B segments, L video tokens, K text tokens.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class JointSequence:
    """Video and text of a pack as one sequence: each segment's video tokens, then its text tokens.

    Made once a forward pass, of tensors alone; see `Segments`.
    """

    segments: Segments  # of the joint sequence to itself
    order: Tensor  # (L+K,) int64: which of [video, text] stands at each place
    video: Tensor  # (L,) int64: the place of each video token
    text: Tensor  # (K,) int64: the place of each text token

    def join(self, video: Tensor, text: Tensor) -> Tensor:
        """video (L, …), text (K, …) -> (L+K, …)."""
        return torch.cat([video, text]).index_select(0, self.order)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`: (L+K, …) -> (L, …), (K, …)."""
        return joint.index_select(0, self.video), joint.index_select(0, self.text)


def join_pack(
    layout: Layout, segment_ids: Tensor, text_ids: Tensor, backend: AttentionBackend
) -> tuple[JointSequence, Segments]:
    """The joint sequence, and the segments of text to text; boundaries are read to the host once.

    segment_ids (L,) and text_ids (K,): the segment of each video and each text token.
    """
    cu_video, cu_text = layout.cu_seqlens, layout.cu_text  # 2 x (B+1,)
    num_video, num_text = segment_ids.shape[0], text_ids.shape[0]
    index = torch.arange(num_video + num_text, device=segment_ids.device)  # (L+K,)
    # Before a video token stands the text of earlier segments, before a text token also the video
    # of its own.
    video = index[:num_video] + cu_text[:-1][segment_ids]  # (L,)
    text = index[:num_text] + cu_video[1:][text_ids]  # (K,)
    places = torch.cat([video, text])  # (L+K,)
    order = torch.empty_like(places).scatter_(0, places, index)
    ends_video, ends_text = torch.stack([cu_video, cu_text]).tolist()
    ends = [v + k for v, k in zip(ends_video, ends_text, strict=True)]
    joint = Segments.of(cu_video + cu_text, cu_video + cu_text, backend, (ends, ends))
    text_segments = Segments.of(cu_text, cu_text, backend, (ends_text, ends_text))
    return JointSequence(joint, order, video, text), text_segments


def both_times(t: Tensor) -> Tensor:
    """(B,) -> (2B,): each clip's time, then t = 0, which is the time of tokens that are given."""
    return torch.cat([t, torch.zeros_like(t)])


def condition_rows(layout: Layout, segment_ids: Tensor) -> Tensor:
    """(L,) int64: which of the 2B conditions of `both_times` each video token takes."""
    return segment_ids + layout.grid.shape[0] * layout.given_mask
