"""pet-ct-annotate as the engine sees it: CT, PET and two distance maps in, lesions and their probability out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.card import read_card
from wsitk.errors import ModelError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.models.pet_ct_annotate.network import PNET_CHANNELS, REACH, RNET_CHANNELS, Pair
from wsitk.torchfile import checked_state, read_tensors
from wsitk.volumes.nnunet_rules import IntensityRule
from wsitk.writers.base import sha256_file

__all__ = ["Part", "PetCtAnnotate", "from_official", "pet_ct_annotate", "proposals", "refinement"]

Part = Literal["proposals", "refinement", "both"]

FIELD, LABELS = "probability", "lesions"

TILE = (64, 128, 128)
"""What a tile owns (z, y, x); the margin around it is what costs."""

LESION = ObjectClass("Lesion", (255, 0, 0))

INTENSITIES = (
    IntensityRule("ct", shift=-1024.0, scale=5119.0),  # of Hounsfield units
    IntensityRule("ct", shift=0.0, scale=65535.0),  # of raw counts
    *(IntensityRule("none") for _ in RNET_CHANNELS[2:]),
)
"""What becomes of each channel; nothing is clipped."""

LICENCES = Licences("Apache-2.0", "MIT", "autoPET (TCIA FDG-PET-CT-Lesions): see its terms there")


@final
class PetCtAnnotate(TileModel):
    """P-Net, which proposes, R-Net, which refines, or both in one. Tiled results equal those of the whole volume.

    Channels are CT (HU), PET (raw counts), but for proposals the two distances (`scribbles.scribble_distances`),
    and for refinement a proposal, the probability that P-Net gave; axes (z, y, x). Borders are clipped: beyond the
    volume the networks' own zeros begin, in every layer.
    """

    def __init__(self, pair: Pair, part: Part, weights_sha256: str) -> None:
        channels = {"proposals": len(PNET_CHANNELS), "refinement": len(RNET_CHANNELS)}
        # R-Net looks REACH far into a proposal that itself looks REACH far
        halo = tuple(n * (2 if part == "both" else 1) for n in REACH)
        self._pair, self._part = pair, part
        self.spec = ModelSpec(
            name="pet-ct-annotate" if part == "both" else f"pet-ct-annotate-{part}",
            version="1.1.0",
            spacing=None,
            tile=tuple(n + 2 * h for n, h in zip(TILE, halo, strict=True)),
            halo=halo,
            align=(1, 1, 1),
            channels=(count := channels.get(part, len(RNET_CHANNELS) - 1)),
            dtype="",
            border="clip",
            normalise=INTENSITIES[:count],
            fields=(
                FieldSpec(FIELD, (LESION.name,), window="crop", dtype="float32"),
                FieldSpec(
                    LABELS,
                    (LESION.name,),
                    "labels",
                    reduction="argmax",
                    window="crop",
                    regions=(1,),
                    threshold=0.5,
                ),
            ),
            classes=(LESION,),
            weights_sha256=weights_sha256,
            licences=LICENCES,
        )

    @property
    def network(self) -> torch.nn.Module:
        return self._pair

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return ``probability`` (N, 1, z, y, x) of scaled channels (N, 2, 4 or 5, z, y, x)."""
        x = batch.float().permute(0, 1, 4, 3, 2)
        if self._part == "refinement":
            logits = self._pair.rnet(x)
        else:
            logits = self._pair(x)["refined" if self._part == "both" else "proposal"]
        return {FIELD: logits.sigmoid().permute(0, 1, 4, 3, 2).contiguous()}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the map; above 0.5 is lesion."""
        values = outputs[FIELD].astype(np.float32, copy=False)
        return TileResult(None, {FIELD: values, LABELS: values})


def pet_ct_annotate() -> PetCtAnnotate:
    """Return both networks in one, with their official weights, for volumes with scribbles (four channels).

    Raises ModelError (WSI313) if the installed weights are not those of the card.
    """
    return _shipped("both")


def proposals() -> PetCtAnnotate:
    """Return P-Net with its official weights, for volumes without scribbles (CT and PET), or to be refined."""
    return _shipped("proposals")


def refinement() -> PetCtAnnotate:
    """Return R-Net with its official weights, for volumes with scribbles and a proposal (five channels)."""
    return _shipped("refinement")


def from_official(folder: str | Path, *, part: Part = "both") -> PetCtAnnotate:
    """Return the model from upstream's own ``PNet.pt`` and ``RNet.pt`` in `folder`.

    Raises ModelError as `read_tensors` and `checked_state` do.
    """
    files = [read_tensors(Path(folder) / name) for name in ("PNet.pt", "RNet.pt")]
    pair = Pair()
    states = (checked_state(f, n.state_dict()) for f, n in zip(files, (pair.pnet, pair.rnet), strict=True))
    pair.load_pair(*states)
    return PetCtAnnotate(pair.eval(), part, "+".join(file.sha256 for file in files))


def _shipped(part: Part) -> PetCtAnnotate:
    card = read_card(Path(__file__).with_name("card.toml"))
    if sha256_file(card.weights) != card.sha256:
        raise ModelError("WSI313", f"{card.weights} is not the file of its card; install wsitk again")
    pair = Pair()
    pair.load_state_dict(checked_state(read_tensors(card.weights), pair.state_dict()))
    return PetCtAnnotate(pair.eval(), part, card.sha256)
