"""Are these still the bytes that were written? Looks through an output folder and changes nothing.

Every file of a finished input is listed with its sha256 in `provenance.json`; that one and the input's name
are in `.wsitk/seal.json`. So a changed, missing, emptied or swapped file is found and named, whichever it
is. The seal is a checksum, not a signature: it finds accidents, not someone who computes it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

from wsitk.blockstore import BlockStore
from wsitk.discard import RESULTS
from wsitk.durable import read_own
from wsitk.errors import OutputError
from wsitk.seal import key_bytes, seal_of
from wsitk.writers.base import sha256_file

__all__ = ["Finding", "InputReport", "Report", "output_bytes", "verify"]

TOP_FILES = ("run.json", "summary.csv", "index.html")
OWN_FILES = ("lock", "opening", "finish", "key.json", "seal.json")

_LEFTOVER = re.compile(r"\..*\.(part|partial|old)|.*\.partial")
_PASSING = ("blocks", "claims", "seen.json", "discarding.json")
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it was left; `code` is empty for what is only told.

    ``WSI520`` changed, ``WSI521`` missing, ``WSI522`` the record itself, ``WSI523`` of another input,
    ``WSI524`` unfinished, ``WSI525`` a damaged block, ``WSI526`` a link in a file's place, ``WSI527`` numbers
    that disagree. Told only: files of others, leftovers of a kill.
    """

    code: str
    path: str
    text: str

    def __str__(self) -> str:
        place = "" if self.path == "." else f"{shown(self.path)}:"
        return " ".join(part for part in (self.code, place, self.text) if part)


@dataclass(frozen=True, slots=True)
class InputReport:
    """What was found in the folder of one input; `blocks` counts whole committed blocks of unfinished ones."""

    name: str
    finished: bool
    files: int = 0
    nbytes: int = 0
    blocks: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Tell whether it is finished and every byte is as it was written."""
        return not any(f.code for f in self.findings)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in an output folder; `findings` are those that belong to no input's folder."""

    inputs: tuple[InputReport, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Tell whether all inputs are, and none is missing."""
        return all(i.ok for i in self.inputs) and not any(f.code for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "ok": self.ok,
            "inputs": [{"ok": i.ok, **asdict(i)} for i in self.inputs],
            "findings": [asdict(f) for f in self.findings],
        }


@final
class NoResultsError(OutputError):
    """Raised (WSI519) for a folder that no run has written."""

    exit_code = 2


def verify(folder: str | Path, *, on_bytes: Callable[[int], None] = lambda n: None) -> Report:
    """Return what differs below an output folder, or the folder of one input, from what was written.

    `on_bytes` is told how many bytes have been read since the last call. Memory does not grow with the
    results but with their number. Raises OutputError: WSI519 if there are no results of wsitk.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NoResultsError("WSI519", f"{root}: no such folder; name the --out of a run")
    if _is_input(root):
        return Report((_Look(root, root.absolute().name, on_bytes).report(),))
    names, strays = _inputs(root)
    known = any(name in TOP_FILES for name in os.listdir(root))
    if not names and not known:
        raise NoResultsError("WSI519", f"{root}: holds no results of wsitk; name the --out of a run")
    findings = [_stray(Path(name)) for name in strays if name not in TOP_FILES]
    findings += _promised(root, names)
    return Report(tuple(_Look(root / n, n, on_bytes).report() for n in names), tuple(findings))


def output_bytes(folder: str | Path) -> int:
    """Return the size of everything below `folder`, links left out: what `verify` will report at most."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(Path(place) / name, follow_symlinks=False).st_size
    return total


def shown(path: str) -> str:
    """Return a path as one line without control characters, whatever someone called a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def _is_input(folder: Path) -> bool:
    return (folder / ".wsitk").is_dir() or (folder / "provenance.json").is_file()


def _inputs(root: Path) -> tuple[list[str], list[str]]:
    """Return the folders of inputs, and files that lie in none of them; relative, sorted."""
    names, strays = [], []
    for place, folders, files in os.walk(root):
        relative = Path(place).relative_to(root)
        for name in list(folders):
            path = Path(place) / name
            if path.is_symlink():
                strays.append((relative / name).as_posix())
            elif _is_input(path):
                names.append((relative / name).as_posix())
                folders.remove(name)
        strays += [(relative / name).as_posix() for name in files]
    return sorted(names), sorted(strays)


def _is_leftover(path: Path) -> bool:
    """Tell whether a kill may have left this; a path below an output or an input's folder."""
    return _LEFTOVER.fullmatch(path.name) is not None or (
        path.parent.name == ".wsitk" and path.name in _PASSING
    )


def _stray(path: Path) -> Finding:
    text = "left by a run that was stopped; the next run removes it" if _is_leftover(path) else "not ours"
    return Finding("", path.as_posix(), text)


def _promised(root: Path, names: list[str]) -> Iterator[Finding]:
    """Yield what `run.json` says is done and is not there at all."""
    try:
        rows = json.loads(read_own(root / "run.json"))["inputs"]
        done = [name for name, row in rows.items() if row["status"] in ("done", "gaps")]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OutputError):
        yield Finding("WSI520", "run.json", "is damaged; run again to write it anew")
        return
    for name in sorted(set(done) - set(names)):
        yield Finding("WSI521", name, "run.json says that it is done, but its results are missing")


