"""Take the tensors out of files that others wrote, without running or believing anything in them.

Whatever container the weights lie in, `read_tensors` finds them: zip archives of ``torch.save`` and its stream
before 1.6, dicts inside of dicts, wrappers' prefixes in the names, safetensors. The pickles are interpreted by
`wsitk.plainpickle`, never unpickled. Optimizer states, two thirds of a training checkpoint, are not read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsitk.errors import ModelError
from wsitk.plainpickle import (
    LARGEST_META,
    PLAIN_CALLS,
    Budget,
    ForbiddenError,
    Inert,
    MalformedError,
    interpret,
    plain,
)
from wsitk.torch_containers import LARGEST_PICKLE, Archive, Legacy, Stored, Zip, check_pickle_size
from wsitk.writers.base import atomic_file

__all__ = ["TensorFile", "checked_state", "read_plain", "read_tensors", "write_safetensors"]

WRAPPERS = (
    *("model_state_dict", "state_dict", "network_weights", "teacher", "model", "net", "network"),
    *("generator", "module", "params_ema", "params", "weights"),
)
"""Keys under which trainers put the weights, the most telling first."""

PREFIXES = ("module.", "_orig_mod.")
"""What `DataParallel` and `torch.compile` put before every name."""


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds.

    Attributes
    ----------
    path, size, sha256
        The file, its bytes and its identity.
    container
        ``zip``, ``legacy`` or ``safetensors``.
    key
        Where the weights lay in the file, as dotted keys; empty if at its top.
    tensors
        The weights by name, without wrappers' prefixes, on the CPU, in the file's types, in its order.
        Names that the file gives to one tensor share it.
    meta
        What lay beside them: plain values; tensors and objects of classes only as `Inert` names.
    """

    path: Path
    size: int
    sha256: str
    container: str
    key: str
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_tensors(path: str | Path, key: str | None = None) -> TensorFile:
    """Return the weights in a file, whatever its container, and the plain values beside them.

    `key` (dotted) says where the weights lie, for files that hold several. Raises ModelError: WSI301 if no
    weights are found, or several; WSI302 if the file wants a function called (none is); WSI303 if it is
    missing, damaged or of no known kind; WSI306 if it claims more than it holds, before memory is taken;
    WSI307 if an entry among the weights is no dense tensor.
    """
    path = Path(path)
    size, digest = _identity(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if _is_safetensors(head, size):
            tensors, meta = _safetensors(path)
            return TensorFile(path, size, digest, "safetensors", "", tensors, meta)
        with closing(Zip(path, size) if head.startswith(b"PK") else Legacy(path, size)) as archive:
            state, where, beside = _weights(path, archive.content, key)
            tensors = _loaded(path, archive, state)
            return TensorFile(path, size, digest, archive.kind, where, tensors, plain(beside))
    except ForbiddenError as error:
        raise _forbidden(path, error) from error
    except MalformedError as error:
        raise _malformed(path, error) from error
    except ModelError:
        raise
    except Exception as error:  # damaged headers make zipfile and torch raise a dozen kinds
        raise _unreadable(path, _first_line(error), "the file is damaged; download it again") from error


def read_plain(path: str | Path) -> Any:
    """Return the value of a pickle of plain data: dicts, lists, numbers, text, NumPy arrays and scalars.

    Arrays are read-only. Raises ModelError: WSI302 if the file wants a function called or holds objects of
    other classes, WSI303 if it is missing or damaged, WSI306 if it claims more than it holds.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST_PICKLE else b""
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error
    try:
        check_pickle_size(size)
        return plain(interpret(io.BytesIO(content), PLAIN_CALLS, Budget(size)), objects=False)
    except ForbiddenError as error:
        raise _forbidden(path, error) from error
    except MalformedError as error:
        raise _malformed(path, error) from error


def write_safetensors(file: TensorFile, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a file's weights as safetensors, with the source's SHA-256; the file is whole or not there.

    Types stay as they are. Raises ModelError (WSI301) if there is nothing to write, WSI306 if shared tensors
    would make the result larger than the source; OutputError as `atomic_file` does.
    """
    from safetensors.torch import save

    if not file.tensors:
        raise ModelError("WSI301", f"{file.path} has no tensors; nothing was written")
    _check_total(file)
    # names may share memory, which safetensors refuses
    whole = {name: tensor.contiguous().clone() for name, tensor in file.tensors.items()}
    content = save(whole, {"source_sha256": file.sha256, "source_key": file.key})
    with atomic_file(Path(path), overwrite=overwrite) as out:
        out.write(content)


def _check_total(file: TensorFile) -> None:
    """Refuse to copy tensors that share memory into more than the file could hold."""
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    if total > file.size:
        raise ModelError(
            "WSI306",
            f"{file.path}: weights claim {total} bytes of a file of {file.size}; refused before copying",
        )


def checked_state(file: TensorFile, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the file's tensors, float32 or int64, once they prove to be exactly `wanted`'s.

    `wanted` gives name and shape of every entry (tensors on the meta device will do).
    Raises ModelError: WSI301 if names or shapes differ, WSI306 if the tensors claim more than the file can
    hold, WSI307 if an entry is of another kind or holds something that is not finite.
    """
    _check_names(file.path, file.tensors, wanted)
    for name, tensor in file.tensors.items():
        _check_entry(file.path, name, tensor, wanted[name])
    _check_total(file)
    copies = {name: _copy(tensor) for name, tensor in file.tensors.items()}
    for name, tensor in copies.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                "WSI307", f"{file.path}: {name!r} has values that are not finite; take another checkpoint"
            )
    return copies


def _is_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file starts as safetensors do: the length of a JSON object, and its brace."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


# -- where the weights are


def _weights(path: Path, content: Any, key: str | None) -> tuple[dict[str, Stored], str, dict[str, Any]]:
    """Return the weights as described, where they lay, and what lay beside them at the top."""
    top = _entries(content)
    if top is None:
        raise _unreadable(path, f"it holds a {_kind(content)}", "wanted a dict with names as keys")
    keys = _descend(path, top, key)
    value: Any = content
    for part in keys:
        value = (_entries(value) or {})[part]
    found = _entries(value) or {}
    beside = {k: v for k, v in top.items() if k != keys[0]} if keys else {}
    if not keys:
        beside = {k: v for k, v in found.items() if not isinstance(v, Stored)}
        found = {k: v for k, v in found.items() if isinstance(v, Stored)}
    for name, entry in found.items():
        if not isinstance(entry, Stored) and entry is not None:
            raise ModelError("WSI307", f"{path}: {name!r} is {_kind(entry)}, wanted a dense tensor")
    return {k: v for k, v in found.items() if v is not None}, ".".join(keys), beside


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        return value.name
    return "Tensor" if isinstance(value, Stored) else type(value).__name__


def _descend(path: Path, top: dict[str, Any], key: str | None) -> list[str]:
    """Return the keys that lead from the top to the weights."""
    if key is not None:
        return _named(path, top, key)
    keys: list[str] = []
    here = top
    while len(keys) < 4:
        inside = {k: e for k, v in here.items() if (e := _entries(v)) is not None}
        wrapper = next((k for k in WRAPPERS if k in inside), None)
        if wrapper is None and not any(isinstance(v, Stored) for v in here.values()):
            wrapper = _only(path, here, inside) if not keys else None
        if wrapper is None:
            break
        keys.append(wrapper)
        here = inside[wrapper]
    return keys


def _named(path: Path, top: dict[str, Any], key: str) -> list[str]:
    keys = key.split(".") if key else []
    here: dict[str, Any] | None = top
    for part in keys:
        here = _entries(here[part]) if here is not None and part in here else None
    if here is None:
        names = ", ".join(map(repr, list(top)[:6]))
        raise ModelError("WSI301", f"{path} has no weights at {key!r}; it holds: {names}")
    return keys


def _only(path: Path, here: dict[str, Any], inside: dict[str, dict[str, Any]]) -> str:
    """Return the one key below which there are tensors, and which is no optimizer's."""
    likely = [
        name
        for name, entries in inside.items()
        if "optim" not in name and any(isinstance(v, Stored) for v in entries.values())
    ]
    if len(likely) != 1:
        names = ", ".join(map(repr, likely or list(here)[:6]))
        what = "several sets of weights; say which, by key" if likely else "no weights that can be found"
        raise ModelError("WSI301", f"{path} has {what} (it holds: {names})")
    return likely[0]


def _entries(value: Any, depth: int = 32) -> dict[str, Any] | None:
    """Return the named entries of a dict, of a subclass's object, or of a whole module; None for all else."""
    if isinstance(value, Inert) and isinstance(value.state, dict) and "_parameters" in value.state:
        return _of_module(value.state, depth)
    if isinstance(value, Inert) and value.items:
        value = value.items
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return None
    return value


def _of_module(state: dict[Any, Any], depth: int) -> dict[str, Any]:
    """Return the parameters and buffers of a module that was saved whole, by their dotted names."""
    if not depth:
        raise MalformedError("its modules are nested too deep", oversized=True)
    found = {}
    for kind in ("_parameters", "_buffers"):
        own = state.get(kind)
        passing = state.get("_non_persistent_buffers_set") or ()
        found.update({k: v for k, v in (own if isinstance(own, dict) else {}).items() if k not in passing})
    modules = state.get("_modules")
    for name, module in (modules if isinstance(modules, dict) else {}).items():
        inside = _entries(module, depth - 1) if isinstance(module, Inert) else None
        found.update({f"{name}.{k}": v for k, v in (inside or {}).items()})
        if len(found) > LARGEST_META:
            raise MalformedError("it has more tensors than any network", oversized=True)
    return {str(name): value for name, value in found.items()}


def _loaded(path: Path, archive: Archive, state: dict[str, Stored]) -> dict[str, Tensor]:
    """Return the tensors; each storage is read once, and each view made once, however many names it has."""
    distinct = dict.fromkeys(state.values())
    for stored in distinct:
        stored.check()
    total, size = sum(stored.nbytes for stored in distinct), path.stat().st_size
    if total > size:
        raise MalformedError(f"its tensors claim {total} bytes of a file of {size}", oversized=True)
    read: dict[str, bytearray] = {}
    made: dict[Stored, Tensor] = {}
    for stored in distinct:
        key = stored.storage.key
        if key not in read:
            read[key] = archive.read(stored.storage)
        made[stored] = _view(read[key], stored)
    names = _bare_names(list(state))
    return {name: made[stored] for name, stored in zip(names, state.values(), strict=True)}


def _view(content: bytearray, stored: Stored) -> Tensor:
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    flat = torch.frombuffer(content, dtype=stored.dtype)
    return torch.as_strided(flat, stored.shape, stored.stride, stored.offset)


def _bare_names(names: list[str]) -> list[str]:
    """Return the names without the prefixes that all of them have."""
    stripped = True
    while stripped and names:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in names):
                names, stripped = [name.removeprefix(prefix) for name in names], True
    return names


# -- refusals


def _check_names(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, extra = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", extra))
            if names
        ]
        raise ModelError(
            "WSI301",
            f"{path} doesn't fit the network it names: {' and '.join(parts)} of {len(wanted)} entries; "
            "was it trained with another variant?",
        )


def _check_entry(path: Path, name: str, tensor: Tensor, wanted: Tensor) -> None:
    if tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
        raise ModelError(
            "WSI307", f"{path}: {name!r} is {tensor.dtype}, wanted a dense {wanted.dtype} tensor"
        )
    if tensor.shape != wanted.shape:
        raise ModelError(
            "WSI301",
            f"{path} doesn't fit the network it names: {name!r} has shape {tuple(tensor.shape)}, "
            f"wanted {tuple(wanted.shape)}; was it trained with another variant or other classes?",
        )


def _copy(tensor: Tensor) -> Tensor:
    """Return the tensor in memory of its own: the file may change or vanish after loading."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _identity(path: Path) -> tuple[int, str]:
    """Return a file's size and SHA-256. Raises ModelError (WSI303) if the system refuses it."""
    try:
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _unreadable(path: Path, got: str, then: str) -> ModelError:
    return ModelError("WSI303", f"{path} cannot be read as a checkpoint: {got}; {then}")


def _malformed(path: Path, error: MalformedError) -> ModelError:
    if error.oversized:
        return ModelError("WSI306", f"{path}: {error}; refused before memory was taken")
    return _unreadable(path, str(error), "is it a file of weights, and whole? download it again")


def _forbidden(path: Path, error: ForbiddenError) -> ModelError:
    return ModelError(
        "WSI302",
        f"{path} asks to call {error} when loaded; refused, nothing of it was run; wanted tensors and plain "
        "values only: take the file from its official place",
    )
