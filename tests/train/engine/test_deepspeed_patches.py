"""One test a patch: DeepSpeed without it does what it is against, with it does not.

DeepSpeed runs in processes of its own, for it can be patched only once. This file is also their
script: it builds an engine of stage 1 in bf16, trains a step, and says what it saw.
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

Seen = dict[str, dict[str, int]]  # by "bare" or "patched"


def watch(is_patched: bool, folder: str) -> dict[str, int]:
    """Build, train a step, and count what the patches are against."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    import torch
    from torch import distributed, nn

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/found", rank=0, world_size=1)
    import deepspeed

    from framework.train.engine import deepspeed_patches

    if is_patched:
        deepspeed_patches.apply(torch.device("cpu"))
    seen = {"probes": 0, "ranges": 0}

    def probe() -> dict[str, bool]:
        seen["probes"] += 1
        return {}

    def push(*_: Any, **__: Any) -> None:
        seen["ranges"] += 1

    deepspeed.ops._probe_compatible_ops = probe
    deepspeed.accelerator.get_accelerator().range_push = push
    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1, "reduce_scatter": False},
    }
    model, printed = nn.Linear(3, 1), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        handler = logging.StreamHandler(printed)
        deepspeed.utils.logger.addHandler(handler)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings
        )
    engine.backward(engine(torch.ones(2, 3, dtype=torch.bfloat16)).float().sum())
    engine.step()
    seen["memory"] = printed.getvalue().count("CPU Virtual Memory")
    seen["muon"] = int("deepspeed.runtime.zero.muon.original_muon" in sys.modules)
    seen["compiler"] = int("torch._inductor.compile_fx" in sys.modules)
    return seen


@pytest.fixture(scope="module")
def seen() -> Seen:
    def run(kind: str) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, __file__, kind, folder],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
                capture_output=True,
                text=True,
                timeout=200,
            )
        assert done.returncode == 0, done.stderr[-5000:]
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    kinds = ("bare", "patched")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(kinds, pool.map(run, kinds), strict=True))


def test_answer_for_compatible_ops(seen: Seen) -> None:
    assert seen["bare"]["probes"] > 0
    assert seen["patched"]["probes"] == 0


def test_import_muon_uncompiled(seen: Seen) -> None:
    assert seen["bare"]["muon"]  # DeepSpeed still imports it
    assert seen["bare"]["compiler"]
    assert seen["patched"]["muon"]
    assert not seen["patched"]["compiler"]


def test_print_no_memory_usage(seen: Seen) -> None:
    assert seen["bare"]["memory"] > 0
    assert seen["patched"]["memory"] == 0


def test_mark_no_profiler_ranges(seen: Seen) -> None:
    assert seen["bare"]["ranges"] > 0
    assert seen["patched"]["ranges"] == 0


if __name__ == "__main__":
    print(json.dumps(watch(sys.argv[1] == "patched", sys.argv[2])))
