"""A model on its device: groups of tiles in, outputs out, always in the same shape.

The classes of a `ChunkedModel` are computed a few at a time, when a stitcher asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.device import autocast
from wsitk.model import ChunkedModel, FieldSpec, TileModel

if TYPE_CHECKING:
    import torch

__all__ = ["ChunkedScores", "Predictor"]

_CHUNK_VALUES = 1 << 24  # scores that are computed at once: 64 MiB in float32


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
        self, tiles: Sequence[NDArray[Any]], starts: Sequence[tuple[int, ...]] = (), *, precision: str = ""
    ) -> tuple[list[Mapping[str, torch.Tensor]], str]:
        """Return each tile's outputs, still on the device; or none, and why not (no memory for the group).

        `starts` is where the tiles begin on the working grid, 0 where it is left out. `precision` is for this
        group instead of the predictor's own.
        """
        import torch

        try:
            with torch.inference_mode(), autocast(self._device, precision or self.precision):
                outputs = self._model.predict_at(self._batch(tiles), self._filled(starts))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            return (
                [],
                f"WSI320 out of device memory with {self._model.spec.compute_batch} tiles at once: {reason}",
            )
        return [{name: value[i] for name, value in outputs.items()} for i in range(len(tiles))], ""

    def scores(
        self,
        model: ChunkedModel,
        features: Mapping[str, torch.Tensor],
        field: FieldSpec,
        *,
        precision: str = "",
    ) -> ChunkedScores:
        """Return a field of one tile, to be computed from its features; `precision` is as above."""
        return ChunkedScores(model, features, field, self._device, precision or self.precision)

    def _filled(self, starts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return a start for each tile of a full group."""
        spec = self._model.spec
        return [*starts, *[(0,) * spec.ndim] * (spec.compute_batch - len(starts))]

    def _batch(self, tiles: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Return (compute_batch, C, *tile) on the device."""
        import torch

        stack = np.zeros((self._model.spec.compute_batch, *tiles[0].shape), tiles[0].dtype)
        for place, pixels in enumerate(tiles):
            stack[place] = pixels
        batch = torch.from_numpy(np.ascontiguousarray(np.moveaxis(stack, -1, 1)))
        return batch.to(self._device, non_blocking=True)


@final
class ChunkedScores:
    """A field of one tile, computed from its features in chunks of channels; see `wsitk.model.Scores`.

    With ``softmax`` the denominator is summed over all chunks first, as the logarithm of a sum of exponentials.
    To be called in the thread that owns the device. `finite` tells whether all scores are finite numbers.
    """

    def __init__(
        self,
        model: ChunkedModel,
        features: Mapping[str, torch.Tensor],
        field: FieldSpec,
        device: torch.device,
        precision: str,
    ) -> None:
        self._model, self._field = model, field
        self._features = {name: value[None] for name, value in features.items()}
        self._device, self._precision = device, precision
        pixels = max(int(np.prod(v.shape[-model.spec.ndim :])) for v in self._features.values())
        self._step = max(1, _CHUNK_VALUES // (pixels * model.views))
        self.finite = True
        self._denominator = self._sum()

    def _head(self, start: int, stop: int) -> torch.Tensor:
        """Return scores (views, stop - start, *tile), float32."""
        import torch

        with torch.inference_mode(), autocast(self._device, self._precision):
            return self._model.head(self._features, self._field.name, start, stop).float()

    def _sum(self) -> torch.Tensor | None:
        """Return the logarithm of the softmax's denominator (views, 1, *tile); look at every score."""
        import torch

        total: torch.Tensor | None = None
        for start in range(0, len(self._field.channels), self._step):
            scores = self._head(start, min(start + self._step, len(self._field.channels)))
            self.finite = self.finite and bool(torch.isfinite(scores).all())
            if self._field.activation == "softmax":
                part = scores.logsumexp(1, keepdim=True)
                total = part if total is None else torch.logaddexp(total, part)
        return total

    def __call__(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return channels start .. stop - 1, activated and averaged over the views: (stop - start, *tile)."""
        import torch

        parts = []
        for low in range(start, stop, self._step):
            scores = self._head(low, min(low + self._step, stop))
            with torch.inference_mode():
                if self._denominator is not None:
                    scores = (scores - self._denominator).exp_()
                parts.append((scores[0] if len(scores) == 1 else scores.mean(0)).cpu().numpy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
