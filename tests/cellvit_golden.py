"""What the CellViT tests share: keyed weights, the test image, and the vectors recorded from the original."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from golden import detfill
from PIL import Image

from wsitk.models.cellvit.config import VARIANTS, CellViTConfig
from wsitk.models.cellvit.network import CellViT, empty_network

GOLDEN = Path(__file__).parent / "golden"
TINY_VIT = CellViTConfig("dino", 96, 4, 3, (1, 2, 3, 4))
TINY_SAM = CellViTConfig("sam", 96, 4, 3, (1, 2, 3, 4), global_blocks=(1, 3))
CONFIGS = {
    "tiny_vit": TINY_VIT,
    "tiny_vit_reg": replace(TINY_VIT, regression=True),
    "tiny_sam": TINY_SAM,
    "tiny_sam512": replace(TINY_SAM, embed_dim=512, num_heads=4),
    "cellvit256": VARIANTS["CellViT-256"],
    "sam_b": VARIANTS["CellViT-SAM-B"],
    "sam_l": VARIANTS["CellViT-SAM-L"],
    "sam_h": VARIANTS["CellViT-SAM-H"],
    "uni": VARIANTS["CellViT-UNI"],
    "virchow": VARIANTS["CellViT-Virchow"],
    "virchow2": VARIANTS["CellViT-Virchow2"],
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices: threads that wait for a busy core cost far more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def manifest(name: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Return (name, shape, dtype) of each entry of the original's state dict."""
    entries = json.loads((GOLDEN / "cellvit" / "state_dict_keys" / f"{name}.json").read_text())
    return [(entry, tuple(shape), dtype) for entry, shape, dtype in entries]


def filled_state(name: str) -> dict[str, torch.Tensor]:
    """Return the state dict whose every value is a function of its name."""
    return {
        entry: torch.zeros(shape, dtype=torch.int64)
        if dtype == "int64"
        else torch.from_numpy(detfill.fill(entry, shape))
        for entry, shape, dtype in manifest(name)
    }


def filled(name: str) -> CellViT:
    network = empty_network(CONFIGS[name])
    network.load_state_dict(filled_state(name), strict=True, assign=True)
    return network.eval()


quick = lru_cache(maxsize=1)(filled)
"""For the models that several cases share, in order; the large ones are not kept."""


def he_input(h: int, w: int) -> torch.Tensor:
    with Image.open(GOLDEN / "he_256.png") as image:
        pixels = detfill.he_image(np.asarray(image.convert("RGB")), h, w)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)


def statistics(value: torch.Tensor) -> np.ndarray:
    x = value.numpy().astype(np.float64)
    return np.array([x.mean(), x.std(), x.min(), x.max(), abs(x).mean()])


def deviations(out: dict[str, torch.Tensor], name: str, h: int, w: int) -> dict[str, float]:
    """Return each output's largest difference from the recorded one; statistics cover every pixel."""
    worst = {}
    with np.load(GOLDEN / "cellvit" / f"model_{name}_{h}x{w}.npz") as golden:
        recorded = {key for key in golden.files if key != "hw" and not key.endswith(("_sub", "_stats"))}
        assert set(out) == recorded
        for key, value in out.items():
            full = value.numpy()
            if f"{key}_sub" not in golden:
                worst[key] = float(abs(full - golden[key]).max())
                continue
            c, s, _ = golden[f"{key}_sub"]
            worst[key] = float(abs(full[:, ::c, ::s, ::s] - golden[key]).max())
            worst[f"{key} statistics"] = float(abs(statistics(value) - golden[f"{key}_stats"]).max())
    return worst


def check_against_golden(network: CellViT, name: str, h: int, w: int) -> None:
    with torch.inference_mode(), one_thread():
        out = network(he_input(h, w))
    worst = deviations(out, name, h, w)
    assert max(worst.values()) < (1e-5 if name.startswith("tiny") else 1e-4), worst


def check_against_statistics(network: CellViT, name: str, h: int, w: int) -> None:
    """Compare mean, deviation, extremes and mean magnitude of every map with the recorded ones (5 digits)."""
    report = json.loads((GOLDEN / "cellvit" / "models_report.json").read_text())
    recorded = report[name]["sizes"][f"{h}x{w}"]["stats(mean,std,min,max,absmean)"]
    with torch.inference_mode(), one_thread():
        out = network(he_input(h, w))
    got = {key: statistics(out[key]) for key in recorded}
    for key, wanted in recorded.items():
        np.testing.assert_allclose(got[key], wanted, atol=1e-4, rtol=0, err_msg=key)
