"""PRIVATE_PARTS lists what there is and what is used. This file is also the script of a rank."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from framework.train.engine import zero, zero_stages
from framework.train.engine.optimizer import AdamWConfig
from framework.train.engine.zero import ZeroConfig
from framework.train.engine.zero_stages import PRIVATE_PARTS, check_parts


def build_all(folder: str) -> None:
    """An engine of each kind; print which entries of PRIVATE_PARTS were looked for and found."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/found", rank=0, world_size=1)

    def check(kind: str, found: object) -> None:
        check_parts(kind, found)
        print(f"found: {kind}")

    zero.check_parts = zero_stages.check_parts = check
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16"):
            config = ZeroConfig(stage=stage, dtype=dtype)
            config.build(lambda: nn.Linear(3, 1), AdamWConfig(), 1, torch.device("cpu"))


def test_this_deepspeed_has_all_of_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert set(re.findall("found: (.*)", done.stdout)) == set(PRIVATE_PARTS)


@pytest.mark.parametrize("kind", PRIVATE_PARTS)
def test_what_is_missing_is_named(kind: str) -> None:
    parts = dict.fromkeys(PRIVATE_PARTS[kind])
    check_parts(kind, SimpleNamespace(**parts))
    first, *_ = parts
    with pytest.raises(ValueError, match=f"{kind} has no {first}, which .* pyproject.toml"):
        check_parts(kind, SimpleNamespace(**{name: None for name in parts if name != first}))


def test_what_is_listed_is_used() -> None:
    trees = [ast.parse(Path(str(module.__file__)).read_text()) for module in (zero, zero_stages)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {  # by getattr and hasattr
        arg.value
        for node in nodes
        if isinstance(node, ast.Call)
        for arg in node.args
        if isinstance(arg, ast.Constant)
    }
    assert not {name for parts in PRIVATE_PARTS.values() for name in parts} - used


if __name__ == "__main__":
    build_all(sys.argv[1])
