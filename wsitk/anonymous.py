"""Pseudonyms of inputs: with `--anonymize` nothing in the output says what a file was called or where it lay.

An input runs under its pseudonym from the start, so that folders, tables, pictures and nearly all messages never learn
its name. What others say when they fail (decoders like to quote paths) is searched for it: in the reading process,
where such words come up, and once more where they are written down. Metadata of files need no such care: wsitk takes
pixels, their size and their channels from a file, and never reads labels, macro images, names of patients, or comments.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, final

from wsitk.errors import OutputError, UsageError, WsitkError
from wsitk.settings import Settings
from wsitk.sources.base import SourceRef

__all__ = ["Redaction", "Veil", "discreet", "is_pseudonym", "pseudonym", "veiled_record", "write_table"]

Named = TypeVar("Named", bound=Any)
"""An input: it has a name and a source."""

Planned = TypeVar("Planned", bound=Any)
"""A plan: it has a name, an identity, a key, a stamp and warnings."""

_PSEUDONYM = re.compile(r"input-[0-9a-f]{16}(\.[a-z0-9]{1,8}){0,2}")
_ENDINGS = (
    ".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".ome.tiff", ".ome.tif", ".qptiff", ".tif",
    ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".dcm",
)  # fmt: skip
_SHORTEST = 3  # letters of a name that is looked for inside other words' neighbourhood
_SIBLINGS = 10_000  # files beside an input whose names are looked for
_KEY_BYTES = 16


def pseudonym(name: str, key: bytes = b"") -> str:
    """Return what an input is called instead: ``input-`` and 16 hexadecimal digits, with the ending of its format.

    HMAC-SHA-256 of the name under `key`; without a key anyone who guesses the name can check the guess. The same name
    and key give the same pseudonym, so that a run can be resumed.
    """
    digest = hmac.new(key, name.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
    ending = next((e for e in _ENDINGS if name.lower().endswith(e)), "")
    return f"input-{digest[:16]}{ending}"


def is_pseudonym(name: str) -> bool:
    """Tell whether a name is one that `pseudonym` makes."""
    return _PSEUDONYM.fullmatch(name) is not None


def read_key(path: str) -> bytes:
    """Return the secret in a file. Raises UsageError (WSI091) if there is none, or one of less than 16 bytes."""
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise UsageError(
            "WSI091", f"--anonymize-key {path}: {error.strerror or error}; name a file"
        ) from error
    if len(key) < _KEY_BYTES:
        raise UsageError(
            "WSI091",
            f"--anonymize-key {path} holds {len(key)} bytes; give 16 or more, such as openssl rand -hex 32",
        )
    return key


@final
@dataclass(frozen=True)
class Redaction:
    """Takes the true name of one input, and the folder it lies in, out of what is said.

    Attributes
    ----------
    alias : str
        What stands there instead.
    paths : tuple of str
        Absolute paths of the input's files.
    words : tuple of str
        Other names to look for: relative paths, parts of them.
    """

    alias: str
    paths: tuple[str, ...]
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, alias: str, paths: Iterable[str], names: Iterable[str] = ()) -> Redaction:
        """Return what hides the files in `paths`, and the input's relative names."""
        absolute = [os.path.abspath(p) for p in paths if p]
        parts = [part for name in names for part in (name, *PurePosixPath(name).parts)]
        return cls(alias, tuple(absolute), tuple(dict.fromkeys(p for p in parts if not is_pseudonym(p))))

    def text(self, words: str) -> str:
        """Return a text without any of the names."""
        for pattern, instead in self._patterns():
            words = pattern.sub(instead, words)  # no backslash in it, which would mean something there
        return words

    def values(self, value: Any) -> Any:
        """Return plain JSON values, with every text in them treated so."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(k)): self.values(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.values(v) for v in value)
        return value

    def error(self, error: WsitkError) -> WsitkError:
        """Return an error of the same kind and code whose message tells no name."""
        twin = error.__reduce__()
        kind, arguments = twin[0], twin[1]
        assert callable(kind)
        hidden: WsitkError = kind(*(self.text(a) if isinstance(a, str) else a for a in arguments))
        return hidden

    def _patterns(self) -> Iterator[tuple[re.Pattern[str], str]]:
        """Yield what to look for and what to put there, the longest first."""
        for path in sorted(self.paths, key=len, reverse=True):
            for form in dict.fromkeys((path, os.path.realpath(path))):
                yield re.compile(re.escape(form)), self.alias
        for folder in sorted({os.path.dirname(p) for p in self.paths} - {"/", ""}, key=len, reverse=True):
            # whatever else lies there: parts of the same slide, or other patients
            yield re.compile(re.escape(folder) + r"(/[^\s'\":;,()\[\]]*)?"), "(path)"
        names = {*self.words, *self._siblings()}
        for path in self.paths:
            base = os.path.basename(path)
            names |= {base, _stem(base)}
        for name in sorted(names, key=lambda n: (-len(n), n)):
            if len(name) >= _SHORTEST:
                yield re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"), self.alias

    def _siblings(self) -> set[str]:
        """Return the names of files beside the input's, and inside it where it is a folder."""
        found: set[str] = set()
        folders = {os.path.dirname(p) for p in self.paths} | {os.path.splitext(p)[0] for p in self.paths}
        for folder in sorted(folders | set(self.paths)):
            try:
                with os.scandir(folder) as entries:
                    found |= {e.name for e in islice(entries, _SIBLINGS)}
            except OSError:  # not a folder, or gone: then it has nothing to tell
                continue
        return found


