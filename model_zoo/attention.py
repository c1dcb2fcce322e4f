"""Packed attention: the one place where queries meet keys, and the only one that knows kernels.

Shapes: B segments (clips), Lq queries and Lk keys in a pack, N heads, d head dim.
A pack holds segments end to end; segment b's queries see segment b's keys and nothing else.
`Segments` says where segments lie; it is made once a forward pass and shared by all layers, so that
boundaries are read to the host once. Invariant: what stands in one segment, a NaN included, never
reaches another.
"""

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Literal["varlen", "flash_attn", "sdpa", "dense"]

_log = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Run:
    """Consecutive segments of equal lengths: one batched attention call."""

    num_segments: int
    q_length: int
    k_length: int


@dataclass(frozen=True)
class Segments:
    """Where the segments of queries and keys lie, and which kernel attends within them."""

    cu_q: Tensor  # (B+1,) int32, ends with Lq
    cu_k: Tensor  # (B+1,) int32, ends with Lk
    max_q: int
    max_k: int
    runs: tuple[Run, ...]  # in order; they cover the queries and the keys exactly
    backend: AttentionBackend

    @staticmethod
    def of(
        cu_q: Tensor,
        cu_k: Tensor,
        backend: AttentionBackend,
        host: tuple[list[int], list[int]] | None = None,
    ) -> "Segments":
        """Prepare cu_q and cu_k, both (B+1,); `host` is the same as lists, to spare a device sync.

        Raises ValueError where the two do not have equally many segments.
        """
        if cu_q.shape != cu_k.shape:
            raise ValueError(
                f"cu_q has {cu_q.shape[0] - 1} segments and cu_k {cu_k.shape[0] - 1}: "
                "queries and keys must have the same segments; keep empty ones in both"
            )
        ends_q, ends_k = host or (cu_q.tolist(), cu_k.tolist())
        lengths = [
            (ends_q[b + 1] - ends_q[b], ends_k[b + 1] - ends_k[b]) for b in range(len(ends_q) - 1)
        ]
        runs = tuple(
            Run(len(list(group)), q, k) for (q, k), group in groupby(lengths) if q > 0 or k > 0
        )
        max_q = max((q for q, _ in lengths), default=0)
        max_k = max((k for _, k in lengths), default=0)
        return Segments(cu_q.int(), cu_k.int(), max_q, max_k, runs, backend)

    @staticmethod
    def repeated(counts: Tensor, lengths: Tensor, backend: AttentionBackend) -> "Segments":
        """Segments that attend to themselves: counts[i] of lengths[i] tokens each, end to end.

        counts, lengths (n,) int64; both are read to the host at once.
        """
        host_counts, host_lengths = torch.stack([counts, lengths]).tolist()
        pairs = [(c, n) for c, n in zip(host_counts, host_lengths, strict=True) if c * n > 0]
        runs = tuple(
            Run(sum(count for count, _ in group), length, length)
            for length, group in groupby(pairs, key=lambda pair: pair[1])
        )
        each = torch.repeat_interleave(lengths, counts, output_size=sum(host_counts))
        cu = F.pad(each.cumsum(0, dtype=torch.int32), (1, 0))
        longest = max((run.q_length for run in runs), default=0)
        return Segments(cu, cu, longest, longest, runs, backend)


def check_backend_name(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a backend, whether or not it runs here."""
    names = ("auto", *get_args(AttentionBackend))
    if name not in names:
        raise ValueError(f"attention={name!r} is not known; use one of {', '.join(names)}")


@cache
def choose_backend(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> AttentionBackend:
    """The kernel for `dtype` on `device`, decided once and logged.

    "auto" takes `varlen_attn` (FlashAttention-2 inside torch) on CUDA in half precision, and SDPA
    over runs of equal segments elsewhere. Raises ValueError for an unknown name, and for a named
    kernel that cannot run here.
    """
    check_backend_name(name)
    device = torch.device(device)
    if name == "auto":
        half_on_cuda = device.type == "cuda" and dtype in _HALF
        name = "varlen" if half_on_cuda and _has_varlen() else "sdpa"
    if name in ("varlen", "flash_attn"):
        if device.type != "cuda" or dtype not in _HALF:
            raise ValueError(
                f"attention={name!r} runs on CUDA in bf16 or fp16, not on {device.type} in {dtype};"
                " use 'auto'"
            )
        if name == "varlen" and not _has_varlen():
            raise ValueError(f"attention='varlen' needs torch >= 2.10, not {torch.__version__}")
        if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            raise ValueError("attention='flash_attn' needs that package; pip install longtake[gpu]")
    _log.info("attention: %s on %s in %s", name, device, dtype)
    return cast(AttentionBackend, name)


def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each segment; self- and cross-attention alike.

    q (Lq, N, d); k, v (Lk, N, d), all of one dtype -> (Lq, N, d). Segments may be empty; queries of
    a segment without keys give zeros.
    """
    if segments.backend == "sdpa":
        return _attend_runs(q, k, v, segments.runs)
    if segments.backend == "dense":
        return dense_attention(q, k, v, segments.cu_q, segments.cu_k)
    if segments.max_k == 0:  # no keys at all: nothing to launch a kernel on
        return torch.zeros_like(q)
    cu_q, cu_k = segments.cu_q, segments.cu_k
    if segments.backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return cast(Tensor, varlen_attn(q, k, v, cu_q, cu_k, segments.max_q, segments.max_k))
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, segments.max_q, segments.max_k)


def _attend_runs(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """One SDPA call a run. The planner sorts a pack's clips by length, so that runs are few.

    Batched, a rectangular pack is 1.4 times as fast on a CPU as a loop over its segments.
    """
    q_runs = q.split([run.num_segments * run.q_length for run in runs])
    k_lengths = [run.num_segments * run.k_length for run in runs]
    outputs = []
    for run, q_run, k_run, v_run in zip(
        runs, q_runs, k.split(k_lengths), v.split(k_lengths), strict=True
    ):
        if run.q_length == 0:
            continue
        if run.k_length == 0:
            outputs.append(torch.zeros_like(q_run))
            continue
        out = F.scaled_dot_product_attention(
            q_run.unflatten(0, (run.num_segments, run.q_length)).transpose(1, 2),  # (b, N, q, d)
            k_run.unflatten(0, (run.num_segments, run.k_length)).transpose(1, 2),  # (b, N, k, d)
            v_run.unflatten(0, (run.num_segments, run.k_length)).transpose(1, 2),  # (b, N, k, d)
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (b * q, N, d)
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """The oracle: one softmax over an (Lq, Lk) mask, in plain operations; for tests.

    q (Lq, N, d); k, v (Lk, N, d); cu_q, cu_k (B+1,) -> (Lq, N, d).
    """
    q_ids = torch.searchsorted(cu_q, torch.arange(q.shape[0], device=q.device), right=True)
    k_ids = torch.searchsorted(cu_k, torch.arange(k.shape[0], device=q.device), right=True)
    allowed = q_ids[:, None] == k_ids[None, :]  # (Lq, Lk)
    scores = torch.einsum("qnd,knd->nqk", q, k) * q.shape[-1] ** -0.5
    # A finite minimum, so that a row without any key stays finite until it is zeroed below.
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * allowed
    return torch.einsum("nqk,knd->qnd", weights, v)
