"""Frozen dataclasses from YAML and the command line: unknown settings are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of configuration.

    Raises:
        ValueError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"--config: no such file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} must hold a mapping, found {type(values).__name__}")
    return values


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it; a block with another `_target_` replaces the old one."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kept = value.get("_target_", old.get("_target_")) == old.get("_target_")
            merged[key] = merge(old, value) if kept else value
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`network.channels=[16,32]` as nested dictionaries; the value is YAML.

    Raises:
        ValueError: no equals sign, or a value that is not YAML.
    """
    path, found, value = text.partition("=")
    if not found or not path.strip():
        raise ValueError(f"--set expects section.name=value, got {text!r}")
    try:
        parsed = _scientific(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ValueError(f"--set {path}: {value!r} is not YAML: {error}") from None
    return nest(path.strip(), parsed)


def nest(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {a: {b: value}}."""
    nested = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return nested


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; everybody means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def build(cls: type, values: Any, prefix: str) -> Any:
    """A dataclass from nested dictionaries; `prefix` is the path to it, ending in a dot.

    Raises:
        ValueError: an unknown setting, a wrong type, or what the dataclass itself refuses.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{prefix[:-1] or 'configuration'} must be a mapping, got {values!r}")
    types_of = typing.get_type_hints(cls)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(cls)}
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = (
                f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(hints)}"
            )
            raise ValueError(f"unknown setting {prefix}{key}{hint}")
    return cls(**{k: _convert(hints[k], v, f"{prefix}{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, f"{name}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(o for o in options if o is not type(None))
    origin = typing.get_origin(target) or target
    value = _scientific(value) if target in (int, float) else value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), name, value, "a list")
        item = typing.get_args(target)[0]
        return tuple(_convert(item, v, f"{name}[{i}]") for i, v in enumerate(value))
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if target is int and isinstance(value, float) and value.is_integer():
        return int(value)
    right = isinstance(value, origin) and not (target is int and isinstance(value, bool))
    require(right, name, value, f"a value of type {origin.__name__}")
    return value


def plain(value: Any) -> Any:
    """Nested values with tuples turned into lists, as YAML has them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError naming the setting, what is expected and what was found."""
    if not condition:
        raise ValueError(f"{name} must be {expected}; got {value!r}")


def require_all(settings: Any, section: str, rules: Mapping[str, tuple[bool, str]]) -> None:
    """`require` for several settings of a dataclass.

    Args:
        settings: the dataclass.
        section: its name in a configuration, such as "data".
        rules: by setting, whether its value is right, and what is expected.
    """
    for name, (right, expected) in rules.items():
        require(right, f"{section}.{name}", getattr(settings, name), expected)