def _stem(name: str) -> str:
    """Return a file's name without the ending of its format; a plate's well is no part of it."""
    name = name.partition("#")[0]
    ending = next((e for e in _ENDINGS if name.lower().endswith(e)), "")
    return name.removesuffix(name[len(name) - len(ending) :]) if ending else os.path.splitext(name)[0]


@contextmanager
def discreet(arguments: Sequence[Any]) -> Iterator[None]:
    """Take the true name out of what goes wrong with an input that runs under a pseudonym.

    `arguments` are those of a request; the first `SourceRef` among them is the input. Others pass as they are.
    """
    try:
        yield
    except WsitkError as error:
        hidden = _hidden(arguments)
        if hidden is None:
            raise
        raise hidden.error(error) from None  # the chain would tell what the message doesn't
    except MemoryError:
        raise
    except Exception as error:
        hidden = _hidden(arguments)
        if hidden is None:
            raise
        raise RuntimeError(hidden.text(f"{type(error).__name__}: {error}")) from None


def _hidden(arguments: Sequence[Any]) -> Redaction | None:
    ref = next((a for a in arguments if isinstance(a, SourceRef)), None)
    if ref is None or not is_pseudonym(str(ref.options.get("name", ""))):
        return None
    return Redaction.of(str(ref.options["name"]), [ref.path, *ref.options.get("also", ())])


def veiled_identity(identity: Mapping[str, Any], alias: str) -> dict[str, Any]:
    """Return an input's identity with `alias` for every name in it: sizes and hashes tell inputs apart."""

    def veil(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: alias if k == "name" else veil(v) for k, v in value.items()}
        return [veil(v) for v in value] if isinstance(value, list | tuple) else value

    return {k: alias if k == "name" else veil(v) for k, v in identity.items()}


def veiled_stamp(stamp: Mapping[str, Any] | None, key: bytes) -> dict[str, Any] | None:
    """Return what `file_stamp` says of an input's files, which are called by pseudonyms."""
    if stamp is None:
        return None
    return {**stamp, "files": [[pseudonym(str(name), key), *rest] for name, *rest in stamp["files"]]}


def write_table(path: Path, rows: Mapping[str, tuple[str, str]], out: Path) -> None:
    """Write, or complete, the CSV that says which input is which: pseudonym, name and path of each.

    For the owner's eyes only (mode 600), and never in `out`. Raises UsageError (WSI090) for a place below `out`,
    OutputError (WSI092) where it can't be written or holds something else.
    """
    place = path.resolve()
    if place == out.resolve() or out.resolve() in place.parents:
        raise UsageError(
            "WSI090",
            f"--anonymize-table {path} lies in the output {out}, which it would undo; choose another place",
        )
    names = ("pseudonym", "name", "path")
    try:
        known = _stored_table(place, names) if place.exists() else {}
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(names)
        table.writerows((alias, *row) for alias, row in sorted({**known, **rows}.items()))
        _write_privately(place, text.getvalue().encode("utf-8", "surrogateescape"))
    except (OSError, ValueError) as error:
        raise OutputError("WSI092", f"--anonymize-table {path} can't be written: {error}") from error


