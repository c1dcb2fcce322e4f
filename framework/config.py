"""The typed run config: composes `conf/`, checks names, types and ranges, builds dataclasses.

YAML holds named choices; frozen dataclasses hold defaults, types and checks. A node with
`_target_` names such a dataclass under `framework.` or `model_zoo.`; nothing else is ever
instantiated, and the prefix is looked at before the import. An override may set any field of a
dataclass, whether its YAML lists it or not; a misspelt one is answered with the nearest valid name.

Only entry points and tests import this module; everyone else is handed a sub-config.
"""

import dataclasses
import difflib
import importlib
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from framework.cluster import ClusterConfig
from framework.data.config import DataConfig
from framework.evaluate.config import EvaluateConfig
from framework.export.config import ExportConfig
from framework.mapping import unflatten
from framework.sample.config import SampleConfig
from framework.train.config import HardwareConfig, RunSection, TrainConfig

ALLOWED_PREFIXES = ("framework.", "model_zoo.")


@dataclass(frozen=True)
class RunConfig:
    """All that a run is made of; each group is a folder of `conf/`."""

    run: RunSection
    model: Any
    codec: Any
    text: Any
    objective: Any
    optimizer: Any
    engine: Any
    sampler: Any
    tracking: Any
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    estimate: bool = False  # `framework.train` says what the run would take, and does not train
    profile: bool = False  # a window of steps of rank 0, see train.profiler


def conf_dir() -> Path:
    """The folder of YAML files: `$LONGTAKE_CONF`, else `conf/` beside the packages."""
    path = Path(os.environ.get("LONGTAKE_CONF", Path(__file__).resolve().parent.parent / "conf"))
    if not (path / "config.yaml").exists():
        raise ValueError(f"no config.yaml in {path}; set LONGTAKE_CONF to the folder conf/")
    return path


def compose(overrides: list[str]) -> RunConfig:
    """Compose `conf/config.yaml` with Hydra overrides and convert it; ValueError on any mistake."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return convert(hydra.compose("config", [_for_hydra(o) for o in overrides]))


def entry(function: Callable[[RunConfig], None], section: str = "") -> None:
    """Run an entry point: Hydra reads `sys.argv`; a user's mistake is one sentence, exit code 2.

    section: of the run config, whose fields may be given without its name, `checkpoint=200` for
    `export.checkpoint=200`; other commands refuse the short form.
    """

    @hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    def run(node: DictConfig) -> None:
        try:
            function(convert(node))
        except (ValueError, OSError) as error:  # what a user gave, and the places that it names
            if os.environ.get("LONGTAKE_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)  # as a shell has it for SIGINT

    try:
        sys.argv[1:] = [_for_hydra(_in_section(a, section)) for a in sys.argv[1:]]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()


def _in_section(argument: str, section: str) -> str:
    """Turn `checkpoint=200` into `export.checkpoint=200` where only the section has such a name."""
    if not section:
        return argument
    everywhere = {f.name for f in dataclasses.fields(RunConfig)}
    its_own = {f.name for f in dataclasses.fields(typing.get_type_hints(RunConfig)[section])}
    name = argument.split("=", 1)[0]
    return f"{section}.{argument}" if name in its_own - everywhere else argument


def _for_hydra(argument: str) -> str:
    """Turn `a.b=c` into `++a.b=c`, so that Hydra leaves the check of names to `convert`.

    ValueError where Hydra could not read it; its own error is about its grammar.
    """
    name, _, value = argument.partition("=")
    try:
        if not argument.startswith("-"):
            OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ValueError(
            f"{argument} cannot be read; quote a value with spaces or signs, for the shell and "
            f"within: '{name}=\"{value}\"'"
        ) from error
    is_override = "=" in argument and name.replace(".", "").replace("_", "").isalnum()
    if not is_override or name.startswith("hydra") or (conf_dir() / name).is_dir():
        return argument
    return f"++{argument}"


def convert(node: DictConfig) -> RunConfig:
    """Turn a composed config into dataclasses; ValueError names the key and the nearest one."""
    try:
        mapping = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except Exception as error:  # OmegaConf's own errors name the key already
        raise ValueError(str(error).strip()) from error
    assert isinstance(mapping, dict)
    return _build(RunConfig, {str(k): v for k, v in mapping.items() if k != "hydra"}, "")


def from_mapping(mapping: Any) -> RunConfig:
    """A RunConfig from what `framework.mapping.to_mapping` gave."""
    return _build(RunConfig, mapping, "")


def group_from_flat(flat: Mapping[str, Any], name: str) -> Any:
    """One group of a flat run config, say "model" of a checkpoint's; ValueError on any mistake."""
    prefix = f"{name}."
    kept = {key.removeprefix(prefix): v for key, v in flat.items() if key.startswith(prefix)}
    return _target(unflatten(kept), name)


def _build(cls: type, mapping: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {str(key): value for key, value in mapping.items() if key != "_target_"}
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {_join(path, near[0])}?" if near else f"try {', '.join(fields)}"
            raise ValueError(f"{_join(path, key)}: no such key; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{_join(path, name)}: a value is needed")
    values = {key: _value(hints[key], value, _join(path, key)) for key, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check one value against its type hint; int passes for float, a list for a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _target(value, path)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        fitting = [a for a in inner if isinstance(value, list | tuple) == _is_sequence(a)]
        return _value((fitting or inner)[0], value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r}: a mapping is needed")
        return _build(hint, value, path)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{path}={value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}={value!r}: a list is needed")
        any_length = origin is list or args[-1] is Ellipsis
        inner_hints = args[:1] * len(value) if any_length else args
        if len(inner_hints) != len(value):
            raise ValueError(f"{path}={value!r}: exactly {len(inner_hints)} values are needed")
        pairs = enumerate(zip(inner_hints, value, strict=True))
        items = [_value(h, v, f"{path}[{i}]") for i, (h, v) in pairs]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r}: a mapping is needed")
        return {str(k): _value(args[1], v, f"{path}.{k}") for k, v in value.items()}
    return _scalar(hint, value, path)


def _is_sequence(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # run.name=2024: YAML reads a number
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{path}={value!r}: a float is needed") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path}={value!r}: {hint.__name__} is needed, not {type(value).__name__}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{path}: NaN is no value")
    return value


def _target(value: Any, path: str) -> Any:
    if not isinstance(value, dict) or "_target_" not in value:
        raise ValueError(f"{path}={value!r}: a config with a _target_ is needed, see conf/{path}/")
    name = str(value["_target_"])
    if not name.startswith(ALLOWED_PREFIXES):
        raise ValueError(
            f"{path}._target_={name!r}: only names under {' and '.join(ALLOWED_PREFIXES)} are built"
        )
    module_name, _, class_name = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path}._target_={name!r}: {error}") from error
    params = getattr(cls, "__dataclass_params__", None)
    if (
        not isinstance(cls, type)
        or not params
        or not params.frozen
        or cls.__module__ != module_name
    ):
        raise ValueError(f"{path}._target_={name!r}: it is not a frozen config dataclass")
    return _build(cls, value, path)
