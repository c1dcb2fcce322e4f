"""Kinds: the names by which configs are known, and the classes that they stand for.

`conf/model/dit.yaml` states a `_target_`, the module and class of a frozen config dataclass. So
`dit` is a kind of the group `model`, and that line is the only place that knows where the class is.
Runs, checkpoints, exports and trackers keep the kind alone: a class may move, its name stays.

A package of a team's own has such files in a folder `conf/` of its own, see `Package`.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from framework.hydra_limits import check_yaml

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
        """ValueError where a file of a package has a name that is taken: it would not be read.

        And where a file is no YAML, or tells Hydra more than it may: see `framework.hydra_limits`.
        """
        self._folders = (conf, *(package.conf for package in packages))
        self._prefixes = (*OUR_PREFIXES, *(f"{package.name}." for package in packages))
        taken: dict[str, Path] = {}
        for folder in self._folders:
            for path in sorted(_yaml_files(folder)):
                name = path.relative_to(folder).as_posix()
                if name in taken:
                    raise ValueError(f"{path} has the name of {taken[name]}; rename it")
                taken[name] = path
                if path != conf / "config.yaml":
                    found = path.stat()
                    _check(path, name, (found.st_mtime_ns, found.st_size, found.st_ino))

    def choices(self, group: str) -> list[str]:
        """What `group=` takes."""
        return sorted(path.stem for f in self._folders for path in (f / group).glob("*.yaml"))

    def of_target(self, group: str, target: str) -> str:
        """The kind whose YAML states `target`; ValueError where none does."""
        for kind, known in self._targets(group).items():
            if known == target:
                return kind
        self._check_prefix(group, target)
        raise ValueError(f"{group}._target_={target!r}: no file of conf/{group}/ states it")

    def config_class(self, group: str, kind: str) -> type:
        """The config dataclass of a kind; ValueError where there is none that may be built."""
        targets = self._targets(group)
        if kind not in targets:
            raise ValueError(
                f"{group}.kind={kind!r} is not known; there are {', '.join(sorted(targets))}; "
                "those of a package come by packages=NAME"
            )
        target = targets[kind]
        self._check_prefix(group, target)
        module_name, _, class_name = target.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except Exception as error:  # whatever is wrong with a module of a team's own
            words = f"{type(error).__name__}: {error}"
            raise ValueError(f"{group}._target_={target!r}: {words}") from error
        params = getattr(cls, "__dataclass_params__", None)
        is_frozen = isinstance(cls, type) and params is not None and params.frozen
        if not is_frozen or cls.__module__ != module_name:
            raise ValueError(f"{group}._target_={target!r}: it is not a frozen config dataclass")
        return cls

    def _check_prefix(self, group: str, target: str) -> None:
        if not target.startswith(self._prefixes):
            raise ValueError(
                f"{group}._target_={target!r}: only names under {' and '.join(self._prefixes)} "
                "are built"
            )

    def _targets(self, group: str) -> dict[str, str]:
        """Kind -> module and class."""
        found: dict[str, str] = {}
        for folder in self._folders:
            for kind, target in _stated(folder / group):
                first = next((name for name, known in found.items() if known == target), None)
                if first is not None:
                    raise ValueError(
                        f"{folder / group / kind}.yaml states {target!r}, as {first}.yaml does; "
                        f"let it begin with `defaults: [{first}]` instead"
                    )
                found[kind] = target
        return found


def _yaml_files(folder: Path) -> Iterator[Path]:
    """All that Hydra may read in a folder, which follows links."""
    seen = set()
    for root, names, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        names[:] = [n for n in names if os.path.realpath(os.path.join(root, n)) not in seen]
        yield from (Path(root, name) for name in files if name.endswith(".yaml"))


@functools.lru_cache(maxsize=1024)
def _check(path: Path, name: str, stamp: tuple[int, ...]) -> None:
    """Check a file once, as long as `stamp` says that it is the same."""
    content = _read(path)  # Hydra's own words on a broken one are a traceback
    check_yaml(name, path.read_text(encoding="utf-8"), content)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=64)
def _stated(folder: Path) -> tuple[tuple[str, str], ...]:
    """(kind, target) of each file in a folder that states one, by name."""
    stated = []
    for path in sorted(folder.glob("*.yaml")):
        content = _read(path)
        if isinstance(content, dict) and "_target_" in content:
            stated.append((path.stem, str(content["_target_"])))
    return tuple(stated)
