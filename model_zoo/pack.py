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


@dataclass(frozen=True)
class Span:
    """Video tokens that attend to one another, in an order in which they lie side by side.

    The order moves tokens within their clip only, so that whatever is said of whole clips, their
    text and their time, holds in it too.
    """

    segments: Segments
    order: Tensor | None = None  # (L,) int64: the token at each place; None for the pack's order
    place: Tensor | None = None  # (L,) int64: the place of each token, the reverse

    def arrange(self, x: Tensor) -> Tensor:
        """(L, …) in the pack's order -> (L, …) in the span's."""
        return x if self.order is None else x.index_select(0, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """(L, …) in the span's order -> (L, …) in the pack's."""
        return x if self.place is None else x.index_select(0, self.place)


def space_and_time(layout: Layout, backend: AttentionBackend) -> tuple[Span, Span]:
    """The tokens of each time step, and of each place over time (ViViT, Arnab et al. 2021).

    As in `rope.token_positions`, a segment whose grid is zero (padding) is one place over time.
    """
    starts, lengths = layout.cu_seqlens[:-1].long(), layout.cu_seqlens.diff().long()  # (B,)
    places = layout.grid.long().clamp(min=1)[:, 1:].prod(-1)  # (B,) height * width
    steps = lengths // places  # (B,)
    token = torch.arange(layout.given_mask.shape[0], device=starts.device)  # (L,)
    segment = layout.segment_ids  # (L,)
    start, num_places, num_steps = starts[segment], places[segment], steps[segment]  # 3 x (L,)
    step, column = (token - start) // num_places, (token - start) % num_places  # 2 x (L,)
    place = start + column * num_steps + step  # (L,)
    order = torch.empty_like(place).index_copy_(0, place, token)  # (L,)
    space = Segments.repeated(steps, places, backend)
    time = Segments.repeated(places, steps, backend)
    return Span(space), Span(time, order, place)


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


def joint_segments(layout: Layout, backend: AttentionBackend) -> tuple[Segments, Segments]:
    """Of all tokens of a clip (its time, text and video) to each other, and of text to text."""
    clips = torch.arange(layout.cu_text.shape[0], device=layout.cu_text.device)
    joint = layout.cu_seqlens + layout.cu_text + clips.int()  # (B+1,)
    host_joint, host_text = torch.stack([joint, layout.cu_text]).tolist()
    return (
        Segments.of(joint, joint, backend, (host_joint, host_joint)),
        Segments.of(layout.cu_text, layout.cu_text, backend, (host_text, host_text)),
    )


def joint_places(layout: Layout, num_text: int) -> tuple[Tensor, Tensor]:
    """Where tokens lie when each clip is one sequence of its time, its text and its video.

    -> (J,) int64: for each place of B + K + L its token, counted through all times, then all texts,
    then all videos; (L,) int64: the place of each video token.
    """
    clips = torch.arange(layout.grid.shape[0], device=layout.grid.device)  # (B,)
    of_text, of_video = text_segment_ids(layout, num_text), layout.segment_ids  # (K,), (L,)
    before_video, before_text = layout.cu_seqlens.long(), layout.cu_text.long()  # 2 x (B+1,)
    # Before a token lie those of its kind, and those of the other kinds in all clips before, or in
    # its own too where the other kind comes first.
    time = clips + before_text[:-1] + before_video[:-1]  # (B,)
    text = torch.arange(num_text, device=clips.device) + before_video[of_text] + of_text + 1  # (K,)
    video = torch.arange(of_video.shape[0], device=clips.device)
    video = video + before_text[of_video + 1] + of_video + 1  # (L,)
    place = torch.cat([time, text, video])  # (J,)
    order = torch.empty_like(place)
    order[place] = torch.arange(place.shape[0], device=place.device)
    return order, video
