"""What YAML files and overrides may tell Hydra, which runs what its own section `hydra` names.

Callbacks, logging, launchers and the search path of Hydra call any function of the installed
packages with any arguments. So only `conf/config.yaml` sets them, and an override the few below;
whatever else could reach that section is refused before Hydra reads it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Of Hydra's options, those that name no other file; `--experimental-rerun` would load a pickle.
_OPTIONS = re.compile(
    r"-h|--help|--hydra-help|--version|-r|--run|-m|--multirun|--resolve"
    r"|-c(job|hydra|all)|--(cfg|info|package)(=.*)?|-[cip]"
)
_FOLDERS = ("run.dir", "sweep.dir", "sweep.subdir")
_CHOICES = ("launcher", "sweeper")
# A choice that leads to Hydra's own section, out of the folders of YAML, or to an unread file.
_ELSEWHERE = re.compile(r"(?<![\w-])hydra(?![\w-])|\.\.|//|\$\{|\.yml|_name_")


def check_option(argument: str) -> None:
    """ValueError for an option of Hydra that names another file, such as `--config-dir`."""
    if not _OPTIONS.fullmatch(argument):
        raise ValueError(
            f"{argument}: no such option; YAML of your own comes by packages=NAME:FOLDER, and the "
            "folder conf/ by the variable LONGTAKE_CONF"
        )


def check_override(argument: str, key: str, value: Any) -> None:
    """ValueError where an override reaches Hydra's own section by more than the allowed keys.

    argument: as typed; key: as Hydra reads it, with an `@package`; value: as well, None for a sweep
    over several.
    """
    if re.fullmatch(r"hydra[./].*", key) and _is_allowed(key, value):
        return
    is_choice = ("/" in key or "@" in key or "." not in key) and not isinstance(value, dict)
    is_elsewhere = is_choice and key != "packages" and _ELSEWHERE.search(argument)
    if is_elsewhere or "hydra" in re.split(r"\W+", key):
        raise ValueError(
            f"{argument}: of Hydra's own section an override sets only "
            f"{', '.join(f'hydra.{name}' for name in _FOLDERS)}, hydra/launcher, hydra/sweeper and "
            "plain values of these two; a choice is a file of conf/ or of packages"
        )


def _is_allowed(key: str, value: Any) -> bool:
    if not isinstance(value, str | int | float):
        return False
    section, _, name = key.removeprefix("hydra.").partition(".")
    if key.removeprefix("hydra.") in _FOLDERS:
        return True
    if key.removeprefix("hydra/") in _CHOICES:
        return bool(re.fullmatch(r"[\w-]+", str(value)))
    is_field = section in _CHOICES and re.fullmatch(r"[A-Za-z]\w*", name) and name != "params"
    return bool(is_field) and "${" not in str(value)


def check_yaml(name: str, text: str, content: Any) -> None:
    """ValueError where a YAML file, other than `conf/config.yaml`, reaches Hydra's own section.

    name: its path within the folder of YAML.
    """
    headers = [line for line in text.splitlines() if "@package" in line]
    section = content if isinstance(content, Mapping) else {}
    at_fault = [
        *(line for line in headers if re.search("hydra|_name_", line)),
        *(word for word in _words(section.get("defaults")) if _ELSEWHERE.search(word)),
        *(["hydra"] if "hydra" in section else []),
        *([name] if "hydra" in re.split(r"[/.]", name) else []),
    ]
    if at_fault:
        raise ValueError(
            f"{name}: {at_fault[0]!r} is refused; only conf/config.yaml sets what is Hydra's own, "
            "and the defaults of all others name files of conf/ and of packages"
        )


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _words(inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
    else:
        yield str(value)