def _write_privately(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all, readable by nobody else at any instant."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _stored_table(path: Path, names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    if not rows:  # made for us by a run that was killed
        return {}
    if tuple(rows[0]) != names or any(len(row) != len(names) for row in rows):
        raise ValueError("it holds something else; name a new file")
    return {alias: (name, where) for alias, name, where in rows[1:]}


@final
class Veil:
    """What a run does for `--anonymize`; without it everything passes through unchanged.

    Raises UsageError (WSI091) for a bad key, and for a key or a table without `anonymize` (WSI094).
    """

    def __init__(self, settings: Settings, out: Path) -> None:
        self._on = settings.anonymize
        self._out = out
        self._table = settings.anonymize_table
        if not self._on and (settings.anonymize_key or self._table):
            raise UsageError("WSI094", "--anonymize-key and --anonymize-table belong to --anonymize; add it")
        self._key = read_key(settings.anonymize_key) if settings.anonymize_key else b""
        self._hidden: dict[str, Redaction] = {}
        self._rows: dict[str, tuple[str, str]] = {}
        # the files of options lie in folders that may be called like a patient, too
        asked = asdict(settings).values()
        self._files = [v for v in asked if isinstance(v, str) and v and os.path.exists(v)]

    def name(self, name: str) -> str:
        """Return what an input is called in the output."""
        return pseudonym(name, self._key) if self._on and not is_pseudonym(name) else name

    def inputs(self, items: Sequence[Named]) -> list[Named]:
        """Return the inputs under the names of the output. Raises UsageError (WSI093) for open sources."""
        if not self._on:
            return list(items)
        return [self._veiled(item) for item in items]

    def _veiled(self, item: Named) -> Named:
        alias = self.name(item.name)
        source = item.source
        if not isinstance(source, str):
            ref = source.ref
            if ref is None or not is_pseudonym(str(ref.options.get("name", ""))):
                raise UsageError(
                    "WSI093", f"{alias} is an open source and has told its name; give its path instead"
                )
            source = ref.path
        paths = [str(source), *item.also, item.restored]
        self._hidden[alias] = Redaction.of(alias, [*paths, *self._files], [item.name])
        told = os.path.basename(source) if is_pseudonym(item.name) else item.name
        self._rows[alias] = (told, os.path.abspath(source))
        return replace(item, name=alias)

    def mpp(self, mpp: Mapping[str, float] | float | None) -> Mapping[str, float] | float | None:
        """Return pixel sizes by the names of the output."""
        return {self.name(k): v for k, v in mpp.items()} if isinstance(mpp, Mapping) else mpp

    def begin(self, earlier: Iterable[str]) -> None:
        """Write the table, if one is wanted; `earlier` names what is in the output already.

        Raises OutputError (WSI095) for an output that holds true names, and as `write_table`.
        """
        if not self._on:
            return
        told = [name for name in earlier if not is_pseudonym(name)]
        if told:
            raise OutputError(
                "WSI095",
                f"{self._out} holds {len(told)} inputs under their own names; choose another output for --anonymize",
            )
        if self._table:
            write_table(Path(self._table), self._rows, self._out)

    def plan(self, plan: Planned) -> Planned:
        """Return a plan whose identity, key, stamp and warnings tell no name."""
        if not self._on:
            return plan
        identity = veiled_identity(plan.identity, plan.name)
        return replace(
            plan,
            identity=identity,
            key={**plan.key, "input": identity},
            stamp=veiled_stamp(plan.stamp, self._key),
            warnings=tuple(self._hidden[plan.name].text(w) for w in plan.warnings),
        )

    def look(self, look: Callable[..., Any]) -> Callable[..., Any]:
        """Return `look` without what names a patient: no stamp's file names, and no headers of a DICOM series."""
        if not self._on:
            return look

        def veiled(target: str, *arguments: Any) -> Any:
            if target == "wsitk.writers.dicom_seg:series_of":
                return None
            found = look(target, *arguments)
            return veiled_stamp(found, self._key) if target == "wsitk.plan:stamp_of" else found

        return veiled

    def error(self, name: str, error: WsitkError) -> WsitkError:
        """Return an error about an input that doesn't tell its name."""
        hidden = self._hidden.get(self.name(name))
        return hidden.error(error) if hidden else error

    def text(self, words: str) -> str:
        """Return a text about no input in particular that tells no name."""
        for hidden in self._hidden.values():
            words = hidden.text(words)
        return words


def veiled_record(command: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the command and the settings as `run.json` holds them: with `anonymize` no path is told."""
    if not settings.get("anonymize"):
        return list(command), dict(settings)
    told = {k: v if not _tells(v) else "(not told)" for k, v in settings.items()}
    return ["wsitk", "run", "--anonymize"], told


def _tells(value: Any) -> bool:
    """Tell whether a setting may hold a path."""
    if isinstance(value, list | tuple):
        return any(_tells(v) for v in value)
    return isinstance(value, str) and (os.sep in value or "." in value or os.path.exists(value))
