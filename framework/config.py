"""The typed run config: composes `conf/`, checks names, types and ranges, builds dataclasses.

YAML holds named choices; frozen dataclasses hold defaults, types and checks. A choice of a group
leads to a kind, and by it to a dataclass (`framework.kinds`); nothing else is ever instantiated.
An override may set any field of a dataclass, whether its YAML lists it or not; a misspelt one is
answered with the nearest valid name.

Only entry points and tests import this module; everyone else is handed a sub-config.
"""

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from framework.cluster import ClusterConfig
from framework.data.config import DataConfig
from framework.diffusion.samplers import SamplerConfig
from framework.evaluate.config import EvaluateConfig
from framework.export.config import ExportConfig
from framework.hydra_limits import check_option, check_override
from framework.kinds import Kinds, Package
from framework.mapping import flatten, free, free_keys, masked, to_mapping, unflatten
from framework.objectives.objective import ObjectiveConfig
from framework.printable import printable_page
from framework.run.identity import Identity, RunSection
from framework.sample.config import SampleConfig
from framework.tracking.tracker import TrackerConfig
from framework.train.config import HardwareConfig, TrainConfig
from framework.train.engine.protocol import EngineConfig, OptimizerConfig
from framework.typed import build, check_members, is_protocol
from model_zoo.protocols import CodecConfig, ModelConfig, TextConfig