@final
class _Look:
    """One pass over the folder of one input."""

    def __init__(self, folder: Path, name: str, on_bytes: Callable[[int], None]) -> None:
        self._folder = folder
        self._name = name
        self._on_bytes = on_bytes
        self._found: list[Finding] = []
        self._nbytes = 0

    def report(self) -> InputReport:
        try:
            data = read_own(self._folder / "provenance.json")
        except FileNotFoundError:
            return self._without_record()
        except (OSError, OutputError) as error:
            self._say("WSI522", "provenance.json", f"cannot be read ({error})")
            return self._ended(True, 0)
        try:
            record = json.loads(data)
            outputs = {str(k): str(v) for k, v in record["outputs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self._say("WSI522", "provenance.json", "is damaged; run the same command with --overwrite")
            return self._ended(True, 0)
        self._check_seal(data)
        self._check_key(record)
        self._check_files(outputs)
        if not any(f.code for f in self._found):
            self._check_counts(record)
        self._check_others(outputs)
        return self._ended(True, len(outputs))

    def _say(self, code: str, path: str, text: str) -> None:
        self._found.append(Finding(code, path, text))

    def _ended(self, finished: bool, files: int, blocks: int = 0) -> InputReport:
        return InputReport(self._name, finished, files, self._nbytes, blocks, tuple(self._found))

    # --- a finished input ----------------------------------------------------------------------------

    def _check_seal(self, record: bytes) -> None:
        place = ".wsitk/seal.json"
        try:
            seal = read_own(self._folder / place)
            name = str(json.loads(seal)["input"])
        except FileNotFoundError:
            self._say("WSI522", place, "is missing: nothing vouches for provenance.json")
            return
        except (OSError, ValueError, KeyError, TypeError, OutputError):
            self._say("WSI522", place, "is damaged: nothing vouches for provenance.json")
            return
        if seal != seal_of(name, record):
            self._say(
                "WSI522", "provenance.json", "is not the record that was sealed; it or the seal has changed"
            )
        # The folder may be looked at from anywhere above or below the output folder.
        parts = PurePosixPath(name).parts
        if self._folder.absolute().parts[-len(parts) :] != parts:
            self._say(
                "WSI523", ".", f"these are the results of {shown(name)}; the folder was renamed or swapped"
            )

    def _check_key(self, record: Mapping[str, Any]) -> None:
        place = ".wsitk/key.json"
        try:
            if read_own(self._folder / place) != key_bytes(record["key"]):
                self._say("WSI522", place, "is not the key in provenance.json")
        except FileNotFoundError:
            self._say("WSI521", place, "is missing")
        except (OSError, KeyError, OutputError) as error:
            self._say("WSI522", place, f"cannot be compared ({error})")

    def _check_files(self, outputs: Mapping[str, str]) -> None:
        owner = {digest: name for name, digest in outputs.items()}
        for name, wanted in sorted(outputs.items()):
            parts = PurePosixPath(name).parts
            if not parts or parts[0] not in RESULTS or ".." in parts:  # a forged record leads nowhere
                self._say("WSI522", "provenance.json", f"lists {shown(name)}, which is no result")
                continue
            got = self._digest(name)
            if got is None or got == wanted:
                continue
            whose = owner.get(got)
            text = f"has changed since it was written (sha256 {got[:12]}, was {wanted[:12]})"
            if got == _EMPTY:
                text = "is empty"
            elif whose is not None:
                text = f"holds what belongs into {shown(whose)}"
            self._say("WSI520", name, f"{text}; run the same command with --overwrite")

    def _digest(self, name: str) -> str | None:
        """Return a file's hash; None, and a finding, if there is no such file."""
        path = self._folder
        for part in PurePosixPath(name).parts:
            path = path / part
            if path.is_symlink():
                self._say("WSI526", name, "is reached through a symbolic link; wsitk makes none")
                return None
        try:
            size = path.stat().st_size
            digest = sha256_file(path) if path.is_file() else None
        except FileNotFoundError:
            digest = None
        except OSError as error:
            self._say("WSI520", name, f"cannot be read ({error.strerror})")
            return None
        if digest is None:
            self._say("WSI521", name, "is missing; run the same command with --overwrite")
            return None
        self._nbytes += size
        self._on_bytes(size)
        return digest

    def _check_counts(self, record: Mapping[str, Any]) -> None:
        """Compare the rows of the tables with the numbers in the record: our own defect if they differ."""
        import pyarrow.parquet as pq

        for table, counts in (("objects.parquet", "objects"), ("tiles.parquet", "tiles")):
            if table in record["outputs"] and isinstance(record.get(counts), dict):
                rows = pq.ParquetFile(self._folder / table).metadata.num_rows
                wanted = sum(record[counts].values()) + sum(record.get(f"restored_{counts}", {}).values())
                if rows != wanted:
                    text = f"has {rows:,} rows, provenance.json says {wanted:,}; report this"
                    self._say("WSI527", table, text)

    def _check_others(self, outputs: Mapping[str, str]) -> None:
        """Tell of everything else in the folder."""
        own = {*outputs, "provenance.json", *(f".wsitk/{name}" for name in OWN_FILES)}
        for place, folders, files in os.walk(self._folder):
            inside = Path(place).relative_to(self._folder)
            # a folder that a kill has left is told once, and one behind a link is not looked into
            whole = [n for n in folders if _is_leftover(inside / n) or (Path(place) / n).is_symlink()]
            folders[:] = sorted(set(folders) - set(whole))
            paths = [inside / name for name in sorted(whole + files)]
            self._found += [_stray(path) for path in paths if path.as_posix() not in own]

    # --- an unfinished one ---------------------------------------------------------------------------

    def _without_record(self) -> InputReport:
        """Look at what an unfinished input has; or say that the record of a finished one is gone."""
        store = BlockStore(self._folder)
        sealed = (self._folder / ".wsitk" / "seal.json").exists()
        if sealed and not store.path.is_dir() and not (self._folder / ".wsitk" / "discarding.json").exists():
            self._say("WSI521", "provenance.json", "is missing, but these results were finished")
            return self._ended(True, 0)
        whole = 0
        for block in store.blocks():
            if store.intact(block):
                whole += 1
                size = store.size(block)
                self._nbytes += size
                self._on_bytes(size)
            else:
                self._say(
                    "WSI525", f".wsitk/blocks/{block:06d}", "is damaged; the same command does it again"
                )
        text = f"is unfinished: {whole:,} blocks are committed; run the same command to go on"
        self._say("WSI524", ".", text)
        return self._ended(False, 0, whole)
