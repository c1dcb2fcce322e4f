"""What each mode of activation checkpointing costs in time, and saves in memory.

    python -m benchmarks.checkpointing [--model dit_s] [--tokens 4096] [--repeats 3]

Forward and backward of one pack of seven clips, no optimizer, each mode in a process of its own, on
the GPU in bf16 or on one thread of the CPU in float32. Memory is the peak above what weights and
gradients take: as the CUDA allocator has it, or the process's resident memory. Beside it stands
what `ModelConfig.activation_bytes` says, which leaves out what lives for a moment only.

The last line is JSON.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_step import TEXT_DIM, TOKEN_SIZE, pack_of, seconds
from framework.config import compose
from model_zoo.checkpointing import CheckpointPolicy

MODES = {
    "none": CheckpointPolicy("none"),
    "every 3rd": CheckpointPolicy("every_k", 3),
    "every 2nd": CheckpointPolicy("every_k", 2),
    "selective": CheckpointPolicy("selective"),
    "full": CheckpointPolicy("full"),
}


@dataclass(frozen=True)
class Found:
    """Of one mode."""

    seconds: float
    peak_gib: float
    formula_gib: float


def measure(name: str, num_tokens: int, policy: CheckpointPolicy, repeats: int) -> Found:
    """In a process that has done nothing else."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = compose(["experiment=demo", f"model={name}"]).model
    with device:
        model = config.build(TOKEN_SIZE, None, TEXT_DIM).to(dtype)
    model.set_checkpointing(policy)
    batch, _ = pack_of(num_tokens, device)
    t = torch.rand(batch.num_segments, device=device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        model(batch.tokens.to(dtype), t, batch, batch.text.to(dtype)).square().mean().backward()

    before = _memory(device, reset=True)
    took = seconds(step, device, repeats)
    tokens = len(batch.tokens)
    formula = config.activation_bytes(dtype.itemsize, tokens, policy) or 0
    return Found(took, (_memory(device) - before) / 2**30, formula / 2**30)


def _memory(device: torch.device, reset: bool = False) -> int:
    """The peak of bytes since the last reset; after one, what is held now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="dit_s")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{'checkpointing':16}{'seconds':>10}{'of none':>10}{'peak GiB':>10}{'formula':>10}")
    found: dict[str, Found] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for title, policy in MODES.items():
            job = pool.submit(measure, options.model, options.tokens, policy, options.repeats)
            one = found[title] = job.result()
            of_none = one.seconds / found["none"].seconds
            print(
                f"{title:16}{one.seconds:>10.3f}{of_none:>10.2f}{one.peak_gib:>10.2f}"
                f"{one.formula_gib:>10.2f}",
                flush=True,
            )
    print(json.dumps({title: vars(one) for title, one in found.items()}))


if __name__ == "__main__":
    main()
