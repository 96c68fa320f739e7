"""Which model a checkpoint or a folder is of: told by what lies in it, never by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsitk.errors import ModelError
from wsitk.model import Model
from wsitk.torchfile import TensorFile, read_tensors

__all__ = ["checkpoint_reader", "folder_reader"]

Reader = Callable[..., Model]

CHECKPOINTS = (
    ("wsitk.models.cellvit.checkpoint", "wsitk.models.cellvit.model"),
    ("wsitk.models.stunet.model", "wsitk.models.stunet.model"),
    ("wsitk.models.universeg.model", "wsitk.models.universeg.model"),
    ("wsitk.models.tyche.model", "wsitk.models.tyche.model"),
    ("wsitk.models.cxas.model", "wsitk.models.cxas.model"),
    ("wsitk.models.mirror_unet.model", "wsitk.models.mirror_unet.model"),
    ("wsitk.models.artifusion.model", "wsitk.models.artifusion.model"),
    ("wsitk.models.sam.model", "wsitk.models.sam.model"),
)
"""Modules whose `is_ours` knows a file of weights, and those whose `from_checkpoint` makes the model of it."""

ARCHITECTURES = {
    "artifusion": "wsitk.models.artifusion.model:from_folder",
    "liverstage-unet": "wsitk.models.liverstage.model:from_folder",
    "stunet-narrow": "wsitk.models.hippocampus.model:from_folder",
}
"""What ``network.arch`` of a card says, where CellViT is not meant."""

CARDS = "wsitk.models.cellvit.folder:from_folder"
NNUNET = "wsitk.models.nnunet.folder:from_folder"
BUNDLE = "wsitk.models.monai_bundle.model:from_bundle"


def checkpoint_reader(path: Path) -> Reader:
    """Return the function that makes a model of the file `path`, which it takes as its first argument.

    Raises ModelError: WSI300 if the weights are of no model that is known here, and as `read_tensors` does.
    """
    file = read_tensors(path)
    for recogniser, reader in CHECKPOINTS:
        is_ours: Callable[[TensorFile], bool] = importlib.import_module(recogniser).is_ours
        if is_ours(file):
            return _function(f"{reader}:from_checkpoint")
    known = ", ".join(reader.split(".")[2] for _, reader in CHECKPOINTS)
    first = next(iter(file.tensors), "")
    raise ModelError(
        "WSI300",
        f"{path.name} holds {len(file.tensors)} tensors, the first called {first!r}, which are of no model that is "
        f"read from a file ({known}); check what it is, or pass module:function of your own",
    )


def folder_reader(path: Path) -> Reader:
    """Return the function that makes a model of the folder `path`, which it takes as its first argument.

    Raises ModelError (WSI300) if the folder is of no kind that is known here, WSI314 for a damaged card.
    """
    if (path / "card.toml").is_file():
        from wsitk.card import read_card

        network: dict[str, Any] = read_card(path / "card.toml").content.get("network", {})
        return _function(ARCHITECTURES.get(str(network.get("arch")), CARDS))
    if (path / "configs" / "metadata.json").is_file():
        return _function(BUNDLE)
    if (path / "plans.json").is_file() or (path / "dataset.json").is_file():
        return _function(NNUNET)
    raise ModelError(
        "WSI300",
        f"{path.name} is no folder of a model; wanted card.toml with weights, plans.json and dataset.json of "
        "nnU-Net 2, or a MONAI bundle's configs/metadata.json",
    )


def _function(target: str) -> Reader:
    module, _, name = target.partition(":")
    reader: Reader = getattr(importlib.import_module(module), name)
    return reader
