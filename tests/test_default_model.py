"""The model that ships: is it what its card says, and does a grid leave its nuclei alone?"""

from __future__ import annotations

import tomllib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from PIL import Image
from torch import nn

import wsitk
from wsitk.errors import ModelError
from wsitk.models.cellvit import model as cellvit
from wsitk.models.cellvit.compact import LATTICE, compact_cellvit
from wsitk.writers.base import sha256_file

HOME = Path(cellvit.__file__).parent
GOLDEN = Path(__file__).parent / "golden"


def tissue(side: int) -> np.ndarray:
    """Return real H&E (side, side, 3) at about 0.25 µm: a patch and its mirror images."""
    patch = np.asarray(Image.open(GOLDEN / "he_256.png").convert("RGB"))
    return np.pad(patch, [(0, side - 256), (0, side - 256), (0, 0)], mode="symmetric")


def test_the_weights_are_those_of_the_card_and_small() -> None:
    card = tomllib.loads((HOME / "card.toml").read_text("utf-8"))
    weights = HOME / card["weights"]
    assert sha256_file(weights) == card["sha256"]
    assert weights.stat().st_size == card["size_bytes"] < 25e6
    model = wsitk.load_model("cellvit")
    assert model.spec.weights_sha256 == card["sha256"]
    assert [c.name for c in model.spec.classes] == [c["name"] for c in card["classes"]]
    assert sum(p.numel() for p in model.network.parameters()) == card["parameters"]


def test_the_decoders_have_the_dropout_that_uncertainty_will_need() -> None:
    network = compact_cellvit()
    decoders = [m for name, m in network.named_modules() if "decoder" in name and isinstance(m, nn.Dropout2d)]
    assert decoders
    assert {m.p for m in decoders} == {0.1}


def test_other_weights_than_the_card_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cellvit.tomllib, "loads", lambda text: {"sha256": "0" * 64})
    with pytest.raises(ModelError, match="WSI313"):
        cellvit.default_model()


def test_a_shift_by_the_lattice_shifts_the_maps() -> None:
    """What makes seams invisible: away from the tile's border only the content counts, not its place."""
    model = wsitk.load_model("cellvit")
    image = torch.from_numpy(np.moveaxis(tissue(1280 + LATTICE), -1, 0)[None].copy())
    with torch.inference_mode():
        first = model.predict(image[..., :1280, :1280])["nuclei"]
        second = model.predict(image[..., LATTICE : 1280 + LATTICE, LATTICE : 1280 + LATTICE])["nuclei"]
    inner = first[..., 512:1024, 512:1024] - second[..., 256:768, 256:768]
    assert inner.abs().mean() < 1e-3


def test_three_grids_find_the_same_nuclei_in_a_real_slide(data: Path, tmp_path: Path) -> None:
    model = wsitk.load_model("cellvit")
    slide = data / "data" / "wsi" / "cmu-1-small-region.svs"
    found = []
    for tile, halo in ((1024, 128), (1280, 128), (1024, 256)):
        out = tmp_path / f"{tile}-{halo}"
        plain = {"maps": False, "geojson": False, "preview": False, "roi": (600, 1000, 600, 600)}
        found.append(wsitk.run(model, slide, out=out, tile=tile, halo=halo, **plain).objects)
    for a, b in combinations(found, 2):
        assert abs(len(a) - len(b)) <= 0.01 * max(len(a), len(b))
        assert min(_matched(a, b) / len(a), _matched(a, b) / len(b)) >= 0.985


def _matched(left: object, right: object) -> int:
    """Return the number of pairs with IoU > 0.8; above a half, partners are unique."""
    a, b = left.geometry.to_numpy(), right.geometry.to_numpy()  # type: ignore[attr-defined]
    i, j = shapely.STRtree(b).query(a, predicate="intersects")
    shared = shapely.area(shapely.intersection(a[i], b[j]))
    return int((shared / (shapely.area(a[i]) + shapely.area(b[j]) - shared) > 0.8).sum())
