"""The hippocampus model as the engine sees it: the weights that ship, or a folder of other ones with a card."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from wsitk.card import Card, read_card
from wsitk.errors import ModelError
from wsitk.model import Licences, ModelSpec, ObjectClass
from wsitk.models.hippocampus.network import CLASSES, NORMALISE, narrow_stunet
from wsitk.models.nnunet.volume import VolumeModel, label_field, volume_spec
from wsitk.models.stunet.network import STUNet
from wsitk.torchfile import checked_state, read_tensors

__all__ = ["ARCH", "TILE", "default_model", "from_folder"]

ARCH = "stunet-narrow"
"""What the card's ``[network]`` calls it; ``base`` and ``levels`` give its size."""

TILE = (40, 56, 40)
"""Voxels, (z, y, x): a little more than most crops of a hippocampus, and what the network was trained on."""

MIRROR = (2,)
"""Left and right; front and back or top and bottom of a brain are no mirror images."""


def default_model(mirror: bool = False) -> VolumeModel:
    """Return the model that ships with wsitk; see `from_folder`."""
    return from_folder(Path(str(files("wsitk.models.hippocampus"))), mirror)


def from_folder(path: str | Path, mirror: bool = False) -> VolumeModel:
    """Return the model in the folder `path`, in evaluation mode, float32, on the CPU.

    `mirror` averages each tile with its left-right mirror image, which takes twice as long. Raises ModelError:
    WSI314 (the card), WSI317 (other weights than the card describes, or none), WSI318 (a network that is none of
    these), WSI301 to WSI307 (the weights).
    """
    card = read_card(Path(path) / "card.toml")
    verified = card.verified()
    if not verified:
        why = "are not there" if verified is None else f"don't have sha256 {card.sha256[:12]}"
        raise ModelError("WSI317", f"{card.weights} {why}, as {card.path} says; copy the folder again, whole")
    with torch.device("meta"):
        network = _network(card)
    # they are kept in half precision, and work in single
    network.load_state_dict(checked_state(read_tensors(card.weights), network.state_dict()), assign=True)
    return VolumeModel([network.eval()], _spec(card, mirror), mirror=MIRROR if mirror else ())


def _network(card: Card) -> STUNet:
    """Return the network that the card's ``[network]`` describes, to be filled with weights."""
    wishes = dict(card.content.get("network", {}))
    arch = wishes.pop("arch", None)
    problem = f"network.arch is {arch!r}, wanted {ARCH!r}"
    if arch == ARCH:
        try:
            return narrow_stunet(**wishes)
        except (TypeError, ValueError) as error:
            problem = f"network.arch {arch!r}: {error}"
    raise ModelError("WSI318", f"{card.path}: {problem}; see docs/how-to/model-card.md")


def _spec(card: Card, mirror: bool) -> ModelSpec:
    content = card.content
    return volume_spec(
        card.name,
        f"{card.version} mirrored" if mirror else card.version,
        spacing_um=(float(content["spacing_um"]),) * 3,
        spacing_tolerance=0.05,
        tile=TILE,
        channels=1,
        intensities=(NORMALISE,),
        crop=False,
        labels=label_field(CLASSES, softmax=True),
        classes=tuple(ObjectClass(c["name"], tuple(c["color"])) for c in content["classes"]),
        step=0.5,
        weights_sha256=card.sha256,
        licences=Licences("Apache-2.0", content["licence"], content["data_licence"], True),
    )
