"""The private parts of our dependencies that we use, in one table, proved from the syntax trees.

A private part may change in any release, so each says why there is no public way. A use that is
not in the table fails a test; so does a row that nothing uses any more.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from framework.train.engine.zero_stages import PRIVATE_PARTS

ROOT = Path(__file__).resolve().parent.parent
OURS = ("framework", "model_zoo", "benchmarks")


@dataclass(frozen=True)
class Part:
    """`what` and all that is in it: a dotted path, or `.name` of objects that a dependency gives.

    `why` there is no public way.
    """

    what: str
    file: str
    why: str

    def covers(self, file: str, use: str) -> bool:
        return file == self.file and (use == self.what or use.startswith(f"{self.what}."))


_PATCH = "a patch: DeepSpeed has no setting for it; see the function's docstring"
_VARLEN = (
    "torch.nn.attention.varlen_attn brings a backward pass of its own; within an operator of ours "
    "we need the forward pass with its sums, and the backward pass by itself"
)
_CPU_KERNEL = (
    "scaled_dot_product_attention does not give the sums that the backward pass needs, which an "
    "operator of ours must take by itself; selective checkpointing knows operators by this name"
)

TABLE = (
    Part(
        "ray._private.state.state",
        "framework/cluster.py",
        "which nodes are being drained: the state API calls them alive, and "
        "ray.train.get_preemption_info is a barrier over all ranks",
    ),
    *(
        Part(
            f"ray._raylet.{name}",
            "framework/cluster.py",
            "Ray reads RAY_AUTH_MODE when it is imported and keeps a token that it has read: this "
            "is how Ray itself turns tokens on for a cluster that it starts",
        )
        for name in ("AuthenticationTokenLoader", "Config")
    ),
    Part(
        "ray.data._internal.cluster_autoscaler",
        "benchmarks/scale.py",
        "it measures this very class, without the cluster that it needs to be started",
    ),
    Part("._refresh_resource_reservations", "benchmarks/scale.py", "a step of that class"),
    Part(
        "hydra.core.hydra_config.HydraConfig",
        "framework/config.py",
        "Hydra's manual gives this import for the choices of a run; there is no shorter path",
    ),
    Part(
        "hydra.core.override_parser.overrides_parser.OverridesParser",
        "framework/config.py",
        "to say which argument cannot be read: hydra.compose reads all at once, and its error is "
        "about its grammar",
    ),
    Part(
        ".to_proto",
        "framework/tracking/mlflow_tracker.py",
        "the last step of each metric, with the run itself: RunData.metrics has values alone, and "
        "get_metric_history is a request for each metric, of all its points",
    ),
    Part(
        "mlflow.store.db.utils",
        "framework/tracking/mlflow_tracker.py",
        "the name of a logger, which says each step of making a database",
    ),
    Part("torch.ops.aten._flash_attention_forward", "model_zoo/attention.py", _VARLEN),
    Part("torch.ops.aten._flash_attention_backward", "model_zoo/attention.py", _VARLEN),
    Part(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "model_zoo/attention.py",
        _CPU_KERNEL,
    ),
    Part(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
        "model_zoo/attention.py",
        _CPU_KERNEL,
    ),
    Part(
        "flash_attn.flash_attn_interface._flash_attn_varlen_forward",
        "model_zoo/attention.py",
        "as for torch's own kernels",
    ),
    Part(
        "flash_attn.flash_attn_interface._flash_attn_varlen_backward",
        "model_zoo/attention.py",
        "as for torch's own kernels",
    ),
    Part("._is_protocol", "framework/typed.py", "typing.is_protocol comes with Python 3.13"),
    Part("deepspeed.ops", "framework/train/engine/deepspeed_patches.py", _PATCH),
    Part("deepspeed.runtime", "framework/train/engine/deepspeed_patches.py", _PATCH),
    Part("deepspeed.utils.nvtx", "framework/train/engine/deepspeed_patches.py", _PATCH),
    *(
        Part(f".{name}", "framework/train/engine/zero_stages.py", use)
        for parts in PRIVATE_PARTS.values()
        for name, use in parts.items()
        if name.startswith("_")
    ),
)

# Private although no part of the name begins with an underscore: of no manual's reference.
MODULES = (
    "deepspeed.ops",
    "deepspeed.runtime",
    "deepspeed.utils.nvtx",
    "hydra.core",
    "mlflow.protos",
    "mlflow.store",
    "ray.train.v2",
)
ATTRIBUTES = ("to_proto",)

# Of a namedtuple; public by Python's manual.
PUBLIC = ("_asdict", "_fields", "_make", "_replace")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in PUBLIC and name != "_"


def is_of(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """What our own code defines: functions, classes, variables, fields, attributes of `self`."""

    def names(node: ast.AST) -> Iterator[str]:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name

    return {name for tree in trees for node in ast.walk(tree) for name in names(node)}


def imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted path, of all that comes from dependencies or the standard library."""
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    root = alias.name.split(".")[0]
                    found[alias.asname or root] = alias.name if alias.asname else root
            case ast.ImportFrom(level=0, module=str(module)):
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{module}.{alias.name}"
    return {name: path for name, path in found.items() if path.split(".")[0] not in OURS}


