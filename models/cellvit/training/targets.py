"""What the network learns from an instance map: nuclei, distances to their centres, types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Example, Labels, Types

__all__ = ["Convention", "Targets", "make_targets", "hv_target"]

Convention = Literal["upstream", "centred"]


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of one image. No loss is taken where a map is `IGNORE`.

    Attributes
    ----------
    nuclei : uint8 (H, W)
        1 inside nuclei, 0 outside, `IGNORE` where nobody labelled.
    hv : float32 (2, H, W)
        Horizontal, then vertical distance, -1 to 1; 0 outside nuclei.
    types : uint8 (H, W)
        0 for background, k for class k, `IGNORE` where unknown: everywhere, if the set names no types.
    """

    nuclei: Types
    hv: NDArray[np.float32]
    types: Types


def make_targets(example: Example, convention: Convention = "upstream") -> Targets:
    """Return the targets of an image; see `hv_target` for `convention`."""
    unlabelled = example.inst == UNLABELLED
    nuclei = np.where(unlabelled, IGNORE, example.inst > 0).astype(np.uint8)
    types = np.full(nuclei.shape, IGNORE, np.uint8) if example.types is None else example.types.copy()
    types[unlabelled] = IGNORE
    return Targets(nuclei, hv_target(example.inst, convention), types)


def hv_target(inst: Labels, convention: Convention = "upstream") -> NDArray[np.float32]:
    """Return signed distances to each instance's centre, (H, W) -> (2, H, W): horizontal, then vertical.

    The two sides of the centre are scaled separately, so that the farthest pixel of the instance is -1 on one
    side and 1 on the other (HoVer-Net, Graham et al. 2019, section 3.1). Other pixels are 0.
    ``centred`` counts from the pixel that the centre of mass falls in. ``upstream`` counts from the one before
    it, as the code of HoVer-Net and CellViT does and every published checkpoint has learned.
    """
    maps = np.zeros((2, *inst.shape), np.float32)
    rows, columns = np.nonzero(inst > 0)
    if rows.size == 0:
        return maps
    _, label = np.unique(inst[rows, columns], return_inverse=True)
    count = np.bincount(label)
    for channel, position in enumerate((columns, rows)):
        # half a pixel goes up, whatever the position: numpy would round to even
        centre = np.floor(np.bincount(label, position) / count + 0.5)
        offset = position - centre[label] + (convention == "upstream")
        low, high = np.zeros(count.size), np.zeros(count.size)
        np.minimum.at(low, label, offset)
        np.maximum.at(high, label, offset)
        reach = np.where(offset < 0, -low[label], high[label])
        maps[channel, rows, columns] = offset / np.maximum(reach, 1)
    return maps
