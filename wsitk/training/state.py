"""A training run's checkpoint: one safetensors file with a JSON record, there whole or not at all.

The file holds nothing that executes: tensors by name, and in the header's metadata a JSON text with the key of
the run (what its result depends on) and the numbers that are no tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wsitk.errors import OutputError

__all__ = ["load", "load_into", "optimizer_tensors", "restore_optimizer", "save", "write_tensors"]

RECORD = "wsitk"


def save(
    path: Path, tensors: Mapping[str, Tensor], key: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Put a checkpoint at `path`, durably; `key` is what `load` will be asked for again."""
    write_tensors(path, tensors, {RECORD: json.dumps({"key": key, **record}, sort_keys=True)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that it is there whole or not at all, also after a power cut.

    Raises OutputError WSI867 where the disk refuses.
    """
    # safetensors refuses tensors that share memory (tied weights do): each gets its own.
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    _durably(path, lambda part: save_file(plain, part, metadata=dict(metadata)))


def _durably(path: Path, write: Callable[[Path], None]) -> None:
    """As `journal.write_durably`, for writers that want a file name: a checkpoint may be gigabytes."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it: safetensors makes files for its owner alone
        write(part)
        part.chmod(mode)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError("WSI867", f"{path} cannot be written ({error}); make room and run again") from error


def _sync(path: Path) -> None:
    """Make a file or the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, key: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the record of a checkpoint, None if there is none.

    Raises OutputError: WSI864 if it belongs to a run of another `key`, WSI865 if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads((file.metadata() or {})[RECORD])
            stored = record.pop("key")
            check_key(path, stored, key)
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise OutputError("WSI865", f"{path} is damaged ({error}); use --overwrite to start over") from error


def check_key(path: Path, stored: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    """Refuse to go on with another run's checkpoint, naming the first difference (OutputError WSI864)."""
    there, now = dict(flat(stored)), dict(flat(json.loads(json.dumps(key))))
    differ = [name for name in sorted({*there, *now}) if there.get(name) != now.get(name)]
    if differ:
        first = differ[0]
        also = f" (also {', '.join(differ[1:6])})" if differ[1:] else ""
        raise OutputError(
            "WSI864",
            f"{path.parent} holds another run: {first} is {there.get(first)!r} there, {now.get(first)!r} now"
            f"{also}; use --overwrite to start over, or another output folder",
        )


def flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tables under dotted names."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy the entries below `prefix` into a module; memory layouts stay the module's own."""
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return an optimiser's memory of each parameter as ``NAME|ENTRY``."""
    return {
        f"{names[parameter]}|{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Give an optimiser back what `optimizer_tensors` returned, laid out in memory as it was."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        name, _, entry = key.removeprefix(prefix).rpartition("|")
        parameter = parameters[name]
        if value.shape == parameter.shape and value.ndim > 0:
            # Kernels round differently for other strides, so these must be the parameter's.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][entry] = value