def uses(source: str, own: set[str]) -> set[str]:
    """The private parts that a file uses: dotted paths, and `.name` of other objects."""
    tree = ast.parse(source)
    names = imported(tree)

    def path_of(node: ast.AST) -> str | None:
        match node:
            case ast.Name(id=name):
                return names.get(name)
            case ast.Attribute(value=value, attr=attr):
                path = path_of(value)
                return path and f"{path}.{attr}"
        return None

    def found() -> Iterator[str]:
        for node in ast.walk(tree):
            match node:
                case ast.Import():
                    yield from (alias.name for alias in node.names)
                case ast.ImportFrom(level=0, module=str(module)):
                    yield from (f"{module}.{alias.name}" for alias in node.names)
                case ast.Attribute(attr=attr) if path := path_of(node):
                    yield path
                case ast.Attribute(attr=attr):
                    if (is_private(attr) and attr not in own) or attr in ATTRIBUTES:
                        yield f".{attr}"
                case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=args):
                    name = args[1].value if isinstance(args[1], ast.Constant) else ""
                    if is_private(str(name)) and name not in own:
                        yield f".{name}"
                case ast.Constant(value=str(text)) if is_of(text, MODULES) and " " not in text:
                    yield text  # imported by name at run time, or a logger

    return {use for use in found() if use.startswith(".") or _is_private_path(use)}


def _is_private_path(path: str) -> bool:
    root, *parts = path.split(".")
    if root in sys.stdlib_module_names or root in OURS:
        return False
    return any(map(is_private, parts)) or is_of(path, MODULES)


def our_uses() -> list[tuple[str, str]]:
    """(file, use) of all of our code."""
    files = [path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    own = own_names(ast.parse(source) for source in sources.values())
    return [(file, use) for file, source in sources.items() for use in sorted(uses(source, own))]


def test_every_use_is_in_the_table() -> None:
    missing = [
        f"{file}: {use}"
        for file, use in our_uses()
        if not any(part.covers(file, use) for part in TABLE)
    ]
    assert not missing, "\n".join(missing)


def test_every_row_is_used() -> None:
    found = our_uses()
    assert len(found) > 10
    unused = [part for part in TABLE if not any(part.covers(*use) for use in found)]
    assert not unused, "\n".join(f"{part.file}: {part.what}" for part in unused)


def test_every_row_has_its_reason() -> None:
    assert all(part.why for part in TABLE)


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("import ray._private.state", "ray._private.state"),
        ("from ray._private.state import state", "ray._private.state.state"),
        ("def f():\n    from ray._private import worker as w", "ray._private.worker"),
        ("import ray\nray._private.worker.x()", "ray._private.worker.x"),
        ("from ray.train.v2.api import exceptions", "ray.train.v2.api.exceptions"),
        ("import hydra.core.global_hydra as g", "hydra.core.global_hydra"),
        ("import torch\ntorch._foreach_add_(a, b)", "torch._foreach_add_"),
        ("import torch as t\nf = t.ops.aten._x.default", "torch.ops.aten._x.default"),
        ("from torch import ops\nops.aten._x(1)", "torch.ops.aten._x"),
        ("from torch import _C", "torch._C"),
        ("import deepspeed\ndeepspeed.ops.table = {}", "deepspeed.ops.table"),
        ("__import__('importlib').import_module('mlflow.store.db')", "mlflow.store.db"),
        ("run.data.to_proto()", ".to_proto"),
        ("def f(actor):\n    actor._refresh()", "._refresh"),
        ("def f(actor):\n    actor._refresh = None", "._refresh"),
        ("getattr(a, '_hidden')", "._hidden"),
        ("class A(B):\n    def f(self):\n        self._of_b()", "._of_b"),
    ],
)
def test_a_use_is_found(source: str, use: str) -> None:
    assert use in uses(source, own_names([ast.parse(source)]))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.__version__, torch.ops.longtake.attend.default",
        "import os, sys\nos._exit(sys._getframe())",
        "class A:\n    _x: int\n    def f(self, b):\n        self._y = b._x, b._f()\n    _f = f",
        "from framework.data.stream.stream import _PackLoader",
        "for _, x in y: x._replace(a=1)",
        "from hydra import compose\nfrom ray import train\ntrain.get_context()",
        "text = 'hydra.core is private'",
    ],
)
def test_what_is_public_or_ours_passes(source: str) -> None:
    assert uses(source, own_names([ast.parse(source)])) == set()
