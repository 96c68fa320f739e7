"""Which model a file or a folder is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from wsitk.errors import ModelError
from wsitk.models.cxas.network import CXAS
from wsitk.models.mirror_unet.network import MirrorConfig, MirrorUNet
from wsitk.models.readers import checkpoint_reader, folder_reader
from wsitk.models.stunet.network import STUNet
from wsitk.models.tyche.network import Tyche
from wsitk.models.universeg.network import UniverSeg

MODELS = Path(__file__).parents[1] / "models"


def _stunet() -> nn.Module:
    from wsitk.models.stunet.network import SIZES

    return STUNet(SIZES["small"])


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("universeg", UniverSeg),
        ("tyche", Tyche),
        ("cxas", CXAS),
        ("mirror_unet", lambda: MirrorUNet(MirrorConfig())),
        ("stunet", _stunet),
    ],
)
def test_a_checkpoint_is_known_by_its_tensors(
    module: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.save({"state_dict": make().state_dict()}, tmp_path / "any name.bin")
    reader = checkpoint_reader(tmp_path / "any name.bin")
    assert reader.__module__ == f"wsitk.models.{module}.model"


def test_weights_of_nothing_known_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.ones(2, 3)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"WSI300 w\.pt holds 1 tensors, the first called 'conv\.weight'"):
        checkpoint_reader(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("folder", "module"),
    [
        ("cellvit", "cellvit.folder"),
        ("hippocampus", "hippocampus.model"),
        ("liverstage", "liverstage.model"),
        ("artifusion", "artifusion.model"),
    ],
)
def test_a_folder_with_a_card_is_known_by_its_network(folder: str, module: str) -> None:
    assert folder_reader(MODELS / folder).__module__ == f"wsitk.models.{module}"


def test_other_folders_are_known_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    with pytest.raises(ModelError, match=r"WSI300 .* is no folder of a model"):
        folder_reader(tmp_path)
    (tmp_path / "plans.json").write_text(json.dumps({}))
    assert folder_reader(tmp_path).__module__ == "wsitk.models.nnunet.folder"
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps({}))
    assert folder_reader(tmp_path).__module__ == "wsitk.models.monai_bundle.model"
