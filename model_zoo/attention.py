"""Packed attention: the one place where queries meet keys, and the only one that knows kernels.

Shapes: B segments (clips), Lq queries and Lk keys in a pack, N heads, d head dim.
A pack holds segments end to end; segment b's queries see segment b's keys and nothing else.
`Segments` says where segments lie; it is made once a forward pass and shared by all layers, so that
boundaries are read to the host once. Kernels stand behind one operator, registered with torch, so
that a block is compiled once for packs of any lengths. Invariant: what stands in
one segment, a NaN included, never reaches another.
"""

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# fa4, fa3: those packages, under torch's own operator; varlen: FlashAttention-2 inside torch;
# flash_attn: that package, version 2; sdpa: runs of equal segments; dense: the oracle.
AttentionBackend = Literal["fa4", "fa3", "flash_attn", "varlen", "sdpa", "dense"]

_log = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)
# Backend -> the module that it needs; torch >= 2.10 takes the first two under its own operator.
_MODULES = {
    "fa4": "flash_attn.cute",
    "fa3": "flash_attn_interface",
    "flash_attn": "flash_attn",
    "varlen": "torch.nn.attention.varlen",
}


@dataclass(frozen=True)
class Run:
    """Consecutive segments of equal lengths: one batched attention call."""

    num_segments: int
    q_length: int
    k_length: int


@dataclass(frozen=True)
class Segments:
    """Where the segments of queries and keys lie, and which kernel attends within them.

    Tensors and a name alone: a number that changes from pack to pack would compile a block anew.
    """

    cu_q: Tensor  # (B+1,) int32, ends with Lq
    cu_k: Tensor  # (B+1,) int32, ends with Lk
    lengths: Tensor  # (2, B) int64 on the CPU: queries and keys of each segment
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
        lengths = torch.tensor(host or (cu_q.tolist(), cu_k.tolist())).diff()
        return Segments(cu_q.int(), cu_k.int(), lengths, backend)

    @staticmethod
    def repeated(counts: Tensor, lengths: Tensor, backend: AttentionBackend) -> "Segments":
        """Segments that attend to themselves: counts[i] of lengths[i] tokens each, end to end.

        counts, lengths (n,) int64; both are read to the host at once.
        """
        host_counts, host_lengths = torch.stack([counts, lengths]).cpu()
        each = torch.repeat_interleave(host_lengths, host_counts)
        cu = F.pad(each.cumsum(0), (1, 0)).int().to(counts.device)
        return Segments(cu, cu, torch.stack([each, each]), backend)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """In order; they cover the queries and the keys exactly."""
        return _runs(self.lengths)


def _runs(lengths: Tensor) -> tuple[Run, ...]:
    pairs = lengths.t().tolist()
    return tuple(Run(len(list(group)), q, k) for (q, k), group in groupby(pairs) if q or k)


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

    "auto" takes, on CUDA in half precision, the newest FlashAttention that is installed and knows
    the GPU, and SDPA over runs of equal segments elsewhere. Raises ValueError for an unknown name,
    and for a named kernel that cannot run here.
    """
    check_backend_name(name)
    device = torch.device(device)
    if name == "auto":
        candidates = [kernel for kernel in _MODULES if not _refusal(kernel, device, dtype)]
        name = candidates[0] if candidates else "sdpa"
    elif refusal := _refusal(name, device, dtype):
        raise ValueError(f"attention={name!r} {refusal}; use 'auto'")
    if name in ("fa3", "fa4"):
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(name.upper())
    _log.info("attention: %s on %s in %s", name, device, dtype)
    return cast(AttentionBackend, name)


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel cannot run here, or ""."""
    if name not in _MODULES:
        return ""
    if device.type != "cuda" or dtype not in _HALF:
        return f"runs on CUDA in bf16 or fp16, not on {device.type} in {dtype}"
    if not _is_installed(_MODULES[name]):
        return f"needs the module {_MODULES[name]}, which is not installed"
    known = {"fa3": (9,), "fa4": (9, 10)}.get(name)  # torch/nn/attention/_fa3.py, _fa4.py
    if known and (major := torch.cuda.get_device_capability(device)[0]) not in known:
        return f"does not know a GPU of compute capability {major}"
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each segment; self-, cross- and joint attention alike.

    q (Lq, N, d); k, v (Lk, N, d), all of one dtype -> (Lq, N, d). Segments may be empty; queries of
    a segment without keys give zeros.
    """
    if segments.backend == "dense":
        return dense_attention(q, k, v, segments.cu_q, segments.cu_k)
    # Calling an operator of one's own costs a CPU .3 ms, a tenth of a step of the demo's model.
    if segments.backend == "sdpa" and not (q.is_cpu and torch.compiler.is_compiling()):
        return _attend_runs(q, k, v, segments.runs)
    inputs = (q, k, v, segments.cu_q, segments.cu_k, segments.lengths)
    return _attend(*inputs, segments.backend)[0]


@torch.library.custom_op("longtake::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, lengths: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Output (Lq, N, d), and the log of each query's sum, (N * Lq,) or (N, Lq) float32."""
    if backend == "sdpa":
        return _forward_runs(q, k, v, _runs(lengths))
    max_q, max_k = lengths.amax(dim=1).tolist()
    if max_q == 0 or max_k == 0:  # nothing to launch a kernel on
        return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    if backend == "flash_attn":
        from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found, unused-ignore]
            _flash_attn_varlen_forward,
        )

        scale = q.shape[-1] ** -0.5
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, False
        )
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, False, False
    )
    return out, lse


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, lengths: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1] * q.shape[0],) if backend == "sdpa" else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("longtake::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    lengths: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if backend == "sdpa":
        return _backward_runs(grad, q, k, v, out, lse, _runs(lengths))
    max_q, max_k = lengths.amax(dim=1).tolist()
    if max_q == 0 or max_k == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if backend == "flash_attn":
        from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found, unused-ignore]
            _flash_attn_varlen_backward,
        )

        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        where = (cu_q, cu_k, max_q, max_k)
        scale = q.shape[-1] ** -0.5
        _flash_attn_varlen_backward(
            grad.contiguous(), q, k, v, out, lse, *grads, *where, 0.0, scale, False,
            -1, -1, 0.0, None, False,
        )  # fmt: skip
        return grads
    # Without dropout nothing is random: the generator's state is of no account.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, False,
        rng_state, unused,
    )  # fmt: skip


