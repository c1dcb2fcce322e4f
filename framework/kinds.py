"""Kinds: the names by which configs are known, and the classes that they stand for.

`conf/model/dit.yaml` states a `_target_`, the module and class of a frozen config dataclass. So
`dit` is a kind of the group `model`, and that line is the only place that knows where the class is.
Runs, checkpoints, exports and trackers keep the kind alone: a class may move, its name stays.

A package of a team's own has such files in a folder `conf/` of its own, see `Package`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

OUR_PREFIXES = ("framework.", "model_zoo.")


@dataclass(frozen=True)
class Package:
    """Somebody's own models, codecs, objectives and so on, and the YAML that names them.

    `name`: of a Python package that can be imported. `conf`: its folder of YAML files.
    """

    name: str
    conf: Path

    @classmethod
    def parse(cls, text: str) -> "Package":
        """`team` (YAML in the package's own folder `conf`), or `team:FOLDER`."""
        name, _, folder = text.partition(":")
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"packages={text}: there is no package {name!r}; it must lie in the folder that "
                "the command runs in, on PYTHONPATH, or be installed"
            )
        conf = Path(folder) if folder else Path(spec.submodule_search_locations[0], "conf")
        if not conf.is_dir():
            raise ValueError(f"packages={text}: {conf} is no folder; name it by {name}:FOLDER")
        return cls(name, conf.resolve())


class Kinds:
    """The kinds of each group, of Longtake and of packages."""

    def __init__(self, conf: Path, packages: Sequence[Package] = ()) -> None:
        self._folders = (conf, *(package.conf for package in packages))
        self._prefixes = (*OUR_PREFIXES, *(f"{package.name}." for package in packages))

    def of_target(self, group: str, target: str) -> str:
        """The kind whose YAML states `target`; ValueError where none does."""
        for kind, known in self._targets(group).items():
            if known == target:
                return kind
        if not target.startswith(self._prefixes):
            raise ValueError(
                f"{group}._target_={target!r}: only names under {' and '.join(self._prefixes)} "
                "are built"
            )
        raise ValueError(f"{group}._target_={target!r}: no file of conf/{group}/ states it")

    def config_class(self, group: str, kind: str) -> type:
        """The config dataclass of a kind; ValueError where there is none that may be built."""
        targets = self._targets(group)
        if kind not in targets:
            raise ValueError(
                f"{group}.kind={kind!r} is not known; there are {', '.join(sorted(targets))}"
            )
        target = targets[kind]
        if not target.startswith(self._prefixes):
            raise ValueError(
                f"{group}._target_={target!r}: only names under {' and '.join(self._prefixes)} "
                "are built"
            )
        module_name, _, class_name = target.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{group}._target_={target!r}: {error}") from error
        params = getattr(cls, "__dataclass_params__", None)
        is_frozen = isinstance(cls, type) and params is not None and params.frozen
        if not is_frozen or cls.__module__ != module_name:
            raise ValueError(f"{group}._target_={target!r}: it is not a frozen config dataclass")
        return cls

    def _targets(self, group: str) -> dict[str, str]:
        """Kind -> module and class."""
        found: dict[str, str] = {}
        for folder in self._folders:
            for kind, target in _stated(folder / group):
                if kind in found or target in found.values():
                    raise ValueError(
                        f"{folder / group / kind}.yaml states {target!r}, which another file does, "
                        f"or its name is taken; let it begin with `defaults: [KIND]`"
                    )
                found[kind] = target
        return found


@functools.lru_cache(maxsize=64)
def _stated(folder: Path) -> tuple[tuple[str, str], ...]:
    """(kind, target) of each file in a folder that states one, by name."""
    stated = []
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if isinstance(content, dict) and "_target_" in content:
            stated.append((path.stem, str(content["_target_"])))
    return tuple(stated)
