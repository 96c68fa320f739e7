"""pet-ct-annotate as the engine sees it: CT, PET and two distance maps in, a map of lesions out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.card import read_card
from wsitk.errors import ModelError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, TileModel, TileResult
from wsitk.models.pet_ct_annotate.network import PNET_CHANNELS, REACH, RNET_CHANNELS, Pair
from wsitk.torchfile import checked_state, read_tensors
from wsitk.writers.base import sha256_file

__all__ = ["PetCtAnnotate", "from_official", "pet_ct_annotate", "proposals"]

FIELD = "probability"

TILE = (32, 64, 64)
"""What a tile owns (z, y, x)."""

LICENCES = Licences("Apache-2.0", "MIT", "autoPET (TCIA FDG-PET-CT-Lesions): see its terms there")


@final
class PetCtAnnotate(TileModel):
    """Both networks, or P-Net alone where nothing was drawn. Tiled results equal those of the whole volume.

    Tiles are scaled channels (`scribbles.scale`, `scribbles.scribble_distances`), axes (z, y, x), read with
    clipped borders: beyond the volume the networks' own zeros begin, in every layer.
    """

    def __init__(self, pair: Pair, scribbles: bool, weights_sha256: str) -> None:
        channels = len(RNET_CHANNELS) - 1 if scribbles else len(PNET_CHANNELS)
        # R-Net looks REACH far into a proposal that itself looks REACH far
        halo = tuple(n * (2 if scribbles else 1) for n in REACH)
        self._pair = pair
        self._output = "refined" if scribbles else "proposal"
        self.spec = ModelSpec(
            name="pet-ct-annotate" if scribbles else "pet-ct-annotate-proposals",
            version="1.0.0",
            spacing=None,
            tile=tuple(n + 2 * h for n, h in zip(TILE, halo, strict=True)),
            halo=halo,
            align=(1, 1, 1),
            channels=channels,
            dtype="",
            border="clip",
            fields=(FieldSpec(FIELD, ("Lesion",), window="crop", dtype="float32"),),
            weights_sha256=weights_sha256,
            licences=LICENCES,
        )

    @property
    def network(self) -> torch.nn.Module:
        return self._pair

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return ``probability`` (N, 1, z, y, x) of scaled channels (N, 2 or 4, z, y, x)."""
        logits = self._pair(batch.float().permute(0, 1, 4, 3, 2))[self._output]
        return {FIELD: logits.sigmoid().permute(0, 1, 4, 3, 2).contiguous()}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the map; above 0.5 is lesion."""
        return TileResult(None, {FIELD: outputs[FIELD].astype(np.float32, copy=False)})


def pet_ct_annotate() -> PetCtAnnotate:
    """Return the pair with its official weights, for volumes with scribbles (four channels).

    Raises ModelError (WSI313) if the installed weights are not those of the card.
    """
    return _shipped(scribbles=True)


def proposals() -> PetCtAnnotate:
    """Return P-Net with its official weights, for volumes without scribbles (CT and PET)."""
    return _shipped(scribbles=False)


def from_official(folder: str | Path, *, scribbles: bool = True) -> PetCtAnnotate:
    """Return the model from upstream's own ``PNet.pt`` and ``RNet.pt`` in `folder`.

    Raises ModelError as `read_tensors` and `checked_state` do.
    """
    files = [read_tensors(Path(folder) / name) for name in ("PNet.pt", "RNet.pt")]
    pair = Pair()
    states = (checked_state(f, n.state_dict()) for f, n in zip(files, (pair.pnet, pair.rnet), strict=True))
    pair.load_pair(*states)
    return PetCtAnnotate(pair.eval(), scribbles, "+".join(file.sha256 for file in files))


def _shipped(scribbles: bool) -> PetCtAnnotate:
    card = read_card(Path(__file__).with_name("card.toml"))
    if sha256_file(card.weights) != card.sha256:
        raise ModelError("WSI313", f"{card.weights} is not the file of its card; install wsitk again")
    pair = Pair()
    pair.load_state_dict(checked_state(read_tensors(card.weights), pair.state_dict()))
    return PetCtAnnotate(pair.eval(), scribbles, card.sha256)
