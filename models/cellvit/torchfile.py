"""Read checkpoints that others wrote with `torch.save`, without running or believing anything in them.

Nothing is unpickled that is not plain data: `torch.load(weights_only=True)`, with one addition, NumPy's
scalars, which training loops put beside the weights ("best_metric"). Tensors stay mapped to the file until
their sizes have been checked, so that a crafted file can't fill the memory; optimizer states, two thirds of a
training checkpoint, are never read.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsitk.errors import ModelError

__all__ = ["TorchFile", "read_torch_file", "checked_state"]

KINDS = (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)
"""NumPy scalars that may lie beside the weights."""


@dataclass(frozen=True)
class TorchFile:
    """What a checkpoint file holds. Its tensors are mapped to the file: only `checked_state` may use them."""

    path: Path
    size: int
    sha256: str
    content: Mapping[str, Any]


def read_torch_file(path: str | Path) -> TorchFile:
    """Return the dict that `torch.save` wrote to `path`, and the file's SHA-256.

    Raises ModelError: WSI302 if the file wants to import anything but tensors and plain values, WSI303 if it
    is missing, damaged, or no `torch.save` file of a dict, WSI306 if it is compressed (torch never does that;
    it could expand without bound).
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error
    _check_archive(path)
    content = _load(path)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise _unreadable(path, f"it holds a {type(content).__name__}", "wanted a dict with names as keys")
    return TorchFile(path, size, digest, content)


def _check_archive(path: Path) -> None:
    """Refuse what is no whole, uncompressed archive: mapped tensors are not checked by torch itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ModelError(
                    "WSI306", f"{path} is compressed inside; torch.save never does that; refused"
                )
            damaged = archive.testzip()
    except ModelError:
        raise
    except Exception as error:  # damaged headers make zipfile raise a dozen kinds
        then = "wanted a file of torch.save, 1.6 or later; download it again"
        raise _unreadable(path, _first_line(error), then) from error
    if damaged is not None:
        raise _unreadable(path, f"its part {damaged!r} fails its checksum", "download it again")


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals(_numpy_scalars()):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:
                raise _unsafe(path, ", ".join(sorted(unsafe)))
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except ModelError:
            raise
        except Exception as error:
            # A damaged pickle can raise anything. What torch's unpickler calls unsupported is not damage.
            if match := re.search(r"Unsupported (?:global|class|operand)[^\n]*", str(error)):
                raise _unsafe(path, match.group()) from error
            then = "the file is damaged; download it again"
            raise _unreadable(path, _first_line(error), then) from error


def _numpy_scalars() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]  # private, and it moved in NumPy 2: files carry either name
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(kind)) for kind in KINDS)]


def checked_state(file: TorchFile, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the file's ``model_state_dict``, float32, once it proves to be exactly `wanted`'s.

    `wanted` gives name and shape of every entry (tensors on the meta device will do).
    Raises ModelError: WSI301 if names or shapes differ, WSI306 if the tensors claim more than the file can
    hold, WSI307 if an entry is no plain tensor or holds something that is not finite.
    """
    state = file.content.get("model_state_dict")
    if not isinstance(state, Mapping):
        raise ModelError(
            "WSI301", f"{file.path} has no model_state_dict; wanted what CellViT's trainer saves"
        )
    _check_names(file.path, state, wanted)
    for name, tensor in state.items():
        _check_entry(file.path, name, tensor, wanted[name])
    # Entries may share one storage, each within its bounds: together they can't exceed the file either.
    total = sum(tensor.nbytes for tensor in state.values())
    if total > file.size:
        raise ModelError(
            "WSI306",
            f"{file.path}: weights claim {total} bytes of a file of {file.size}; refused before copying",
        )
    copies = {name: _copy(tensor) for name, tensor in state.items()}
    for name, tensor in copies.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                "WSI307", f"{file.path}: {name!r} has values that are not finite; take another checkpoint"
            )
    return copies


def _check_names(path: Path, state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
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


def _check_entry(path: Path, name: str, tensor: Any, wanted: Tensor) -> None:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ModelError("WSI307", f"{path}: {name!r} is {kind}, wanted a dense {wanted.dtype} tensor")
    if tensor.shape != wanted.shape:
        raise ModelError(
            "WSI301",
            f"{path} doesn't fit the network it names: {name!r} has shape {tuple(tensor.shape)}, "
            f"wanted {tuple(wanted.shape)}; was it trained with another variant or other classes?",
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ModelError(
            "WSI306",
            f"{path}: {name!r} claims {tensor.nbytes} bytes but stores {tensor.untyped_storage().nbytes()}; "
            "refused before copying",
        )


def _copy(tensor: Tensor) -> Tensor:
    """Return the tensor in memory of its own: the file may change or vanish after loading."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _unreadable(path: Path, got: str, then: str) -> ModelError:
    return ModelError("WSI303", f"{path} cannot be read as a checkpoint: {got}; {then}")


def _unsafe(path: Path, what: str) -> ModelError:
    return ModelError(
        "WSI302",
        f"{path} asks to import {what} when loaded; refused, nothing of it was run; wanted tensors and plain "
        "values only: take the file from its official place",
    )
