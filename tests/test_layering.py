"""The import rules of DESIGN.md, proved from the syntax trees; imports inside functions count."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Which files may import what is heavy; a pattern matches the path from the root.
HEAVY = {
    "av": ("framework/video.py",),
    "deepspeed": ("framework/train/zero.py",),
    "diffusers": ("model_zoo/codecs/pretrained.py",),
    "flash_attn": ("model_zoo/attention.py",),
    "fsspec": ("framework/storage.py", "framework/checkpoint.py"),
    "hydra": ("framework/config.py", "framework/sweep/*"),
    "mlflow": ("framework/mlflow_tracker.py",),
    "omegaconf": ("framework/config.py", "framework/sweep/*"),
    "pyarrow.fs": ("framework/storage.py", "framework/checkpoint.py"),
    "ray": (
        "framework/cluster.py",
        "framework/data/encode.py",
        "framework/data/index.py",
        "framework/data/stream.py",
        "framework/evaluate/__main__.py",
        "framework/sample/__main__.py",
        "framework/submit.py",
        "framework/sweep/*",
        # Ray's gauges reach Prometheus through each node's agent: there is no other way to it.
        "framework/train/gauges.py",
        "framework/train/attempts.py",
        "framework/train/failures.py",
        "framework/train/job.py",
        "framework/train/notice.py",
        "framework/train/progress.py",
        "framework/train/rank.py",
        "framework/train/worker.py",
    ),
    "transformers": ("model_zoo/text/pretrained.py",),
    "webdataset": ("framework/data/shards.py",),
}

# What a folder or file may import, apart from the standard library and what HEAVY grants it.
ONLY = {
    "model_zoo/*": ("model_zoo", "numpy", "safetensors", "torch"),
    "framework/diffusion/*": (
        "framework.batch",
        "framework.diffusion",
        "framework.seeding",
        "model_zoo.protocols",
        "numpy",
        "torch",
    ),
    "framework/train/loop.py": (
        "framework.batch",
        "framework.diffusion",
        "framework.train.engine",
        "torch",
    ),
}

# What a folder must not import, except where it is an entry point.
NEVER = {
    "framework/data/*": (
        "framework.assembly",
        "framework.checkpoint",
        "framework.diffusion",
        "framework.evaluate",
        "framework.mlflow_tracker",
        "framework.sample",
        "framework.sharded_state",
        "framework.tracking",
        "framework.train",
        "model_zoo",
    ),
    # Evaluation and sampling read committed checkpoints, never the live engine.
    "framework/evaluate/*": ("framework.train",),
    "framework/export/*": ("framework.train",),
    "framework/sample/*": ("framework.train",),
    "framework/*": ("framework.config",),
}

# Entry points as a whole; elsewhere `if __name__ == "__main__":` and the function `main` are.
ENTRY_FILES = ("*/__main__.py", "framework/demo.py", "framework/submit.py", "framework/sweep/*")


@dataclass(frozen=True)
class Import:
    """`module` is the full dotted name, with the imported name where there is one."""

    file: str
    line: int
    module: str
    in_entry: bool

    def is_of(self, *names: str) -> bool:
        return any(self.module == name or self.module.startswith(f"{name}.") for name in names)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def matches(file: str, *patterns: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def imports_of(file: str, source: str) -> list[Import]:
    """All imports of a module, those in functions and by a constant name at run time included."""
    package = list(Path(file).parent.parts)

    def names(node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function).split(".")[-1] in ("import_module", "__import__"):
                    yield name

    def visit(node: ast.AST, in_entry: bool) -> Iterator[Import]:
        match node:
            case ast.If(test=test) if ast.unparse(test) == "__name__ == '__main__'":
                in_entry = True
            case ast.FunctionDef(name="main"):
                in_entry = True
        for name in names(node):
            yield Import(file, node.lineno, name, in_entry)  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_entry)

    return list(visit(ast.parse(source), matches(file, *ENTRY_FILES)))


def violations(file: str, source: str) -> list[str]:
    """What a file imports against the rules, a line each."""
    found = []
    for imported in imports_of(file, source):
        heavy = [name for name in HEAVY if imported.is_of(name)]
        root = imported.module.split(".")[0]
        granted = bool(heavy) and all(matches(file, *HEAVY[name]) for name in heavy)
        broken = bool(heavy) and not granted
        for pattern, allowed in ONLY.items():
            free = granted or root in sys.stdlib_module_names or imported.is_of(*allowed)
            broken |= matches(file, pattern) and not free
        for pattern, forbidden in NEVER.items():
            is_entry = imported.in_entry or file == "framework/config.py"
            broken |= matches(file, pattern) and imported.is_of(*forbidden) and not is_entry
        if broken:
            found.append(str(imported))
    return found


def our_files() -> list[str]:
    packages = (ROOT / "framework", ROOT / "model_zoo")
    return sorted(
        path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")
    )


def test_imports_point_one_way() -> None:
    files = our_files()
    assert len(files) > 5
    broken = [line for file in files for line in violations(file, (ROOT / file).read_text())]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("framework/train/loop.py", "import deepspeed"),
        ("framework/train/loop.py", "from framework.storage import Store"),
        ("framework/train/plain.py", "def f():\n    import mlflow.tracking"),
        ("framework/train/engine.py", "from ray import train"),
        ("framework/train/zero.py", "import importlib\nimportlib.import_module('ray.train')"),
        ("framework/data/plan.py", "from pyarrow import fs"),
        ("framework/data/plan.py", "import pyarrow.fs as f"),
        ("framework/data/plan.py", "from framework.config import RunConfig"),
        ("framework/data/plan.py", "from framework import config"),
        ("framework/data/plan.py", "from .. import diffusion"),
        ("framework/data/plan.py", "from ..train.loop import train"),
        ("framework/data/encode.py", "def run():\n    import model_zoo.codecs.haar"),
        ("framework/data/decode.py", "class A:\n    def f(self):\n        from av import open"),
        ("framework/diffusion/objective.py", "from framework.storage import Store"),
        ("framework/diffusion/objective.py", "from model_zoo.dit import DiT"),
        ("framework/diffusion/samplers.py", "import scipy"),
        ("framework/evaluate/run.py", "from framework.train.zero import ZeroEngine"),
        ("framework/assembly.py", "import framework.config"),
        ("framework/storage.py", "if True:\n    from hydra import main"),
        ("model_zoo/dit.py", "from framework.batch import PackedBatch"),
        ("model_zoo/dit.py", "import flash_attn"),
        ("model_zoo/dit.py", "import einops"),
        ("model_zoo/codecs/haar.py", "from diffusers import AutoencoderKL"),
        ("model_zoo/text/byte.py", "from ...framework import batch"),
        ("framework/data/index.py", "if __name__ == '__main__':\n    import hydra"),
    ],
)
def test_a_violation_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("framework/train/zero.py", "import deepspeed.comm"),
        ("framework/data/index.py", "def f():\n    from ray.data import from_items"),
        (
            "framework/data/plan.py",
            "if __name__ == '__main__':\n    from framework.config import entry",
        ),
        ("framework/data/plan.py", "def main():\n    from framework.assembly import Assembly"),
        ("framework/data/plan.py", "import pyarrow.parquet\nfrom pyarrow import compute"),
        ("framework/train/__main__.py", "from framework.config import RunConfig"),
        ("framework/config.py", "import hydra\nfrom framework.data.config import DataConfig"),
        ("framework/diffusion/samplers.py", "import math\nfrom .objective import Objective"),
        ("framework/sweep/launcher.py", "from hydra.core.plugins import Plugins\nimport ray"),
        ("model_zoo/attention.py", "def f():\n    from flash_attn import flash_attn_varlen_func"),
        ("model_zoo/codecs/pretrained.py", "import torch, diffusers"),
        ("model_zoo/rays.py", "import model_zoo.rope, numpy.linalg"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert violations(file, source) == []


LIGHT = (
    "framework/batch.py",
    "framework/mlflow_tracker.py",
    "framework/seeding.py",
    "framework/storage.py",
    "framework/tracking.py",
    "framework/data/collate.py",
    "framework/data/plan.py",
    "framework/data/shards.py",
    "framework/diffusion/*",
    "framework/evaluate/f*.py",
    "framework/train/loop.py",
    "framework/train/plain.py",
    "framework/train/throughput.py",
    "model_zoo/*",
)

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_plain_modules_import_nothing_heavy_and_touch_nothing(tmp_path: Path) -> None:
    files = [file for file in our_files() if matches(file, *LIGHT)]
    modules = [
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files
    ]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(modules)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "framework" in loaded
    heavy = {"deepspeed", "diffusers", "flash_attn", "hydra", "mlflow", "omegaconf", "ray"}
    assert not loaded & (heavy | {"transformers", "webdataset"})
    assert not list(tmp_path.iterdir())
    assert len(done.stdout.splitlines()) == 1  # nothing else was printed
