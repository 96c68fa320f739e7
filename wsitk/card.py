"""Model cards: what a model is, was made from, can do and cannot, as TOML beside its weights.

`docs/how-to/model-card.md` tells the fields to those who write one; the tables below are the same for the
machine. A field that nobody knows is refused like one that is missing: it is a typing error, or a fact that no
reader would ever be shown.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from wsitk.errors import ModelError
from wsitk.writers.base import atomic_file, sha256_file

__all__ = ["Card", "card_problems", "read_card", "write_card"]

Check = Callable[[Any], str | None]
"""Return what was wanted instead of a value, or None if the value is right."""


@dataclass(frozen=True)
class Card:
    """A card that holds what it must; `content` is the TOML as read."""

    path: Path
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.content["name"])

    @property
    def version(self) -> str:
        return str(self.content["version"])

    @property
    def shipped(self) -> bool:
        """Tell whether the weights come with the card; else ``official`` says where they are."""
        return "weights" in self.content

    @property
    def weights(self) -> Path:
        """Return the path of the weights, which lie below the card's folder if they are `shipped`."""
        return self.path.parent / str(self.content["weights"])

    @property
    def sha256(self) -> str:
        return str(self.content["sha256"])

    def verified(self) -> bool | None:
        """Return whether the weights are those that the card describes; None if they are not there."""
        there = self.shipped and self.weights.is_file()
        return sha256_file(self.weights) == self.sha256 if there else None


def read_card(path: str | Path) -> Card:
    """Return the card at `path`. Raises ModelError (WSI314), in one line, unless it is whole and right."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _refusal(path, [str(error).splitlines()[0]]) from error
    problems = card_problems(content)
    # A picture that is no link must travel with the card, or the reader is shown nothing.
    if not problems:
        problems = [
            f"failure_cases: no picture {case['picture']} beside the card"
            for case in content.get("failure_cases", ())
            if "://" not in case["picture"] and not (path.parent / case["picture"]).is_file()
        ]
    if problems:
        raise _refusal(path, problems)
    return Card(path, content)


def write_card(path: str | Path, content: Mapping[str, Any], *, overwrite: bool = False) -> Card:
    """Write `content` as TOML and return the card; the file is whole or not there.

    The order of fields is kept, plain values before tables. Raises ModelError (WSI314) for content that
    `read_card` would refuse, OutputError as `atomic_file` does.
    """
    path = Path(path)
    if problems := card_problems(content):
        raise _refusal(path, problems)
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(("\n".join(_toml(content)).strip() + "\n").encode())
    return read_card(path)


def card_problems(content: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a card's content, field by field; empty if nothing is."""
    if "official" not in content:
        return list(_fields(content, MANDATORY, OPTIONAL, ""))
    mandatory = {k: v for k, v in MANDATORY.items() if k not in OF_SHIPPED}
    optional: dict[str, Check] = {**OPTIONAL, "spacing_um": MANDATORY["spacing_um"], "official": _official}
    return list(_fields(content, mandatory, optional, ""))


def _refusal(path: Path, problems: list[str]) -> ModelError:
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    return ModelError(
        "WSI314",
        f"{path} is no model card: {'; '.join(problems[:4])}{more}; docs/how-to/model-card.md has the fields",
    )


# --- the fields ----------------------------------------------------------------------------------------


def _fields(
    value: Any, mandatory: Mapping[str, Check], optional: Mapping[str, Check], where: str
) -> Iterator[str]:
    """Yield a line for each field that is missing, unknown or wrong."""
    yield from (f"{where}{name!r} is missing" for name in mandatory if name not in value)
    for name, got in value.items():
        check = mandatory.get(name) or optional.get(name)
        if check is None:
            yield f"{where}{name!r} is unknown"
        elif wanted := check(got):
            yield f"{where}{name!r} {wanted}"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "is no text"


def _number(value: Any) -> str | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return None if good and value >= 0 else "is no number of 0 or more"


def _count(value: Any) -> str | None:
    return None if type(value) is int and value >= 0 else "is no whole number of 0 or more"


def _length(value: Any) -> str | None:
    return None if _number(value) is None and value > 0 else "is no length above 0"


def _numbers(value: Any, count: int) -> str | None:
    good = isinstance(value, list) and len(value) == count and not any(map(_number, value))
    return None if good else f"is not {count} numbers"


def _hash(value: Any) -> str | None:
    good = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return None if good else "is no sha256 (64 digits of 0-9a-f)"


def _below(value: Any) -> str | None:
    """Take a path that stays in the card's folder: the card may come from anyone."""
    good = isinstance(value, str) and value.strip() and "\\" not in value
    path = PurePosixPath(value) if good else PurePosixPath("/")
    inside = not path.is_absolute() and ".." not in path.parts
    return None if good and inside else "is no path below the card's folder"


def _picture(value: Any) -> str | None:
    return None if isinstance(value, str) and "://" in value else _below(value)


def _color(value: Any) -> str | None:
    good = (
        isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)
    )
    return None if good else "is not three whole numbers of 0 to 255"


def _texts(value: Any) -> str | None:
    good = isinstance(value, dict) and value and not any(map(_text, value.values()))
    return None if good else "is no table of texts"


def _free(value: Any, *, wants: str = "") -> str | None:
    """Take a table whose fields belong to the model; `wants` is the one that it must have."""
    if not isinstance(value, dict):
        return "is no table"
    return f"has no {wants!r}" if wants and _text(value.get(wants)) else None


