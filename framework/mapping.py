"""Configs as plain mappings: what is hashed, stored beside results, and compared key by key."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def to_mapping(config: Any) -> Any:
    """A config as plain JSON types; nested configs keep their `_target_`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        mapping = {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = type(config)
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **mapping}
    if isinstance(config, dict):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_mapping(value) for value in config]
    return config


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
