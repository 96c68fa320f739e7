"""What is being painted: the pixels of one or several regions in one row, and the windows that lie over them.

Samplers are arithmetic on single pixels, so they need not know where a pixel lies; the network does, and is given
windows. At every step each window predicts, and what overlapping windows say is averaged with smooth weights
(Bar-Tal et al. 2023, MultiDiffusion), so that no seam can arise: a pixel has one value at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.device import autocast
from wsitk.models.artifusion.fill import membrane
from wsitk.models.artifusion.repaint import Known
from wsitk.models.artifusion.windows import Lattice
from wsitk.noise import normal_noise

__all__ = ["Canvas", "Patch"]


@dataclass(frozen=True)
class Patch:
    """The part of a region that a group of windows lies over, grown by its mirror image where they reach beyond it.

    Attributes
    ----------
    image, keep
        (H, W, 3) uint8 and (H, W), True where pixels are known.
    start
        The first pixel's place (y, x) in the whole image.
    windows
        First pixels of the windows, relative to the patch.
    grown
        Pixels added before the region's first (y, x).
    """

    image: NDArray[np.uint8]
    keep: NDArray[np.bool_]
    start: tuple[int, int]
    windows: tuple[tuple[int, int], ...]
    grown: tuple[int, int]

    @classmethod
    def over(
        cls, image: NDArray[np.uint8], mask: NDArray[np.bool_], start_yx: tuple[int, int], lattice: Lattice
    ) -> list[Patch]:
        """Return a patch for each group of windows that answer for `mask`: what one holds depends on it alone."""
        groups = lattice.groups(lattice.windows(mask, start_yx))
        return [cls._of(image, mask, start_yx, np.array(group), lattice.size) for group in groups]

    @classmethod
    def _of(
        cls,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        start_yx: tuple[int, int],
        group: NDArray[np.int64],
        size: int,
    ) -> Patch:
        low, high = group.min(axis=0), group.max(axis=0) + size
        index = np.ix_(*(_mirrored(a, b, n) for a, b, n in zip(low, high, mask.shape, strict=True)))
        start = (start_yx[0] + int(low[0]), start_yx[1] + int(low[1]))
        windows = tuple((int(y), int(x)) for y, x in group - low)
        # an artifact's mirror image is no tissue either
        return cls(image[index], ~mask[index], start, windows, (-int(low[0]), -int(low[1])))

    def seen(self, size: int) -> NDArray[np.bool_]:
        """Return which pixels (H, W) a window lies over; the others are another patch's, or nobody's."""
        found = np.zeros(self.shape, bool)
        for y, x in self.windows:
            found[y : y + size, x : x + size] = True
        return found

    @property
    def shape(self) -> tuple[int, int]:
        return self.keep.shape[0], self.keep.shape[1]


def _mirrored(low: int, high: int, length: int) -> NDArray[np.int64]:
    """Return, for each place from `low` to `high`, the one within `length` that it mirrors."""
    period = max(1, 2 * (length - 1))
    folded = np.arange(low, high, dtype=np.int64) % period
    return np.minimum(folded, period - folded)


@final
class Canvas:
    """Patches side by side as (1, 3, 1, L); call it with that and a time, as one calls a network.

    `compute_batch` windows are always computed together, padded when there are fewer: that a window's prediction
    does not depend on its neighbours is then a matter of the kernels' order of sums, which is the same.
    """

    def __init__(
        self,
        network: nn.Module,
        patches: Sequence[Patch],
        lattice: Lattice,
        device: torch.device,
        compute_batch: int,
        precision: str | None,
    ) -> None:
        self.network, self.patches, self.lattice = network, patches, lattice
        self.device, self.compute_batch, self.precision = device, compute_batch, precision
        ends = np.cumsum([0, *(p.keep.size for p in patches)]).tolist()
        self.spans = [slice(a, b) for a, b in pairwise(ends)]
        self.jobs = [(k, place) for k, patch in enumerate(patches) for place in patch.windows]
        self.weights = torch.from_numpy(lattice.weights).to(device)
        self.total = self._row([self._summed(p) for p in patches])
        pixels = self._row([torch.from_numpy(p.image).permute(2, 0, 1) for p in patches])
        keep = self._row([torch.from_numpy(p.keep)[None] for p in patches])
        self.known = Known(pixels.float() / 127.5 - 1, keep)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return (1, 6, 1, L): the weighted mean of what the windows over each pixel say, 0 where none lies."""
        found = x.new_zeros(1, 6, 1, x.shape[-1])
        for first in range(0, len(self.jobs), self.compute_batch):
            jobs = self.jobs[first : first + self.compute_batch]
            batch = x.new_zeros(self.compute_batch, 3, self.lattice.size, self.lattice.size)
            for slot, job in enumerate(jobs):
                batch[slot] = self._window(x, *job)
            with self._arithmetic():
                predicted = self.network(batch, t.expand(self.compute_batch)).float()
            for slot, job in enumerate(jobs):
                self._window(found, *job).add_(predicted[slot] * self.weights)
        return found / self.total

    def _arithmetic(self) -> AbstractContextManager[object]:
        return nullcontext() if self.precision is None else autocast(self.device, self.precision)

    def noise(self, seed: int, sample: int, draw: int) -> Tensor:
        """Return draw number `draw`: a function of seed, sample and place alone, the same in any region.

        Every other sample has the negative of the one before: what the painted image owes to the noise in a line
        is gone from the mean of such two, so that a mean needs half as many.
        """
        key = (seed, sample // 2, draw)
        sign = np.float32(1 - 2 * (sample % 2))
        rows = [sign * normal_noise(key, (0, *p.start), (3, *p.shape)) for p in self.patches]
        return self._row([torch.from_numpy(row) for row in rows])

    def guess(self) -> Tensor:
        """Return each patch with its masked pixels filled smoothly, as (1, 3, 1, L) in -1..1."""
        filled = [membrane(p.image.astype(np.float32), p.keep) for p in self.patches]
        return self._row([torch.from_numpy(f).permute(2, 0, 1) for f in filled]) / 127.5 - 1

    def images(self, x: Tensor) -> list[NDArray[np.float32]]:
        """Return each patch of `x` as (H, W, 3) in 0..255."""
        pixels = ((x[0, :, 0].clamp(-1, 1) + 1) * 127.5).cpu()
        return [
            pixels[:, span].reshape(3, *patch.shape).permute(1, 2, 0).numpy()
            for span, patch in zip(self.spans, self.patches, strict=True)
        ]

    def _window(self, row: Tensor, number: int, place: tuple[int, int]) -> Tensor:
        """Return a view of one window of patch `number`: (C, size, size)."""
        whole = row[0, :, 0, self.spans[number]].view(-1, *self.patches[number].shape)
        y, x = place
        return whole[:, y : y + self.lattice.size, x : x + self.lattice.size]

    def _summed(self, patch: Patch) -> Tensor:
        """Return the sum of weights over each pixel, 1 where there is none, as (1, H, W)."""
        total = torch.zeros(1, *patch.shape)
        weights, size = self.weights.cpu(), self.lattice.size
        for y, x in patch.windows:
            total[:, y : y + size, x : x + size] += weights
        return total.masked_fill_(total == 0, 1.0)

    def _row(self, maps: Sequence[Tensor]) -> Tensor:
        """Return maps (C, H, W) as one row (1, C, 1, L) on the device."""
        return torch.cat([m.flatten(1) for m in maps], dim=1)[None, :, None].contiguous().to(self.device)
