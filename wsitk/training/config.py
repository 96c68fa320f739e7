"""Settings from TOML into frozen dataclasses and back: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from wsitk.errors import UsageError

__all__ = ["from_table", "merged", "override", "read_toml", "to_toml"]

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's table. Raises UsageError WSI860."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError("WSI860", f"{path} does not exist; name a TOML file of settings") from error
    except (OSError, ValueError) as error:
        raise UsageError("WSI860", f"{path} is no TOML file: {error}") from error


def override(table: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return `table` with each ``section.key=value`` of `settings` put in; values as TOML, else as text.

    Raises UsageError WSI860 for a setting without ``=``.
    """
    for setting in settings:
        name, sign, text = setting.partition("=")
        if not sign or not name.strip():
            raise UsageError("WSI860", f"--set wants section.key=value, got {setting!r}")
        inner: dict[str, Any] = {}
        *above, last = name.strip().split(".")
        leaf = inner
        for part in above:
            leaf = leaf.setdefault(part, {})
        leaf[last] = _value(text.strip())
        table = merged(table, inner)
    return dict(table)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with the entries of `above` on top, table by table."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]  # both are mappings
    return result


def from_table(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Return the dataclass `kind` with the values of `table`; what the table leaves out takes its default.

    Raises UsageError: WSI861 for a key that `kind` has not, WSI862 for a value of another type, WSI863 for one
    that `kind` itself refuses with a ValueError.
    """
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]  # a dataclass, as the contract says
    values = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError("WSI861", f"there is no setting {name!r}; {hint}")
        values[key] = _typed(hints[key], value, name)
    try:
        return kind(**values)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError("WSI863", f"{where or 'settings'}: {error}") from error


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Return `value` as the annotation `hint` wants it. Raises UsageError WSI862."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_table(hint, value, name)  # type: ignore[arg-type]  # a class, as annotations are
    if origin in (Union, types.UnionType):
        return _one_of(hint, value, name)
    if hint is object:
        return value
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(
                _typed(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(k): _typed(inner[1], v, f"{name}.{k}") for k, v in value.items()}
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise UsageError("WSI862", f"{name} is {value!r}, wanted {_said(hint)}")


def _one_of(hint: Any, value: Any, name: str) -> Any:
    """Return `value` as the first member of a union that takes it; TOML has no null, so ``"none"`` stands for it."""
    inner = get_args(hint)
    if type(None) in inner and value in (None, "none"):
        return None
    for member in inner:
        try:
            return _typed(member, value, name)
        except UsageError:
            continue
    raise UsageError("WSI862", f"{name} is {value!r}, wanted {_said(hint)}")


def _said(hint: Any) -> str:
    """Return an annotation in words."""
    origin, inner = get_origin(hint), get_args(hint)
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _said(a) for a in inner)
    if origin is tuple:
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} values, each "
        return f"a list of {count}{_said(inner[0])}"
    return "a table"


def to_toml(value: Any) -> str:
    """Return a dataclass or table as TOML that `from_table` reads back; None is written as ``"none"``."""
    return "\n".join(_lines(_plain(value), ())) + "\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Return the lines of one table: its own values first, then the tables in it."""
    inner = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    lines = [f"{_key(k)} = {_literal(v)}" for k, v in table.items() if k not in inner]
    for key, value in inner.items():
        here = (*path, key)
        lines += ["", f"[{'.'.join(map(_key, here))}]", *_lines(value, here)]
    return lines


def _key(name: str) -> str:
    plain = name.replace("-", "").replace("_", "").isalnum() and name.isascii()
    return name if plain else json.dumps(name, ensure_ascii=False)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_literal(v)}" for k, v in value.items()) + " }"
    if value is None:
        return '"none"'
    # JSON's texts, numbers and truth values are TOML's too, but for inf and nan
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
