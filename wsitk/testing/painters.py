"""Models that paint without weights, whose right answer is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.model import ModelSpec, RegionModel

if TYPE_CHECKING:
    import torch

__all__ = ["PlacePainter", "TruthPainter"]


class _Painter(RegionModel):
    """A model that paints a function of the place."""

    def __init__(
        self,
        name: str,
        *,
        tile: int = 96,
        halo: int = 16,
        spacing_um: float | None = None,
        version: str = "1",
    ) -> None:
        self._network: torch.nn.Module | None = None
        self.spec = ModelSpec(
            name=f"testing-{name}",
            version=version,
            spacing=None if spacing_um is None else (spacing_um, spacing_um),
            tile=(tile, tile),
            halo=(halo, halo),
            align=(1, 1),
            restores=True,
        )

    @property
    def network(self) -> torch.nn.Module:
        """Return the identity: there is nothing to learn here."""
        import torch

        self._network = self._network or torch.nn.Identity()
        return self._network

    def _evaluated(self) -> None:
        """Have the network evaluated once, as a model would."""
        import torch

        self.network(torch.zeros(1))


@final
class PlacePainter(_Painter):
    """Paints noise that is a function of (seed, sample, place on the working grid): 0..255 in each channel."""

    def __init__(self, **options: Any) -> None:
        super().__init__("place-painter", **options)

    @staticmethod
    def noise(region: Region, seed: int = 0, sample: int = 0) -> NDArray[np.uint8]:
        """Return what it paints over a region (h, w, 3), wherever the mask lies."""
        y, x = np.ogrid[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]
        mixed = (y * 73856093) ^ (x * 19349663) ^ ((seed * 31 + sample) * 83492791)
        return np.stack([(mixed >> (5 * c)) & 255 for c in range(3)], axis=-1).astype(np.uint8)

    def process_region(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        region: Region,
        *,
        seed: int = 0,
        sample: int = 0,
    ) -> NDArray[np.float32]:
        """Return the noise under the mask."""
        self._evaluated()
        assert image.shape[:2] == mask.shape == region.shape
        return np.where(mask[..., None], self.noise(region, seed, sample), image).astype(np.float32)


@final
class TruthPainter(_Painter):
    """Paints what `truth` (y, x, 3), the clean image on the working grid, shows: restores without a fault."""

    def __init__(self, truth: NDArray[np.uint8], **options: Any) -> None:
        super().__init__("truth-painter", **options)
        self._truth = truth

    def process_region(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        region: Region,
        *,
        seed: int = 0,
        sample: int = 0,
    ) -> NDArray[np.float32]:
        """Return the truth under the mask."""
        self._evaluated()
        return np.where(mask[..., None], self._truth[region.slices()], image).astype(np.float32)