@dataclass(frozen=True)
class RunConfig:
    """All that a run is made of; each group is a folder of `conf/`.

    `packages`: of your own, whose kinds and YAML are used beside ours: `team`, whose YAML is in the
    package's folder `conf`, or `team:FOLDER`. `choices`: what was chosen of each group, as typed;
    `kinds`: what kind each of them is. Nobody sets the last two.
    """

    run: RunSection
    model: ModelConfig
    codec: CodecConfig
    text: TextConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    sampler: SamplerConfig = field(metadata={"free": True})
    tracking: TrackerConfig = field(metadata={"free": True})
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = free(of=EvaluateConfig)
    sample: SampleConfig = free(of=SampleConfig)
    export: ExportConfig = free(of=ExportConfig)
    cluster: ClusterConfig = free(of=ClusterConfig)
    hardware: HardwareConfig = free(of=HardwareConfig)
    # `framework.train` says what the run would take, and does not train
    estimate: bool = free(False)
    # a window of steps of rank 0, see train.profiler
    profile: bool = free(False)
    packages: tuple[str, ...] = free(())
    choices: dict[str, str] = free(of=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> Identity:
        """The config as runs keep and compare it."""
        mapping = to_mapping(self)
        for group, kind in mapping.pop("kinds").items():
            mapping[group] = {"kind": kind, **mapping[group]}
        return Identity(masked(flatten(mapping)), free_keys(self))


# Fields of any kind: each is a folder of `conf/`.
GROUPS = tuple(name for name, h in typing.get_type_hints(RunConfig).items() if is_protocol(h))
_OURS = ("choices", "kinds")  # fields that nobody sets


def conf_dir() -> Path:
    """The folder of YAML files: `$LONGTAKE_CONF`, else `conf/` beside the packages."""
    path = Path(os.environ.get("LONGTAKE_CONF", Path(__file__).resolve().parent.parent / "conf"))
    if not (path / "config.yaml").exists():
        raise ValueError(f"no config.yaml in {path}; set LONGTAKE_CONF to the folder conf/")
    return path


def compose(overrides: Sequence[str]) -> RunConfig:
    """Compose `conf/config.yaml` with Hydra overrides and convert it; ValueError on any mistake."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        node = hydra.compose("config", _for_hydra(overrides), return_hydra_config=True)
        choices = node.hydra.runtime.choices
        # Hydra's own node refers to what only a command has.
        return convert(
            OmegaConf.masked_copy(node, [str(key) for key in node if key != "hydra"]), choices
        )


def entry(function: Callable[[RunConfig], None], section: str = "") -> None:
    """Run an entry point: Hydra reads `sys.argv`; a user's mistake is one sentence, exit code 2.

    section: of the run config, whose fields may be given without its name, `checkpoint=200` for
    `export.checkpoint=200`; other commands refuse the short form.
    """

    @hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    def run(node: DictConfig) -> None:
        try:
            function(convert(node, HydraConfig.get().runtime.choices))
        except (ValueError, OSError) as error:  # what a user gave, and the places that it names
            if os.environ.get("LONGTAKE_TRACEBACK"):
                raise
            print(f"error: {printable_page(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)  # as a shell has it for SIGINT

    try:
        sys.argv[1:] = _for_hydra([_in_section(a, section) for a in sys.argv[1:]])
    except ValueError as error:
        print(f"error: {printable_page(error)}", file=sys.stderr)
        sys.exit(2)
    run()


def convert(node: DictConfig, choices: Mapping[str, Any]) -> RunConfig:
    """Turn a composed config into dataclasses; ValueError names the key and the nearest one.

    choices: Hydra's, by group.
    """
    try:
        mapping = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except Exception as error:  # OmegaConf's own errors name the key already
        raise ValueError(str(error).strip()) from error
    assert isinstance(mapping, dict)
    given = {str(key): value for key, value in mapping.items() if key != "hydra"}
    for name in _OURS:
        if name in given:
            raise ValueError(f"{name}: no such key; a choice is made by its group, model=dit_s")
    kinds = _kinds(given.get("packages", ()))
    for group in GROUPS:
        given[group] = _by_kind(kinds, group, given.get(group))
    given["choices"] = {
        group: str(choices[group])
        for group in (*GROUPS, "data", "experiment")
        if choices.get(group) is not None
    }
    return _build(given, kinds)


def from_flat(flat: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from the values of an Identity; passwords in it are masked."""
    given = unflatten(flat)
    return _build(given, _kinds(given.get("packages", ())))


def group_from_flat(flat: Mapping[str, Any], name: str, packages: Sequence[str] = ()) -> Any:
    """One group of a flat run config, say "model" of a checkpoint's; ValueError on any mistake."""
    prefix = f"{name}."
    kept = {key.removeprefix(prefix): v for key, v in flat.items() if key.startswith(prefix)}
    kinds = _kinds(packages)
    cls, given = _resolve(kinds, name, unflatten(kept))
    check_members(cls, typing.get_type_hints(RunConfig)[name], name)
    return build(cls, given, name, lambda *_: _resolve(kinds, *_))


def _build(given: dict[str, Any], kinds: Kinds) -> RunConfig:
    """From a mapping whose groups name their kinds."""
    found = {group: given[group]["kind"] for group in GROUPS if group in given}
    return build(RunConfig, {**given, "kinds": found}, "", lambda *_: _resolve(kinds, *_))


def _kinds(packages: Sequence[str]) -> Kinds:
    return Kinds(conf_dir(), [Package.parse(text) for text in packages])


def _by_kind(kinds: Kinds, group: str, value: Any) -> dict[str, Any]:
    """A group as composed, with its kind in place of the class that its YAML states."""
    if not isinstance(value, dict):
        raise ValueError(f"{group}={value!r}: choose one of conf/{group}/, such as {group}=NAME")
    if "_target_" not in value:
        raise ValueError(f"{group}: the chosen file of conf/{group}/ states no `_target_`")
    if "kind" in value:
        raise ValueError(f"{group}.kind: no such key; choose one of conf/{group}/ by {group}=NAME")
    fields = {str(key): v for key, v in value.items() if key != "_target_"}
    return {"kind": kinds.of_target(group, str(value["_target_"])), **fields}


def _resolve(kinds: Kinds, group: str, value: Any) -> tuple[type, dict[str, Any]]:
    fields = dict(value)
    return kinds.config_class(group, str(fields.pop("kind", None))), fields


def _in_section(argument: str, section: str) -> str:
    """Turn `checkpoint=200` into `export.checkpoint=200` where only the section has such a name."""
    if not section:
        return argument
    everywhere = {f.name for f in dataclasses.fields(RunConfig)}
    its_own = {f.name for f in dataclasses.fields(typing.get_type_hints(RunConfig)[section])}
    name = argument.split("=", 1)[0]
    return f"{section}.{argument}" if name in its_own - everywhere else argument


def _for_hydra(arguments: Sequence[str]) -> list[str]:
    """Arguments as Hydra wants them, with the YAML of `packages` on its search path.

    ValueError where Hydra could not read one; its own error is about its grammar.
    """
    packages: list[str] = []
    prepared, chosen = [], []
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            parsed = None
            if argument.startswith("-"):
                check_option(argument)
            else:
                parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise ValueError(
                f"{argument} cannot be read; quote a value with spaces or signs, for the shell and "
                f"within: '{name}=\"{value}\"'"
            ) from error
        name = name.lstrip("+")
        if parsed is not None:
            key = (
                f"{parsed.key_or_group}@{parsed.package}" if parsed.package else parsed.key_or_group
            )
            given = None if parsed.is_sweep_override() else parsed.value()
            check_override(argument, str(key), given)
        if name == "packages" and parsed is not None:
            if parsed.is_sweep_override():
                raise ValueError(f"{argument}: write several packages as 'packages=[{value}]'")
            names = parsed.value()
            packages = [str(text) for text in names] if isinstance(names, list) else [str(names)]
            argument = f"packages=[{','.join(map(repr, packages))}]"
        is_override = "=" in argument and name.replace(".", "").replace("_", "").isalnum()
        is_group = (conf_dir() / name).is_dir()
        is_field = not name.startswith("hydra") and not is_group
        if is_override and is_group and parsed is not None:
            chosen.append((name, parsed.value()))
        # `++a.b=c` leaves the check of names to `convert`.
        prepared.append(f"++{argument}" if is_override and is_field else argument)
    kinds = _kinds(packages)
    for group, choice in chosen:
        if isinstance(choice, str) and choice not in (known := kinds.choices(group)):
            near = difflib.get_close_matches(choice, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            own = "" if packages else "; a choice of your own comes by packages=NAME"
            raise ValueError(f"{group}={choice}: no such choice; {hint}{own}")
    if packages:
        conf = [f"'file://{Package.parse(text).conf}'" for text in packages]
        prepared.append(f"hydra.searchpath=[{','.join(conf)}]")
    return prepared