def _table(value: Any, *, mandatory: Mapping[str, Check], optional: Mapping[str, Check]) -> str | None:
    if not isinstance(value, dict):
        return "is no table"
    return next((f"is wrong: {p}" for p in _fields(value, mandatory, optional, "")), None)


def _tables(
    value: Any, *, mandatory: Mapping[str, Check], optional: Mapping[str, Check], least: int = 0
) -> str | None:
    if not isinstance(value, list) or len(value) < least:
        return f"is no list of tables, at least {least}"
    wrong = ((i, _table(each, mandatory=mandatory, optional=optional)) for i, each in enumerate(value, 1))
    return next((f"number {i} {problem}" for i, problem in wrong if problem), None)


def _measured(value: Any) -> str | None:
    """Take ``definition``, ``script``, and a table of figures for each set that was measured."""
    if not isinstance(value, dict):
        return "is no table"
    for name, got in value.items():
        problem = _text(got) if name in ("definition", "script") else _figures(got, inner=True)
        if problem:
            return f"is wrong: {name!r} {problem}"
    return None if "definition" in value else "is wrong: 'definition' is missing"


def _figures(value: Any, *, inner: bool) -> str | None:
    """Take numbers, each with its interval if there is one, counts, and the same for each class."""
    if not isinstance(value, dict):
        return "is no table"
    for name, got in value.items():
        if name in ("note", "data", "unit"):
            problem = _text(got)
        elif name.endswith("_ci95"):
            problem = _interval(value, name, got)
        elif name == "per_class" and inner:
            problem = _each(got)
        elif isinstance(got, dict):
            problem = next((f"{k!r} {p}" for k, v in got.items() if (p := _count(v))), None)
        else:
            problem = _number(got)
        if problem:
            return f"is wrong: {name!r} {problem}"
    return None


def _interval(value: Mapping[str, Any], name: str, got: Any) -> str | None:
    if name.removesuffix("_ci95") not in value:
        return "is the interval of a figure that is not there"
    return None if _numbers(got, 2) is None and got[0] <= got[1] else "is not two numbers in order"


def _each(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "is no table"
    each = ((name, _figures(figures, inner=False)) for name, figures in value.items())
    return next((f"{name!r} {problem}" for name, problem in each if problem), None)


_TEXT = {"name": _text, "licence": _text}

OF_SHIPPED = ("weights", "sha256", "size_bytes", "spacing_um")
"""What a card need not say whose weights are others' to publish: its ``official`` says where they are."""

_official = partial(_table, mandatory={"file": _text, "link": _text}, optional={"note": _text})

MANDATORY: Mapping[str, Check] = {
    "name": _text,
    "version": _text,
    "summary": _text,
    "paper": _text,
    "spacing_um": _length,
    "classes": partial(_tables, mandatory={"name": _text, "color": _color}, optional={}, least=1),
    "weights": _below,
    "sha256": _hash,
    "size_bytes": _count,
    "parameters": _count,
    "licence": _text,
    "data_licence": _text,
    "use": _text,
    "training_data": partial(
        _tables,
        mandatory=_TEXT | {"labels": _text},
        optional={"link": _text, "note": _text, "images": _count, "objects": _count},
        least=1,
    ),
    "known_failures": _texts,
}
"""What every card says."""

OPTIONAL: Mapping[str, Check] = {
    "cite": _text,
    "network": partial(_free, wants="arch"),
    "normalisation": partial(
        _table,
        mandatory={"mean": partial(_numbers, count=3), "std": partial(_numbers, count=3)},
        optional={"scale": _length},
    ),
    "postprocessing": _free,
    "training": partial(
        _table,
        mandatory={"hours": _number, "hardware": _text, "energy_kwh": _number, "energy_from": _text},
        optional={
            "seed": _count,
            "steps": _count,
            "epochs": _number,
            "config": _text,
            "command": _text,
            "code": _text,
            "note": _text,
        },
    ),
    "measured": _measured,
    "failure_cases": partial(
        _tables,
        mandatory={"picture": _picture, "caption": _text},
        optional={"source": _text, "licence": _text},
    ),
    "started_from": partial(_tables, mandatory=_TEXT, optional={"link": _text, "note": _text}),
}
"""What a card says where there is something to say."""


# --- TOML ----------------------------------------------------------------------------------------------


def _toml(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a card: values first, since a TOML table takes in whatever follows its header."""
    tables = {k: v for k, v in content.items() if isinstance(v, Mapping)}
    lists = {k: v for k, v in content.items() if _is_tables(v) and k != "classes"}
    plain = (item for item in content.items() if item[0] not in tables and item[0] not in lists)
    yield from (f"{_key(key)} = {_value(value)}" for key, value in plain)
    for key, value in tables.items():
        yield from _section(value, (key,))
    for key, value in lists.items():
        for each in value:
            yield from ("", f"[[{_key(key)}]]", *(f"{_key(k)} = {_value(v)}" for k, v in each.items()))


def _section(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Yield a table with its header; tables of ``measured`` get headers of their own, deeper ones don't."""
    deeper = {k: v for k, v in table.items() if path == ("measured",) and isinstance(v, Mapping)}
    yield from ("", f"[{'.'.join(map(_key, path))}]")
    yield from (f"{_key(k)} = {_value(v)}" for k, v in table.items() if k not in deeper)
    for key, value in deeper.items():
        yield from _section(value, (*path, key))


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # Texts, numbers and truth values are written in TOML as in JSON, but for DEL, which JSON leaves alone.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