@_attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    lengths: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, lengths, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, lengths)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, ctx.backend)
    return (*grads, None, None, None, None)


_attend.register_autograd(_backward, setup_context=_save)


# Those whose outputs are worth keeping in selective checkpointing.
ATTENTION_OPERATORS = (
    torch.ops.longtake.attend.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


@register_flop_formula(torch.ops.longtake.attend, get_raw=True)
def _flops(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, lengths: Tensor, *_: Any, **__: Any
) -> int:
    """Of q k^T and of weights v; the keys of other segments are not met."""
    return 4 * q.shape[1] * q.shape[2] * int(lengths.prod(dim=0).sum())


@register_flop_formula(torch.ops.longtake.attend_backward, get_raw=True)
def _backward_flops(grad: Tensor, q: Tensor, *others: Any, **_: Any) -> int:
    """Twice the forward's; what is computed again does not count."""
    lengths = others[6]
    return 8 * q.shape[1] * q.shape[2] * int(lengths.prod(dim=0).sum())


def _pieces(x: Tensor, runs: tuple[Run, ...], of: str) -> list[Tensor]:
    """x (n, N, d), cut into runs, each (segments, N, length, d); views."""
    lengths = [getattr(run, of) for run in runs]
    sizes = [run.num_segments * length for run, length in zip(runs, lengths, strict=True)]
    return [
        piece.unflatten(0, (run.num_segments, length)).transpose(1, 2)
        for piece, run, length in zip(x.split(sizes), runs, lengths, strict=True)
    ]


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    """The reverse of `_pieces`; a view where there is one."""
    flat = [piece.transpose(1, 2).flatten(0, 1) for piece in pieces]  # (segments * length, N, d)
    if len(flat) == 1:
        return flat[0]
    return torch.cat(flat) if flat else torch.zeros_like(like)


def _forward_runs(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
    """One call a run. The planner sorts a pack's clips by length, so that runs are few.

    Batched, a rectangular pack is 1.4 times as fast on a CPU as a loop over its segments.
    """
    outs, sums = [], [q.new_empty(0, dtype=torch.float32)]
    qkv = (_pieces(q, runs, "q_length"), _pieces(k, runs, "k_length"), _pieces(v, runs, "k_length"))
    for run, *inputs in zip(runs, *qkv, strict=True):
        out, logs = torch.zeros_like(inputs[0]), inputs[0].new_zeros(inputs[0].shape[:3])
        if run.q_length and run.k_length:
            out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs)
        outs.append(out)
        sums.append(logs.flatten())
    return _joined(outs, q), torch.cat(sums)


def _backward_runs(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: tuple[Run, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    names = ("q_length", "q_length", "k_length", "k_length", "q_length")
    inputs = (_pieces(x, runs, name) for x, name in zip((grad, q, k, v, out), names, strict=True))
    found: tuple[list[Tensor], ...] = ([], [], [])
    for run, *tensors, logs in zip(runs, *inputs, _sums(lse, runs, q.shape[1]), strict=True):
        gradients = [torch.zeros_like(x) for x in tensors[1:4]]
        if run.q_length and run.k_length:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, logs, 0.0, False
            )
        for pieces, gradient in zip(found, gradients, strict=True):
            pieces.append(gradient)
    dq, dk, dv = (_joined(pieces, x) for pieces, x in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


def _sums(lse: Tensor, runs: tuple[Run, ...], num_heads: int) -> list[Tensor]:
    """lse (N * Lq,), cut into runs, each (segments, N, length); views."""
    sizes = [run.num_segments * run.q_length * num_heads for run in runs]
    return [
        piece.view(run.num_segments, num_heads, run.q_length)
        for piece, run in zip(lse.split(sizes), runs, strict=True)
    ]


def _attend_runs(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """The same in operations that know their own backward."""
    outputs = []
    parts = (
        _pieces(x, runs, name) for x, name in ((q, "q_length"), (k, "k_length"), (v, "k_length"))
    )
    for run, q_run, k_run, v_run in zip(runs, *parts, strict=True):
        if run.k_length:
            q_run = F.scaled_dot_product_attention(q_run, k_run, v_run)
        else:
            q_run = torch.zeros_like(q_run)
        outputs.append(q_run.transpose(1, 2).flatten(0, 1))  # (b * q, N, d)
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
