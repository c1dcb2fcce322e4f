"""First words on a GPU: its ceilings, every attention kernel against float64, one training step.

    python -m benchmarks.gpu_step [--model dit_1b] [--tokens 32768]

One process, no Ray, no DeepSpeed. On a CPU it runs in small, and says so. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import Tensor

from framework.batch import Clip, PackedBatch
from framework.config import compose
from model_zoo.attention import (
    AttentionBackend,
    Segments,
    choose_backend,
    dense_attention,
    packed_attention,
)
from model_zoo.checkpointing import CheckpointMode, CheckpointPolicy
from model_zoo.flops import training_flops_per_token

Grid = tuple[int, int, int]
TOKEN_SIZE, TEXT_DIM, TEXT_TOKENS = 64, 4096, 64
# A pack of clips of 1 to 10 s at 480p and below, of a third, a quarter, … of the budget.
SHARES = (0.34, 0.25, 0.15, 0.1, 0.08, 0.05, 0.03)


def seconds(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Of one call, the fastest of `repeats` after a first one that warms up."""
    action()
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """TFLOP/s of a square matrix product, and GB/s of a copy (read and written)."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = 2 * size**3 / seconds(lambda: a @ b, device, 10) / 1e12
    source = torch.empty(16 * size * size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 10) / 1e9
    return product, copied


def attention_errors(
    name: AttentionBackend, device: torch.device, dtype: torch.dtype, packs: int = 5
) -> tuple[float, float]:
    """Largest relative errors (L2) of outputs and of gradients on random packs, against float64."""
    worst_out = worst_grad = 0.0
    for seed in range(packs):
        generator = torch.Generator().manual_seed(seed)
        q_lengths = torch.randint(0, 200, (12,), generator=generator)
        k_lengths = torch.randint(0, 90, (12,), generator=generator) if seed % 2 else q_lengths
        cu_q, cu_k = (_ends(lengths.tolist(), device) for lengths in (q_lengths, k_lengths))
        sizes = (int(cu_q[-1]), int(cu_k[-1]), int(cu_k[-1]))
        inputs = [
            torch.randn(n, 4, 128, generator=generator).to(device, dtype).requires_grad_()
            for n in sizes
        ]
        upstream = torch.randn(sizes[0], 4, 128, generator=generator).to(device, dtype)
        q, k, v = inputs
        out = packed_attention(q, k, v, Segments.of(cu_q, cu_k, name))
        grads = torch.autograd.grad(out, inputs, upstream)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        oracle = dense_attention(exact[0], exact[1], exact[2], cu_q, cu_k)
        expected = torch.autograd.grad(oracle, exact, upstream.double())
        worst_out = max(worst_out, _relative(out, oracle))
        worst_grad = max(worst_grad, *map(_relative, grads, expected))
    return worst_out, worst_grad


def _relative(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


def pack_of(num_tokens: int, device: torch.device) -> tuple[PackedBatch, list[Grid]]:
    """A pack of seven clips of random tokens; what is left over is the padding segment's."""
    side = max(2, round((num_tokens / 64) ** 0.5 / 2) * 2)
    area = max(1, min(side * side * 5 // 8, int(num_tokens * min(SHARES))))
    height = max(1, int(area**0.5))
    width = max(1, area // height)
    grids = [
        (max(1, int(num_tokens * share) // (height * width)), height, width) for share in SHARES
    ]
    lengths = [f * h * w for f, h, w in grids]
    left_over = max(0, num_tokens - sum(lengths))
    clips = [
        Clip(torch.randn(n, TOKEN_SIZE), grid, torch.randn(TEXT_TOKENS, TEXT_DIM), i, 24.0)
        for i, (n, grid) in enumerate(
            zip([*lengths, left_over], [*grids, (1, 1, left_over)], strict=True)
        )
    ]
    return PackedBatch.from_clips(clips).to(device), grids


def training_step(
    model: Any, batch: PackedBatch, mode: CheckpointMode, dtype: torch.dtype, repeats: int
) -> tuple[float, float]:
    """Seconds of forward, backward and AdamW on one pack, and the peak of memory in GiB."""
    device = batch.tokens.device
    model.set_checkpointing(CheckpointPolicy(mode))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type == "cuda")
    t = torch.rand(batch.num_segments, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(batch.tokens, t, batch, batch.text)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = seconds(step, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return took, peak


def main() -> None:
    """Print tables, then one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--tokens", type=int, default=0)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = options.model or ("dit_1b" if on_gpu else "dit_xs")
    num_tokens = options.tokens or (32_768 if on_gpu else 512)
    place = torch.cuda.get_device_name(device) if on_gpu else "a CPU, in small: no figure of a GPU"
    print(f"{place}; torch {torch.__version__}")

    tflops, gb_per_s = ceilings(device, dtype, 8192 if on_gpu else 512)
    print(f"matrix product {tflops:.3f} TFLOP/s, copy {gb_per_s:.0f} GB/s, both in {dtype}")
    figures: dict[str, Any] = {"device": place, "tflops": tflops, "copy_gb_per_s": gb_per_s}

    print(f"\n{'attention':12}{'output':>12}{'gradients':>12}   relative to float64")
    for backend in get_args(AttentionBackend):
        try:
            choose_backend(backend, device, dtype)
        except ValueError as error:
            print(f"{backend:12} {error}")
            continue
        errors = attention_errors(cast(AttentionBackend, backend), device, dtype)
        print(f"{backend:12}{errors[0]:12.2e}{errors[1]:12.2e}")
        figures[f"attention_{backend}"] = errors

    config = compose(["experiment=demo", f"model={name}"]).model
    torch.manual_seed(0)
    with device:
        model = config.build(TOKEN_SIZE, None, TEXT_DIM)
    count = sum(parameter.numel() for parameter in model.parameters())
    batch, grids = pack_of(num_tokens, device)
    per_token = training_flops_per_token(config.work(TOKEN_SIZE, TEXT_DIM), grids)
    print(f"\n{name}, {count / 1e6:,.1f} M parameters, a pack of {len(batch.tokens):,} tokens")
    print(f"{'checkpointing':14}{'s a step':>10}{'tokens/s':>12}{'of ceiling':>12}{'GiB':>8}")
    modes: tuple[CheckpointMode, ...] = ("full", "selective")
    for mode in modes:
        took, peak = training_step(model, batch, mode, dtype, 3)
        rate = len(batch.tokens) / took
        share = rate * per_token / (tflops * 1e12)
        print(f"{mode:14}{took:10.3f}{rate:12,.0f}{share:12.1%}{peak:8.1f}", flush=True)
        figures[f"step_{mode}"] = {"seconds": took, "of_ceiling": share, "peak_gib": peak}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
