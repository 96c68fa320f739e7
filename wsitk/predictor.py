"""A model on its device: groups of tiles in, outputs out, always in the same shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.device import autocast
from wsitk.model import TileModel

if TYPE_CHECKING:
    import torch

__all__ = ["Predictor"]


@final
class Predictor:
    """Runs `model.predict` on `device` at `precision`, for groups of at most `spec.compute_batch` tiles.

    A short group is filled up with blank tiles: the arithmetic depends on the shape, and a tile's result
    must not depend on how many neighbours it came with.
    """

    def __init__(self, model: TileModel, device: torch.device, precision: str) -> None:
        self._model = model
        self._device = device
        self.precision = precision
        model.network.to(device).eval()

    def __call__(
        self, tiles: Sequence[NDArray[Any]], *, precision: str = ""
    ) -> tuple[list[Mapping[str, torch.Tensor]], str]:
        """Return each tile's outputs, still on the device; or none, and why not (no memory for the group).

        `precision` is for this group instead of the predictor's own.
        """
        import torch

        try:
            with torch.inference_mode(), autocast(self._device, precision or self.precision):
                outputs = self._model.predict(self._batch(tiles))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            return (
                [],
                f"WSI320 out of device memory with {self._model.spec.compute_batch} tiles at once: {reason}",
            )
        return [{name: value[i] for name, value in outputs.items()} for i in range(len(tiles))], ""

    def _batch(self, tiles: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Return (compute_batch, C, *tile) on the device."""
        import torch

        stack = np.zeros((self._model.spec.compute_batch, *tiles[0].shape), tiles[0].dtype)
        for place, pixels in enumerate(tiles):
            stack[place] = pixels
        batch = torch.from_numpy(np.ascontiguousarray(np.moveaxis(stack, -1, 1)))
        return batch.to(self._device, non_blocking=True)
