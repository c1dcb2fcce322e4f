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

# Which files may import what is heavy: the path from the root.
HEAVY = {
    "av": ("framework/video.py",),
    "deepspeed": (
        "framework/train/engine/deepspeed_patches.py",
        "framework/train/engine/zero.py",
    ),
    "diffusers": (),
    "flash_attn": ("model_zoo/attention.py",),
    "fsspec": (),
    "hydra": ("framework/config.py",),
    "mlflow": ("framework/tracking/mlflow_tracker.py",),
    "omegaconf": ("framework/config.py",),
    "pyarrow.fs": ("framework/storage.py",),
    "ray": (
        "framework/cluster.py",
        "framework/data/encode/job.py",
        "framework/data/index/job.py",
        "framework/data/stream/stream.py",
        # Ray's gauges reach Prometheus through each node's agent: there is no other way to it.
        "framework/tracking/gauges.py",
        "framework/train/driver/attempts.py",
        "framework/train/driver/follow.py",
        "framework/train/driver/job.py",
        "framework/train/mailbox.py",
        "framework/train/rank/failures.py",
        "framework/train/rank/leave_request.py",
        "framework/train/rank/notice.py",
        "framework/train/rank/rank.py",
        "framework/train/rank/worker.py",
    ),
    "transformers": (),
    "webdataset": ("framework/data/shards/tar.py",),
    "yaml": ("framework/kinds.py",),
}

# What a folder or file may import, apart from the standard library and what HEAVY grants it.
ONLY = {
    "model_zoo/*": ("model_zoo", "numpy", "safetensors", "torch"),
    "framework/diffusion/*": ("framework.batch", "framework.diffusion", "numpy", "torch"),
    "framework/objectives/*": (
        "framework.batch",
        "framework.diffusion",
        "framework.objectives",
        "framework.seeding",
        "numpy",
        "torch",
    ),
    "framework/train/loop.py": (
        "framework.batch",
        "framework.objectives",
        "framework.train.engine",
        "torch",
    ),
}

