"""A bundle's configuration as plain values: references are followed, and nothing in it is ever run unasked.

MONAI's own reader evaluates every text that begins with ``$`` as Python. Here such a text is refused by its
place, before anything else is done with the bundle; see `Config.read`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from wsitk.errors import ModelError

__all__ = ["Config", "Expressions", "Unevaluated", "read_file", "refused"]

Expressions = Literal["refuse", "skip", "trust"]
"""What becomes of ``$`` expressions: none may be there, they are left alone, or those that are needed are run."""

LARGEST = 4 << 20
MOST_VALUES = 200_000
DEEPEST = 60

NAMES = ("inference.json", "inference.yaml", "inference.yml")


@final
@dataclass(frozen=True)
class Config:
    """The tree of a bundle's inference configuration.

    `value` follows references (``@a#b``, ``@a::b``). Raises ModelError: WSI361 for an expression where a value is
    needed, WSI364 for a reference that leads nowhere, round in circles, or is relative, and for macros (``%``).
    """

    path: Path
    tree: Mapping[str, Any]
    expressions: Expressions = "refuse"
    _parsers: list[Any] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def read(cls, folder: Path, expressions: Expressions) -> Config:
        """Return the configuration in a bundle's folder.

        Raises ModelError: WSI360 without one, or for one that can't be read; WSI361 if there is any expression,
        be it needed or not, unless they are skipped or trusted.
        """
        configs = folder / "configs"
        path = next((configs / name for name in NAMES if (configs / name).is_file()), None)
        if path is None:
            raise ModelError("WSI360", f"{folder} is no MONAI bundle: wanted configs/{' or '.join(NAMES)}")
        tree = read_file(path)
        found = [f"{where} = {value[:60]!r}" for where, value in _texts(tree) if value.startswith("$")]
        if found and expressions == "refuse":
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ModelError(
                "WSI361",
                f"{path} holds Python to be run: {', '.join(found[:3])}{more}; nothing was run; give "
                "expressions='skip' to use the bundle without it, or trust=True if you trust its authors",
            )
        return cls(path, tree, expressions)

    def value(self, where: str) -> Any:
        """Return what lies at `where` (keys joined by ``#``), with all references followed; None if nothing does."""
        keys = where.split("#")
        if not self._has(keys):
            return None
        return self._resolved(self._at(keys), keys, ())

    def first(self, *names: str) -> tuple[str, Any]:
        """Return the first of the entries that is there and no expression that is to be left alone.

        The name is empty if there is none.
        """
        for name in names:
            if name in self.tree and not (self.expressions == "skip" and _is_expression(self.tree[name])):
                return name, self.value(name)
        return "", None

    def _has(self, keys: list[str]) -> bool:
        try:
            self._at(keys)
        except (KeyError, IndexError, TypeError, ValueError):
            return False
        return True

    def _at(self, keys: list[str]) -> Any:
        here: Any = self.tree
        for key in keys:
            here = here[int(key)] if isinstance(here, list) else here[key]
        return here

    def _resolved(self, value: Any, keys: list[str], passed: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {k: self._inside(v, [*keys, k], passed) for k, v in value.items()}
        if isinstance(value, list):
            return [self._inside(v, [*keys, str(i)], passed) for i, v in enumerate(value)]
        if isinstance(value, str) and value[:1] in ("$", "@", "%"):
            return self._text(value, keys, passed)
        return value

    def _inside(self, value: Any, keys: list[str], passed: tuple[str, ...]) -> Any:
        """Return a nested value; an expression that is skipped stays what it is, for whoever needs it to refuse."""
        if self.expressions == "skip" and _is_expression(value):
            return Unevaluated("#".join(keys), value)
        return self._resolved(value, keys, passed)

    def _text(self, text: str, keys: list[str], passed: tuple[str, ...]) -> Any:
        place = "#".join(keys)
        if text.startswith("$"):
            return self._evaluated(text, place)
        target = text[1:].replace("::", "#")
        if text.startswith("%") or target.startswith("#") or target in passed or len(passed) > DEEPEST:
            why = "leads back to itself" if target in passed else "is a kind that wsitk does not follow"
            raise ModelError(
                "WSI364", f"{self.path}: {place} is {text!r}, which {why}; write the value itself"
            )
        there = target.split("#")
        if not self._has(there):
            raise ModelError(
                "WSI364", f"{self.path}: {place} is {text!r}, and there is no such entry; add it"
            )
        return self._inside(self._at(there), there, (*passed, target))

    def _evaluated(self, text: str, place: str) -> Any:
        """Return what an expression gives, if expressions are trusted, by MONAI's own reader."""
        if self.expressions != "trust":
            raise refused(self.path, place, text)
        if not self._parsers:
            from monai.bundle import ConfigParser

            self._parsers.append(ConfigParser(dict(self.tree)))
        return self._parsers[0].get_parsed_content(place.replace("#", "::"))


@dataclass(frozen=True)
class Unevaluated:
    """An expression that was left alone."""

    place: str
    text: str


def refused(path: Path, place: str, text: str) -> ModelError:
    """Return the error for an expression where a value is needed."""
    return ModelError(
        "WSI361",
        f"{path}: {place} is Python ({text[:60]!r}), and its value is needed; nothing was run; write the value, or "
        "give trust=True if you trust its authors",
    )


def read_file(path: Path) -> dict[str, Any]:
    """Return a JSON or YAML file that holds a table of plain values.

    Raises ModelError (WSI360) if it is missing, too large, damaged, nested without end, or anything else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ModelError(
                "WSI360", f"{path} has {path.stat().st_size} bytes; no configuration is that long"
            )
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(path, text)
        _count(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError("WSI360", f"{path} can't be read: {reason}; is the bundle whole?") from error
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise ModelError(
            "WSI360", f"{path} holds a {type(content).__name__}, wanted a table with names as keys"
        )
    return content


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]  # it ships no types
    except ImportError as error:
        raise ModelError("WSI365", f"{path}: PyYAML is missing; pip install 'wsitk[monai]'") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML of plain values: {error}") from error


def _count(content: Any) -> None:
    """Raise ValueError for a tree that is too large or too deep; YAML's aliases can make a page into a petabyte."""
    left = MOST_VALUES
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise ValueError("too many values, or nested too deep")
        if isinstance(value, dict):
            stack += [(v, depth + 1) for v in (*value.keys(), *value.values())]
        elif isinstance(value, list):
            stack += [(v, depth + 1) for v in value]


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a tree with its place, keys included: MONAI evaluates those, too."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            place = f"{where}#{key}" if where else str(key)
            yield place, str(key)
            yield from _texts(each, place)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _texts(each, f"{where}#{index}")


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$")
