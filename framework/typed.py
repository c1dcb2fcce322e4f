"""Plain mappings to typed dataclasses: names, types and ranges are checked on the way.

A field whose type is a protocol takes a config of any kind; what class that is, the caller says.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

# (path of the field, its mapping) -> the dataclass to build, and what its fields are given.
Resolve = Callable[[str, Any], tuple[type, dict[str, Any]]]


def build(cls: type, given: Mapping[str, Any], path: str, resolve: Resolve) -> Any:
    """A dataclass from a mapping; ValueError names the key, and for a wrong one the nearest."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {_join(path, near[0])}?" if near else f"try {', '.join(fields)}"
            raise ValueError(f"{_join(path, key)}: no such key; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{_join(path, name)}: a value is needed")
    values = {k: _value(hints[k], value, _join(path, k), resolve) for k, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def is_protocol(hint: Any) -> bool:
    """Whether a field of this type takes a config of any kind."""
    return bool(getattr(hint, "_is_protocol", False))


def check_members(cls: type, protocol: type, path: str) -> None:
    """Raise ValueError if a config dataclass lacks a member of its group's protocol."""
    wanted = {
        name
        for base in protocol.__mro__
        if is_protocol(base)
        for name in (*vars(base), *vars(base).get("__annotations__", ()))
        if not name.startswith("_")
    }
    lacking = sorted(wanted - set(dir(cls)) - {f.name for f in dataclasses.fields(cls)})
    if lacking:
        raise ValueError(
            f"{path}: {cls.__name__} lacks {', '.join(lacking)}; see "
            f"{protocol.__module__}.{protocol.__qualname__}"
        )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _value(hint: Any, value: Any, path: str, resolve: Resolve) -> Any:
    """Check one value against its type hint; int passes for float, a list for a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_protocol(hint):
        cls, given = resolve(path, value)
        check_members(cls, hint, path)
        return build(cls, given, path, resolve)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        fitting = [a for a in inner if isinstance(value, list | tuple) == _is_sequence(a)]
        return _value((fitting or inner)[0], value, path, resolve)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r}: a mapping is needed")
        return build(hint, value, path, resolve)
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
        items = [_value(h, v, f"{path}[{i}]", resolve) for i, (h, v) in pairs]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r}: a mapping is needed")
        return {str(k): _value(args[1], v, f"{path}.{k}", resolve) for k, v in value.items()}
    return _scalar(hint, value, path)


def _is_sequence(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
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
