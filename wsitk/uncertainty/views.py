"""Test-time augmentation: the image mirrored and turned, the answers turned back (Wang et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from torch import Tensor

from wsitk.errors import UsageError
from wsitk.uncertainty.interface import SampledModel
from wsitk.uncertainty.sampling import Sampling

__all__ = ["Turn", "Views", "turns"]


@final
@dataclass(frozen=True)
class Turn:
    """A turned image: its axis k is the original's axis ``axes[k]``, backwards where ``mirrored[k]``."""

    axes: tuple[int, ...]
    mirrored: tuple[bool, ...]

    def image(self, x: Tensor) -> Tensor:
        """Return (N, C, *space) turned."""
        turned = x.permute(0, 1, *(2 + a for a in self.axes))
        return turned.flip(self._flipped()).contiguous()

    def back(self, y: Tensor, points: Sequence[int] = ()) -> Tensor:
        """Return maps (N, C, *space) of a turned image as maps of the original.

        `points` is, for maps whose channels point along axes of space, the axis of each channel.
        """
        if points:
            y = self._upright(y, points)
        order = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return y.flip(self._flipped()).permute(0, 1, *(2 + k for k in order)).contiguous()

    def _flipped(self) -> list[int]:
        return [2 + k for k, flipped in enumerate(self.mirrored) if flipped]

    def _upright(self, y: Tensor, points: Sequence[int]) -> Tensor:
        """Return the channels that point along the original's axes, with the original's signs."""
        each = []
        for axis in points:
            turned = self.axes.index(axis)
            channel = y[:, points.index(turned)]
            each.append(-channel if self.mirrored[turned] else channel)
        return torch.stack(each, dim=1)


def turns(tile: Sequence[int]) -> list[Turn]:
    """Return the turns of a tile that keep its shape: the identity first, then mirrors, then those that swap axes.

    8 for a square (its dihedral group), 4 for another flat tile, 8 mirrors in three dimensions.
    """
    ndim = len(tile)
    plain = tuple(range(ndim))
    square = ndim == 2 and tile[0] == tile[1]
    orders = [plain, plain[::-1]] if square else [plain]
    return [Turn(axes, mirrored) for axes in orders for mirrored in product((False, True), repeat=ndim)]


@final
class Views(Sampling):
    """Asks a model about the same tile, mirrored and turned: sample k is the k-th of `turns`, the first untouched.

    Raises UsageError: WSI600, WSI606 for more samples than there are turns, WSI607 if the model can't say how its
    outputs turn.
    """

    def __init__(self, model: SampledModel, samples: int) -> None:
        super().__init__(model, samples, "turned views")
        most = len(turns(model.spec.tile))
        if samples > most:
            raise UsageError(
                "WSI606",
                f"a tile of {' x '.join(map(str, model.spec.tile))} can be turned {most} ways; got {samples} samples; "
                f"ask for 2 to {most}, or for dropout",
            )
        if model.vectors is None:
            raise UsageError(
                "WSI607",
                f"{model.spec.name} doesn't say how its outputs turn with the image, so they can't be turned back; ask "
                "for another uncertainty (dropout, ensemble)",
            )
        self._vectors: Mapping[str, tuple[int, ...]] = model.vectors

    def answers(self, batch: Tensor, starts: Sequence[tuple[int, ...]]) -> Iterable[dict[str, Tensor]]:
        """Yield the outputs for each turned batch, turned back."""
        for turn in turns(batch.shape[2:])[: self.samples]:
            outputs = self.model.predict(turn.image(batch))
            yield {name: turn.back(value, self._vectors.get(name, ())) for name, value in outputs.items()}
