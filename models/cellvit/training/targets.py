"""What the network learns from an instance map."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def hv_target(inst: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Signed distance to each instance's centre of mass, (H, W) -> (2, H, W): horizontal, then vertical.

    As in HoVer-Net, the two sides of the centre are scaled separately, so that the farthest pixel of the
    instance is -1 on one side and 1 on the other. Background is 0.
    """
    maps = np.zeros((2, *inst.shape), np.float32)
    rows, columns = np.nonzero(inst)
    if rows.size == 0:
        return maps
    _, label = np.unique(inst[rows, columns], return_inverse=True)
    count = np.bincount(label)
    for channel, position in enumerate((columns, rows)):
        centre = np.rint(np.bincount(label, position) / count)
        offset = position - centre[label]
        low, high = np.zeros(count.size), np.zeros(count.size)
        np.minimum.at(low, label, offset)
        np.maximum.at(high, label, offset)
        reach = np.where(offset < 0, -low[label], high[label])
        maps[channel, rows, columns] = offset / np.maximum(reach, 1)
    return maps
