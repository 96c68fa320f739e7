"""Make `import timm` and `import segment_anything` work beside a torchvision built for another torch.

torchvision from PyPI is built for CUDA. Beside a CPU build of torch its compiled operators don't load; then
``import torchvision`` fails at a registration ("operator torchvision::nms does not exist"), and with it
everything that imports torchvision for its Python parts alone. Declaring the two operators' schemas is
enough: they exist without an implementation, and nothing here calls them.

Use it before the first such import:

    from wsitk.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    import timm
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from wsitk.errors import ModelError

__all__ = ["ensure_torchvision"]

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_LIBRARIES: list[Any] = []
"""Keeps the declarations alive: torch withdraws them with the object that made them."""


@cache
def ensure_torchvision() -> Literal["native", "patched"]:
    """Prepare `import torchvision`; return whether its own operators serve or had to be declared.

    Raises ModelError (WSI309) if torchvision is not installed.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModelError("WSI309", "torchvision is not installed; install it from where torch came from")
    if "torchvision" in sys.modules or _loads(Path(spec.origin).parent):
        return "native"
    import torch

    # torch leaves these calls without types, hence Any.
    torch_library: Any = torch.library
    library = torch_library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _LIBRARIES.append(library)
    return "patched"


def _loads(folder: Path) -> bool:
    """Load torchvision's compiled operators, as torchvision would; return whether that worked."""
    import torch

    operators: Any = torch.ops
    for path in sorted(folder.glob("_C*")):
        if path.suffix in (".so", ".pyd", ".dylib"):
            try:
                operators.load_library(path)
            except OSError:
                return False
            return True
    return False
