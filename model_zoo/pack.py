"""How the clips lie in a pack, as the models want it.

Shapes: B segments, L video tokens, K text tokens.
"""

from collections.abc import Sequence
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
    """Tokens of several kinds (video, text, …) as one sequence: a segment's of each kind in turn.

    Made once a forward pass, of tensors alone; see `Segments`.
    """

    segments: Segments  # of the joint sequence to itself
    order: Tensor  # (J,) int64: which of all tokens, kind after kind, stands at each place
    places: tuple[Tensor, ...]  # by kind, (n,) int64: the place of each token

    def join(self, *kinds: Tensor) -> Tensor:
        """(n, …) of each kind -> (J, …)."""
        return torch.cat(kinds).index_select(0, self.order)

    def split(self, joint: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`."""
        return tuple(joint.index_select(0, places) for places in self.places)


def join_pack(
    ends: Sequence[Tensor], ids: Sequence[Tensor], backend: AttentionBackend
) -> tuple[JointSequence, tuple[Segments, ...]]:
    """The joint sequence, and the segments of each kind to itself.

    ends: by kind, (B+1,) offsets of its segments. ids: by kind, (n,) the segment of each token.
    Boundaries are read to the host once.
    """
    places = []
    for kind, of in enumerate(ids):
        # Before a token stand those of its kind, and of the other kinds those of earlier segments;
        # of its own too where the other kind comes first.
        before = torch.zeros_like(ends[0][:-1], dtype=torch.int64)  # (B,)
        for other, others in enumerate(ends):
            if other != kind:
                before = before + (others[1:] if other < kind else others[:-1])
        places.append(torch.arange(of.shape[0], device=of.device) + before[of])
    place = torch.cat(places)  # (J,)
    order = torch.empty_like(place)
    order[place] = torch.arange(place.shape[0], device=place.device)
    joint, host = sum(ends[1:], ends[0]), torch.stack([end.int() for end in ends]).tolist()
    joint_host = [sum(column) for column in zip(*host, strict=True)]
    kinds = tuple(
        Segments.of(end, end, backend, (own, own)) for end, own in zip(ends, host, strict=True)
    )
    segments = Segments.of(joint, joint, backend, (joint_host, joint_host))
    return JointSequence(segments, order, tuple(places)), kinds


def both_times(t: Tensor) -> Tensor:
    """(B,) -> (2B,): each clip's time, then t = 0, which is the time of tokens that are given."""
    return torch.cat([t, torch.zeros_like(t)])


def condition_rows(layout: Layout, segment_ids: Tensor) -> Tensor:
    """(L,) int64: which of the 2B conditions of `both_times` each video token takes."""
    return segment_ids + layout.grid.shape[0] * layout.given_mask
