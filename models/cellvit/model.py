"""CellViT as the engine sees it: the shipped model by default, or any official checkpoint.

The engine hands over raw pixels; a tile's answer is its nuclei and the probability maps. Hörst et al. 2024,
"CellViT: Vision Transformers for precise cell segmentation and classification", Medical Image Analysis 94.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray

from wsitk.errors import ModelError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, ObjectClass, TileResult
from wsitk.models.cellvit.checkpoint import load_checkpoint
from wsitk.models.cellvit.classifier import ClassifierInfo, LinearClassifier, cell_tokens, load_classifier
from wsitk.models.cellvit.postprocess import HoverSettings, objects_from_maps
from wsitk.objects import ObjectTable
from wsitk.settings import home
from wsitk.uncertainty.interface import SampledModel

if TYPE_CHECKING:
    from wsitk.models.cellvit.compact import CompactCellViT
    from wsitk.models.cellvit.network import CellViT

__all__ = ["CellViTModel", "cellvit_256", "cellvit_sam_h", "default_model", "from_checkpoint"]

FIELD = "probability"
"""The one dense output; its first channel is the probability of any nucleus."""

OFFICIAL = "https://zenodo.org/records/15094831"

UPSTREAM_LICENCE = "Apache-2.0 with Commons Clause (SAM-derived parts: Apache-2.0); cite CellViT"

Triple = tuple[float, float, float]
Mode = Literal["default", "upstream"]


@final
class CellViTModel(SampledModel):
    """A CellViT network, its normalisation and its post-processing.

    Parameters
    ----------
    network
        Maps normalised (N, 3, H, W) to ``nuclei_binary_map`` and ``hv_map`` and, if there is more than one
        class, ``nuclei_type_map`` (channel 0 is background).
    mean, std
        Normalisation of RGB scaled to 0..1.
    classifier
        Names the classes from the encoder's tokens, instead of the type map.
    """

    def __init__(
        self,
        network: CellViT | CompactCellViT,
        spec: ModelSpec,
        *,
        mean: Triple,
        std: Triple,
        settings: HoverSettings,
        classifier: LinearClassifier | None = None,
    ) -> None:
        self.spec = spec
        self.vectors = {"hv": (1, 0)}
        self.threshold = settings.threshold if settings.mode == "default" else 0.5
        self._network = network
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)
        self._settings = settings
        self._classifier = classifier

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    @property
    def settings(self) -> HoverSettings:
        """Return how nuclei are cut out of the maps."""
        return self._settings

    def prefix(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the encoder's features: no dropout layer comes before them."""
        pixels = batch.float().div(255).sub(self._mean.to(batch.device)).div(self._std.to(batch.device))
        return self._network.prefix(pixels.contiguous(memory_format=torch.channels_last))

    def suffix(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``nuclei`` (N, 1, H, W), ``hv`` (N, 2, H, W), and what the classes need.

        That is ``types`` (N, K + 1, H, W), probabilities with background first, where the network has a type
        map, and ``tokens`` (N, D, h, w) where a classifier reads them.
        """
        out = self._network.suffix(features)
        maps = {"nuclei": out["nuclei_binary_map"].float().softmax(1)[:, 1:2], "hv": out["hv_map"].float()}
        if self._classifier is not None:
            maps["tokens"] = out["tokens"].float()
        elif "nuclei_type_map" in out:
            maps["types"] = out["nuclei_type_map"].float().softmax(1)
        return maps

    def probabilities(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the type map, or background and nucleus where there is none."""
        if "types" in outputs:
            return outputs["types"]
        return torch.cat([1 - outputs["nuclei"], outputs["nuclei"]], dim=1)

    def foreground(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the probability of a nucleus: the binary map's, which cuts the nuclei out."""
        return outputs["nuclei"][:, 0]

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the nuclei, and the maps of all nuclei and of each class that has one."""
        nuclei, types = outputs["nuclei"], outputs.get("types")
        spacing_um = (self.spec.spacing or (1.0,))[0]
        columns = self.spec.object_columns if types is not None else ()
        objects = objects_from_maps(
            nuclei[0], outputs["hv"], types, tile, spacing_um, self._settings, columns
        )
        if self._classifier is not None:
            objects = self._relabelled(objects, outputs["tokens"], tile)
        channels = [nuclei] if types is None else [nuclei, types[1:]]
        return TileResult(objects, {FIELD: np.concatenate(channels).astype(np.float32, copy=False)})

    def _relabelled(self, objects: ObjectTable, tokens: NDArray[Any], tile: Tile) -> ObjectTable:
        """Return the objects with the classifier's classes, and the probability of each as a column."""
        assert self._classifier is not None
        size = (tile.read.shape[0], tile.read.shape[1])
        start = objects.start - np.array(tile.read.start, np.int32)
        each = self._classifier.classify(cell_tokens(tokens, start, objects.shape, size))
        best = each.argmax(axis=1)
        return replace(
            objects,
            class_id=best.astype(np.int16),
            probability=each[np.arange(len(each)), best].astype(np.float32),
            columns={name: each[:, k] for k, name in enumerate(self.spec.object_columns)},
        )


def default_model() -> CellViTModel:
    """Return the model that ships with wsitk; its card says what it can and cannot do.

    Raises ModelError (WSI313) if the installed weights are not those of the card.
    """
    from safetensors.torch import load

    from wsitk.models.cellvit.compact import LATTICE, MEAN, STD, compact_cellvit

    folder = files("wsitk.models.cellvit")
    card = tomllib.loads((folder / "card.toml").read_text("utf-8"))
    data = (folder / "weights" / "cellvit.safetensors").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card["sha256"]:
        raise ModelError(
            "WSI313", f"the weights of 'cellvit' have sha256 {sha256[:12]}, the card says {card['sha256'][:12]}; "
            "install wsitk again"
        )  # fmt: skip
    network = compact_cellvit()
    network.load_state_dict(load(data), strict=True)
    spec = ModelSpec(
        name=card["name"],
        version=card["version"],
        spacing=(card["spacing_um"],) * 2,
        tile=(1536, 1536),
        halo=(128, 128),
        align=(LATTICE, LATTICE),
        fields=(FieldSpec(FIELD, ("Nuclei",)),),
        objects=True,
        classes=tuple(ObjectClass(c["name"], tuple(c["color"])) for c in card["classes"]),
        weights_sha256=sha256,
        licences=Licences("Apache-2.0", card["licence"], card["data_licence"], True),
    )
    settings = HoverSettings(**card.get("postprocessing", {}))
    return CellViTModel(network.eval(), spec, mean=MEAN, std=STD, settings=settings)


def from_checkpoint(
    path: Path, *, classifier: str | Path | None = None, postprocessing: Mode = "default"
) -> CellViTModel:
    """Return the model in an official checkpoint file, with a token classifier if one is given.

    `postprocessing` ``upstream`` cuts nuclei out as CellViT 1.0.9 does, flaws included. Raises ModelError.
    """
    network, info = load_checkpoint(path)
    chosen: tuple[LinearClassifier, ClassifierInfo] | None = None
    classes, sha256 = info.classes, info.sha256
    if classifier is not None:
        chosen = load_classifier(classifier, info.config.embed_dim)
        classes, sha256 = chosen[1].classes, f"{sha256}+{chosen[1].sha256}"
    maps = () if chosen else tuple(c.name for c in classes)
    align = (info.config.align,) * 2
    spec = ModelSpec(
        name=info.variant,
        version=f"{path.name} {postprocessing}",
        spacing=(info.spacing_um,) * 2,
        spacing_tolerance=0.2,
        tile=(1024, 1024),
        halo=(64, 64),
        align=align,
        border="constant",
        fields=(FieldSpec(FIELD, ("Nuclei", *maps)),),
        objects=True,
        classes=classes,
        object_columns=tuple(f"probability_{c.name}" for c in classes),
        weights_sha256=sha256,
        licences=Licences("Apache-2.0", UPSTREAM_LICENCE, "PanNuke: CC BY-NC-SA 4.0", False),
    )
    settings = HoverSettings(mode=postprocessing)
    return CellViTModel(
        network,
        spec,
        mean=info.mean,
        std=info.std,
        settings=settings,
        classifier=chosen[0] if chosen else None,
    )


def cellvit_256(**options: Any) -> CellViTModel:
    """Return CellViT-256 (40x) from its official file in the weights folder."""
    return _official("CellViT-256-x40-AMP.pth", options)


def cellvit_sam_h(**options: Any) -> CellViTModel:
    """Return CellViT-SAM-H (40x) from its official file in the weights folder."""
    return _official("CellViT-SAM-H-x40-AMP.pth", options)


def _official(name: str, options: dict[str, Any]) -> CellViTModel:
    path = home() / "weights" / name
    if not path.is_file():
        raise ModelError(
            "WSI312",
            f"{name} is not in {path.parent}; download it from {OFFICIAL} and put it there "
            f"(licence: {UPSTREAM_LICENCE})",
        )
    return from_checkpoint(path, **options)
