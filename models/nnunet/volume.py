"""Networks of the nnU-Net family as the engine sees them: mirrored views, folds, and a head in pieces.

Version 1 averages probabilities over mirrored views and folds, version 2 logits. Features are turned back
before the head sees them: it looks at one voxel at a time, so it gives the same either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsitk.model import ChunkedModel, FieldSpec, Licences, ModelSpec, ObjectClass
from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["FIELD", "DenseNetwork", "Folds", "VolumeModel", "flips", "label_field", "volume_spec"]

FIELD = "labels"
"""The one dense output."""


class DenseNetwork(Protocol):
    """A module that gives (N, K, *tile) in two steps: features, and a point-wise head."""

    @property
    def head(self) -> nn.Conv3d: ...

    def features(self, x: Tensor) -> Tensor: ...


@final
class Folds(nn.Module):
    """Networks of one architecture, trained on different folds; ``logits`` are the mean of theirs."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits: list[Tensor] = [network(x)["logits"] for network in self.folds]
        return {"logits": torch.stack(logits).mean(0)}


def flips(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return all sets of `axes` to mirror, none of them first: 8 for three axes."""
    return tuple(chain.from_iterable(combinations(sorted(axes), n) for n in range(len(axes) + 1)))


def label_field(
    channels: Sequence[str], *, softmax: bool, regions: tuple[int, ...] = (), nearest: bool = False
) -> FieldSpec:
    """Return the field of a network's labels: `channels` are its outputs, background first.

    `softmax` averages probabilities and not logits; `regions` are the labels of channels that may overlap
    (a logit above 0 is a probability above 1/2); `nearest` takes labels back to the input's grid, not scores.
    """
    return FieldSpec(
        FIELD,
        tuple(channels),
        kind="labels",
        reduction="argmax",
        window="gaussian",
        dtype="uint8" if max((len(channels) - 1, *regions)) < 256 else "uint16",
        restore="nearest" if nearest else "linear",
        regions=regions,
        threshold=0.0 if regions else 0.5,
        activation="softmax" if softmax else "",
    )


def volume_spec(
    name: str,
    version: str,
    *,
    spacing_um: tuple[float, ...],
    tile: tuple[int, ...],
    channels: int,
    intensities: tuple[IntensityRule, ...],
    labels: FieldSpec,
    classes: tuple[ObjectClass, ...],
    step: float,
    weights_sha256: str,
    licences: Licences,
    spacing_tolerance: float = 0.0,
    crop: bool = True,
    normalise_first: bool = False,
) -> ModelSpec:
    """Return what the family wants of the engine: sliding windows, cubic splines, zeros beyond the border."""
    return ModelSpec(
        name=name,
        version=version,
        spacing=spacing_um,
        tile=tile,
        halo=(0, 0, 0),
        align=(1, 1, 1),
        channels=channels,
        dtype="",
        spacing_tolerance=spacing_tolerance,
        border="constant",
        fill=0.0,
        step=step,
        interpolation="cubic",
        crop=crop,
        normalise=intensities,
        normalise_first=normalise_first,
        fields=(labels,),
        classes=classes,
        weights_sha256=weights_sha256,
        licences=licences,
    )


@final
class VolumeModel(ChunkedModel):
    """One network, or those of several folds, over volumes.

    Tiles come in the source's axes (z, y, x), normalised and padded with zeros by the engine.

    Parameters
    ----------
    networks
        One for each fold; modules that are a `DenseNetwork` and return ``logits``.
    mirror
        The network's axes along which tiles are mirrored, 2**n views in all; none for one plain view.
    axes
        The network's axes as axes of the source: nnU-Net's ``transpose_forward``.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        spec: ModelSpec,
        *,
        mirror: Sequence[int] = (),
        axes: tuple[int, int, int] = (0, 1, 2),
    ) -> None:
        self.spec = spec
        self._network = networks[0] if len(networks) == 1 else Folds(networks)
        self._folds: list[DenseNetwork] = list(networks)  # type: ignore[arg-type]  # nn.Module hides members
        self._views = tuple(tuple(a + 2 for a in view) for view in flips(mirror))
        self._axes = axes
        self._averaged = spec.fields[0].activation == ""
        self.views = 1 if self._averaged else len(self._folds) * len(self._views)

    @property
    def network(self) -> nn.Module:
        return self._network

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return ``features`` of normalised tiles (N, C, *tile).

        Where probabilities are averaged, they are (N, views, F, *tile): all views of a fold, fold after fold.
        Where logits are, the head may as well see the mean of the views: (N, folds * F, *tile).
        """
        x = batch.permute(0, 1, *(2 + a for a in self._axes))
        back = [self._axes.index(a) for a in range(3)]
        folds = [self._of_fold(network, x) for network in self._folds]
        features = folds[0] if len(folds) == 1 else torch.cat(folds, dim=1)
        ahead = features.ndim - 3
        return {"features": features.permute(*range(ahead), *(ahead + a for a in back))}

    def _of_fold(self, network: DenseNetwork, x: Tensor) -> Tensor:
        """Return the fold's views (N, V, F, *tile), or their mean (N, F, *tile)."""
        found: Tensor | None = None
        for k, axes in enumerate(self._views):
            view = network.features(x.flip(axes)).flip(axes).float()
            if self._averaged:
                found = view if found is None else found.add_(view)
            else:
                if found is None:  # filled in place: a stack at the end would hold every view twice
                    found = view.new_empty((len(view), len(self._views), *view.shape[1:]))
                found[:, k] = view
        assert found is not None
        return found.div_(len(self._views)) if self._averaged and len(self._views) > 1 else found

    def head(self, features: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
        """Return logits (views, stop - start, *tile) of the classes start .. stop - 1 of one tile."""
        inside = features["features"][0]
        heads = [network.head for network in self._folds]
        weights, biases = [h.weight[start:stop] for h in heads], [_bias(h)[start:stop] for h in heads]
        if self._averaged:
            weight = torch.cat(weights, dim=1) / len(heads)
            return F.conv3d(inside[None], weight, torch.stack(biases).mean(0))
        each = len(self._views)
        parts = [
            F.conv3d(inside[k * each : (k + 1) * each], w, b)
            for k, (w, b) in enumerate(zip(weights, biases, strict=True))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bias(head: nn.Conv3d) -> Tensor:
    return head.weight.new_zeros(head.out_channels) if head.bias is None else head.bias
