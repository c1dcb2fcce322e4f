"""Real ZeRO-3 steps of a large model on two CPU ranks: that it works, and what memory it takes.

    python -m benchmarks.big_step [OVERRIDE …]    # model=dit_1b, fp32, no EMA, full checkpointing

A pack of 192 video tokens; forward, backward and AdamW, twice. 20 bytes a parameter over both ranks
in float32: weights as the model sees them, gradients, master weights, two moments. Where there is
less memory, swap does, slowly. The last line is JSON.
"""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from framework.assembly import Assembly
from framework.config import compose
from framework.train.rank.largest_packs import describe, largest_packs

WORLD, STEPS = 2, 2
DEFAULTS = (
    "experiment=demo",
    "model=dit_1b",
    "engine.ema_decay=0",
    "data.max_tokens=192",
    "train.activation_checkpointing.mode=full",
)


def run(rank: int, folder: Path, overrides: list[str]) -> None:
    """What a rank does; rank 0 writes the result."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    config = compose([*DEFAULTS, *overrides])
    assembly = Assembly.of(config)
    device = torch.device("cpu")

    def model() -> Any:
        built: Any = assembly.build_model()
        built.set_checkpointing(config.train.activation_checkpointing)
        return built

    began = time.perf_counter()
    engine = config.engine.build(model, config.optimizer, 100, device)
    figures: dict[str, Any] = {
        "parameters": assembly.num_parameters(),
        "build_s": time.perf_counter() - began,
    }
    reader = assembly.reader(str(folder))
    longest_text = getattr(assembly.text, "max_tokens", None)
    pack = largest_packs(assembly.recipe(), reader, longest_text)[0]
    objective = assembly.build_objective()
    draw = objective.draw(pack, seed=0, step=0)
    steps = []
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = objective.loss(engine.model, pack, draw).by_clip.sum() / len(pack.tokens)
        forward_s = time.perf_counter() - began
        engine.backward(loss)
        backward_s = time.perf_counter() - began - forward_s
        stats = engine.step()
        seconds = time.perf_counter() - began
        step = {"loss": loss.item(), "grad_norm": stats.grad_norm, "seconds": seconds}
        steps.append({**step, "forward_s": forward_s, "backward_s": backward_s})
        print(f"rank {rank}: {steps[-1]}", flush=True)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20])
    distributed.all_reduce(peak)
    figures |= {"pack": describe(pack), "steps": steps, "peak_rss_gib": peak.item()}
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(figures))
    distributed.barrier()


def main(overrides: list[str]) -> None:
    """Both ranks, and the result."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        work = partial(run, folder=Path(folder), overrides=overrides)
        ranks = [context.Process(target=work, args=(rank,)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"exit codes {[process.exitcode for process in ranks]}: out of memory?")
        print((Path(folder) / "result.json").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
