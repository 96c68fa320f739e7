"""Which device runs the network, and how: kind, precision and a fixed thread count."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from wsitk.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["autocast", "choose_device", "fix_arithmetic"]


def choose_device(wish: str) -> torch.device:
    """Return the device called `wish`; ``auto`` prefers CUDA, then MPS, then the CPU.

    Raises ModelError: WSI330 if the device is not there.
    """
    import torch

    if wish == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError("WSI330", f"device {wish!r} cannot be used ({reason}); try --device auto") from error
    return device


def fix_arithmetic(threads: int) -> None:
    """Make the same inputs give the same bits: a fixed thread count, deterministic kernels, no TF32 surprise."""
    import cv2
    import torch

    cv2.setNumThreads(1)  # tiles are the unit of parallel work; OpenCV's own pool would only get in the way
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return a context in which the network runs at `precision`; float32 means no autocast at all."""
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")
