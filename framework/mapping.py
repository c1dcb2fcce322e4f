"""Configs as plain mappings: what is hashed, stored beside results, and compared key by key."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

# `scheme://user:password@host`; a password may hold @ and /, so that the last @ ends it.
_PASSWORD = re.compile(r"(\w+://[^/:@\s]*):\S*@")
_TOKEN = re.compile(r"(\w+://)[^/:@\s]+@")  # a user alone may be a token
_SECRET = r"(?:password|passwd|pwd|secret|token|api_?key|access_?key|secret_?key|signature)"
_SECRET_OPTION = re.compile(rf"([?&;](?:[\w-]+[_-])?{_SECRET}=)[^&;\s]*", re.I)
_SECRET_FIELD = re.compile(rf"(?:^|[._]){_SECRET}$", re.I)
MASK = "***"


def to_mapping(config: Any) -> Any:
    """A config as plain JSON types."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_mapping(value) for value in config]
    return config


def free(default: Any = dataclasses.MISSING, *, of: Any = dataclasses.MISSING) -> Any:
    """A dataclass's field that may differ between two starts of one run.

    `default`, or `of`, a class that makes it. What is below it in a nested config is free as well.
    """
    return dataclasses.field(default=default, default_factory=of, metadata={"free": True})


def flatten(mapping: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay whole."""
    if not isinstance(mapping, dict):
        return {prefix: mapping}
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten`, where no key holds a dot of its own."""
    mapping: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split(".")
        inner = mapping
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return mapping


def free_keys(config: Any, prefix: str = "") -> tuple[str, ...]:
    """The keys of a dataclass, as `flatten` names them, whose fields are marked: see `free`."""
    keys: list[str] = []
    for f in dataclasses.fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if f.metadata.get("free"):
            keys.append(key)
        elif dataclasses.is_dataclass(value):
            keys += free_keys(value, f"{key}.")
    return tuple(keys)


def is_below(key: str, folders: Sequence[str]) -> bool:
    """Whether a flat key is one of `folders`, or lies in one."""
    return any(key == folder or key.startswith(f"{folder}.") for folder in folders)


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], free: Sequence[str] = ()
) -> list[str]:
    """What differs between two flat mappings, a line for each key that is not below `free`."""
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and not is_below(key, free)
    ]


def masked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same flat mapping with passwords replaced: in URLs, and in fields named for a secret."""
    return {
        key: MASK if value and _SECRET_FIELD.search(str(key)) else _mask(value)
        for key, value in flat.items()
    }


def mask_url(url: str) -> str:
    """A URL as it may be shown and stored."""
    url = _TOKEN.sub(rf"\1{MASK}@", _PASSWORD.sub(rf"\1:{MASK}@", url))
    return _SECRET_OPTION.sub(rf"\1{MASK}", url)


def has_password(url: str) -> bool:
    """Whether a URL holds a password that is not masked yet: before its host, or as an option."""
    return url != _SECRET_OPTION.sub(rf"\1{MASK}", _PASSWORD.sub(rf"\1:{MASK}@", url))


def _mask(value: Any) -> Any:
    if isinstance(value, str):
        return mask_url(value)
    if isinstance(value, list):
        return [_mask(item) for item in value]
    if isinstance(value, dict):
        return masked(value)
    return value