# The house: a room imports rooms of lower floors, none of its own floor and none above. A folder is
# a room with all that it holds, apart from what is listed by itself.
FLOORS = (
    (
        "framework.batch",
        "framework.cluster",
        "framework.contact_sheet",
        "framework.hydra_limits",
        "framework.mapping",
        "framework.printable",
        "framework.private_files",
        "framework.seeding",
        "framework.storage",
        "framework.train.collectives",
        "framework.typed",
        "framework.video",
        "model_zoo",
    ),
    (
        "framework.diffusion",
        "framework.encoders",
        "framework.kinds",
        "framework.run",
        "framework.tracking",
    ),
    ("framework.objectives", "framework.terminal"),
    ("framework.data",),
    ("framework.assembly", "framework.demo.clips", "framework.demo.local_s3"),
    ("framework.demo.reader", "framework.trained", "framework.train.engine"),
    ("framework.sample", "framework.train.loop"),
    ("framework.evaluate", "framework.train.guard", "framework.train.observers"),
    ("framework.export", "framework.train.config", "framework.train.mailbox"),
    ("framework.train.job",),
    ("framework.train.preflight",),
    ("framework.train.rank",),
    ("framework.train.driver",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What a folder must not import though it stands on a higher floor.
NEVER = {
    "framework/data/*": (
        "framework.diffusion",
        "framework.encoders",
        "framework.objectives",
        "framework.run",
        "framework.tracking",
        "model_zoo",
    ),
    "framework/run/*": ("model_zoo",),
    "framework/tracking/*": ("model_zoo",),
    # Evaluation and sampling read committed checkpoints, never the live engine.
    "framework/evaluate/*": ("framework.train",),
    "framework/export/*": ("framework.train",),
    "framework/sample/*": ("framework.train",),
    "framework/train/engine/*": ("framework.data", "framework.objectives"),
}

# The commands and what is theirs alone: they stand above all rooms.
ENTRY_FILES = ("*/__main__.py", "framework/config.py")


@dataclass(frozen=True)
class Import:
    """`module` is the full dotted name, with the imported name where there is one."""

    file: str
    line: int
    module: str

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

    return [
        Import(file, node.lineno, name)  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(source))
        for name in names(node)
    ]


def room_of(module: str) -> str | None:
    """The room in which a module, or a name of one, lies."""
    return max(
        (room for room in FLOOR if f"{module}.".startswith(f"{room}.")), key=len, default=None
    )


def goes_up(file: str, imported: Import) -> bool:
    """Whether an import of our own code leaves its room, and does not go down."""
    here = room_of(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    there = room_of(imported.module)
    if not imported.is_of("framework", "model_zoo") or imported.module == "framework":
        return False
    return here is None or there is None or (here != there and FLOOR[there] >= FLOOR[here])


def violations(file: str, source: str) -> list[str]:
    """What a file imports against the rules, a line each."""
    found, is_entry = [], matches(file, *ENTRY_FILES)
    for imported in imports_of(file, source):
        heavy = [name for name in HEAVY if imported.is_of(name)]
        root = imported.module.split(".")[0]
        granted = bool(heavy) and all(matches(file, *HEAVY[name]) for name in heavy)
        broken = bool(heavy) and not granted
        for pattern, allowed in ONLY.items():
            free = granted or root in sys.stdlib_module_names or imported.is_of(*allowed)
            broken |= matches(file, pattern) and not free
        for pattern, forbidden in NEVER.items():
            broken |= matches(file, pattern) and imported.is_of(*forbidden) and not is_entry
        broken |= goes_up(file, imported) and not is_entry
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


def test_the_lists_name_files_that_exist() -> None:
    listed = {file for files in HEAVY.values() for file in files}
    assert not [file for file in listed if not (ROOT / file).is_file()]
    folders = [pattern.removesuffix("*") for pattern in (*ONLY, *NEVER)]
    assert not [folder for folder in folders if not (ROOT / folder).exists()]
    rooms = [ROOT / room.replace(".", "/") for room in FLOOR]
    assert not [room for room in rooms if not (room.is_dir() or room.with_suffix(".py").is_file())]


def test_every_file_lies_in_a_room() -> None:
    homeless = []
    for file in our_files():
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        is_entry = matches(file, *ENTRY_FILES)
        if not (is_entry or room_of(module)) and (ROOT / file).name != "__init__.py":
            homeless.append(file)
    assert not homeless


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("framework/train/loop.py", "import deepspeed"),
        ("framework/train/loop.py", "from framework.storage import Store"),
        ("framework/train/engine/plain.py", "def f():\n    import mlflow.tracking"),
        ("framework/train/engine/protocol.py", "from ray import train"),
        (
            "framework/train/engine/zero.py",
            "import importlib\nimportlib.import_module('ray.train')",
        ),
        ("framework/train/rank/worker.py", "from framework.train.driver.job import Job"),
        ("framework/run/checkpoint.py", "from framework.data.plan.store import Plan"),
        ("framework/tracking/gauges.py", "from framework.run.checkpoint import Checkpoints"),
        ("framework/data/plan/planner.py", "from pyarrow import fs"),
        ("framework/data/plan/planner.py", "import pyarrow.fs as f"),
        ("framework/data/plan/planner.py", "from framework.config import RunConfig"),
        ("framework/data/plan/planner.py", "from framework import config"),
        ("framework/data/plan/planner.py", "from ... import diffusion"),
        ("framework/data/plan/planner.py", "from ...train.loop import train"),
        (
            "framework/data/plan/planner.py",
            "def main():\n    from framework.assembly import Assembly",
        ),
        ("framework/data/plan/planner.py", "if __name__ == '__main__':\n    import framework.run"),
        ("framework/data/encode/job.py", "def run():\n    import model_zoo.codecs.haar"),
        ("framework/data/decode.py", "class A:\n    def f(self):\n        from av import open"),
        ("framework/objectives/objective.py", "from framework.storage import Store"),
        ("framework/objectives/objective.py", "from model_zoo.models.dit import DiT"),
        ("framework/diffusion/samplers.py", "import scipy"),
        ("framework/diffusion/guidance.py", "from framework.objectives.objective import Objective"),
        ("framework/run/checkpoint.py", "from framework.assembly import Assembly"),
        ("framework/evaluate/run.py", "from framework.train.engine.zero import ZeroEngine"),
        ("framework/assembly.py", "import framework.config"),
        ("framework/train/observers/ledger.py", "from framework.train.rank.rank import Rank"),
        ("framework/storage.py", "from framework.video import VideoError"),
        ("framework/storage.py", "if True:\n    from hydra import main"),
        ("model_zoo/models/dit.py", "from framework.batch import PackedBatch"),
        ("model_zoo/models/dit.py", "import flash_attn"),
        ("model_zoo/models/dit.py", "import einops"),
        ("model_zoo/codecs/haar.py", "from diffusers import AutoencoderKL"),
        ("model_zoo/text/byte.py", "from ...framework import batch"),
        ("framework/data/index/job.py", "if __name__ == '__main__':\n    import hydra"),
    ],
)
def test_a_violation_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("framework/train/engine/zero.py", "import deepspeed.comm"),
        ("framework/data/index/job.py", "def f():\n    from ray.data import from_items"),
        ("framework/data/plan/__main__.py", "from framework.assembly import Assembly"),
        ("framework/data/plan/planner.py", "import pyarrow.parquet\nfrom pyarrow import compute"),
        ("framework/train/__main__.py", "from framework.config import RunConfig"),
        ("framework/train/driver/job.py", "from framework.train.rank.rank import WorkerArgs"),
        ("framework/config.py", "import hydra\nfrom framework.data.config import DataConfig"),
        ("framework/objectives/rectified_flow.py", "import math\nfrom .objective import Objective"),
        ("framework/objectives/timesteps.py", "from framework.diffusion.schedule import shift_t"),
        ("model_zoo/attention.py", "def f():\n    from flash_attn import flash_attn_varlen_func"),
        ("model_zoo/rays.py", "import model_zoo.rope, numpy.linalg"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert violations(file, source) == []


LIGHT = (
    "framework/batch.py",
    "framework/hydra_limits.py",
    "framework/mapping.py",
    "framework/printable.py",
    "framework/private_files.py",
    "framework/seeding.py",
    "framework/storage.py",
    "framework/data/manifest/*",
    "framework/data/plan/[!_]*",
    "framework/data/shards/*",
    "framework/data/stream/collate.py",
    "framework/diffusion/*",
    "framework/evaluate/metrics/*",
    "framework/objectives/*",
    "framework/run/*",
    "framework/tracking/[!_g]*",
    "framework/train/loop.py",
    "framework/train/engine/plain.py",
    "framework/train/observers/meters/throughput.py",
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
