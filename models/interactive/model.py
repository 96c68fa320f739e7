"""Any network that reads an image and a map of clicks for each label, as the engine sees it.

The maps depend on all clicks of a volume, so they are made once and travel as further channels of the input,
not tile by tile: `Interactive.channels` gives the array that a run reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, ModelSpec, TileModel, TileResult
from wsitk.volumes.guidance import Guidance, guidance_map

__all__ = ["Interactive"]


@final
class Interactive(TileModel):
    """A network with extra channels, and how clicks fill them.

    Parameters
    ----------
    network
        Takes (N, C + labels, *tile) and returns logits (N, classes, *tile), alone or the first of several.
    spec
        Of the network without clicks: `channels` counts the image's own. Its only field names the classes.
    labels
        What is clicked on, in the order of the network's extra channels ("spleen", "background").
    guidance
        How clicks become a map: one for all labels, or one for each.
    prepare
        What the image's channels (C, *extent) pass through before the network, and before distances are
        measured in their first; nothing if left out.

    Raises UsageError (WSI083) if labels, guidance and field don't fit each other.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        labels: Sequence[str],
        guidance: Guidance | Mapping[str, Guidance],
        prepare: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> None:
        self._guidance = dict.fromkeys(labels, guidance) if isinstance(guidance, Guidance) else dict(guidance)
        if not labels or len(set(labels)) != len(labels) or set(self._guidance) != set(labels):
            raise UsageError(
                "WSI083", f"labels {list(labels)} and guidance of {sorted(self._guidance)}; wanted one each"
            )
        if len(spec.fields) != 1:
            raise UsageError(
                "WSI083", f"{len(spec.fields)} fields; wanted one, whose channels are the classes"
            )
        self.labels = tuple(labels)
        self.image_channels = spec.channels
        self.spec = replace(spec, channels=spec.channels + len(labels), dtype="")
        self._network, self._prepare = network, prepare

    @property
    def network(self) -> nn.Module:
        return self._network

    @property
    def field(self) -> FieldSpec:
        """Return the classes' field."""
        return self.spec.fields[0]

    def channels(
        self, image: ArrayLike, clicks: Mapping[str, ArrayLike], spacing: Sequence[float]
    ) -> NDArray[np.float32]:
        """Return the prepared image and a map for each label, (C + labels, *extent), to be read by a run.

        `image` is (C, *extent) on the working grid; `clicks` gives whole voxels (N, axes) for some or all
        labels; `spacing` is the voxel's size. Raises UsageError: WSI080 to WSI082 of `guidance_map`,
        WSI083 for a label that there is not, or channels in another number.
        """
        values = np.asarray(image, np.float32)
        strangers = sorted(set(clicks) - set(self.labels))
        if strangers or len(values) != self.image_channels:
            raise UsageError(
                "WSI083",
                f"clicks for {strangers} and {len(values)} channels; wanted labels of {list(self.labels)} "
                f"and {self.image_channels} channels",
            )
        if self._prepare is not None:
            values = self._prepare(values)
        maps = [
            guidance_map(clicks.get(label, ()), values[0], spacing, self._guidance[label])
            for label in self.labels
        ]
        return np.concatenate((values, np.stack(maps)), dtype=np.float32)

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the classes' probabilities (N, classes, *tile); a single class by the sigmoid."""
        logits = self._network(batch.float())
        logits = logits[0] if isinstance(logits, list | tuple) else logits
        chances = logits.sigmoid() if logits.shape[1] == 1 else torch.softmax(logits, 1)
        return {self.field.name: chances}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the map."""
        return TileResult(None, {self.field.name: outputs[self.field.name].astype(np.float32, copy=False)})
