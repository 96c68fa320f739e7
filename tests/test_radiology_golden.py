"""Recorded vectors that no test of a model reproduces, and which test reproduces each of the others.

Weights and inputs are keyed by names; of those inputs that weren't recorded, the names were found by trying.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from incontext_data import signal
from radiology_fill import fill, load_filled

from wsitk.models.mirror_unet.network import MirrorConfig, MirrorUNet
from wsitk.models.sam.network import Sam, SamConfig
from wsitk.models.stunet.network import STUNet, STUNetConfig
from wsitk.models.stunet.plans import read_plan
from wsitk.volumes.guidance.geodesic import geodesic_distance
from wsitk.volumes.guidance.maps import Guidance, guidance_map
from wsitk.volumes.nnunet_rules import gaussian

REPRODUCED = {
    "containers/*.pt": "test_torchfile.py",
    "containers/*.pth": "test_torchfile.py",
    "containers/nnunet_v1.model": "test_torchfile.py",
    "containers/expected.npz": "test_torchfile.py",
    "containers/results.json": "",  # what torch says of them
    "cxas/golden.npz": "test_cxas.py",
    "cxas/features.json": "test_cxas.py",
    "cxas/paxray_labels.json": "test_cxas.py",
    "cxas/keys.txt": "test_cxas.py",
    "geodesic_guidance/golden.npz": "test_guidance.py",
    "geodesic_guidance/geodistk.npz": "test_guidance.py",
    "mirror_unet/golden.npz": "test_mirror_unet.py",
    "mirror_unet/keys_*.txt": "test_mirror_unet.py",
    "nnunet_v1/golden.npz": "test_nnunet_rules.py",
    "pet_ct_annotate/golden*.npz": "test_pet_ct.py",
    "pet_ct_annotate/keys_*.txt": "test_pet_ct.py",
    "pet_ct_annotate/weights/*": "test_pet_ct.py",
    "sam_med2d/golden.npz": "test_sam.py",
    "sam_med2d/keys.txt": "test_sam.py",
    "stunet/golden.npz": "test_stunet.py",
    "stunet/keys_*.txt": "test_stunet.py",
    "stunet/label_orders.json": "test_stunet.py",
    "stunet/plan_files/*": "test_stunet.py",
    "tyche/golden.npz": "test_tyche.py",
    "tyche/keys.txt": "test_tyche.py",
    "universeg/golden.npz": "test_universeg.py",
    "universeg/keys.txt": "test_universeg.py",
}
"""Files of the vectors -> the test that reproduces what is in them, but for what is done below."""


@pytest.fixture(scope="module")
def vectors(data: Path) -> Path:
    return data / "golden" / "radiology"


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def stats(values: Any) -> list[float]:
    wide = np.asarray(values, np.float64)
    return [wide.mean(), wide.std(), wide.min(), wide.max(), np.abs(wide).sum()]


def test_every_file_has_a_test(vectors: Path) -> None:
    files = {p for p in vectors.rglob("*") if p.is_file() and p.name not in ("README.md", "fill.py")}
    for pattern, test in REPRODUCED.items():
        found = {*vectors.glob(pattern)}
        assert found, f"{pattern} names nothing"
        files -= found
        assert not test or (Path(__file__).parent / test).is_file()
    assert not files, f"nothing reproduces {sorted(files)}"


def test_the_window_of_a_flat_patch(vectors: Path) -> None:
    golden = arrays(vectors / "nnunet_v1" / "golden.npz")
    np.testing.assert_allclose(gaussian((32, 32, 64))[::2, ::2, ::2], golden["gaussian_32_32_64"], atol=1e-6)


def test_plans_of_every_size(vectors: Path) -> None:
    folder = vectors / "stunet" / "plan_files"
    plans = {s: read_plan(folder / f"{s}_ep4k.model.pkl") for s in ("small", "base", "large", "huge")}
    assert {s: p.trainer for s, p in plans.items()} == {s: f"STUNetTrainer_{s}" for s in plans}
    assert len({repr(replace(p, trainer="")) for p in plans.values()}) == 1


@pytest.mark.parametrize(
    ("name", "suffix", "spacing"),
    [("fastmarch_l1_s3", "", (2, 2, 3)), ("fastmarch2d_l1", "2d", (1, 1))],
)
def test_fast_marching(vectors: Path, name: str, suffix: str, spacing: tuple[float, ...]) -> None:
    golden = arrays(vectors / "geodesic_guidance" / "geodistk.npz")
    found = geodesic_distance(
        golden[f"image{suffix}"], golden[f"seed{suffix}"], spacing, weight=1.0, cost="marching"
    )
    np.testing.assert_allclose(found, golden[name], atol=1e-6)


def test_adaptive_heatmaps_of_clicks_inside(vectors: Path) -> None:
    """Of the second dataset: upstream finds nothing to widen a click by; test_guidance has the first."""
    golden = arrays(vectors / "geodesic_guidance" / "golden.npz")
    name, image = "adaptive_s5_th10_msd_spleen", golden["gtg_image"][0]
    clicks = golden["gtg_clicks"][:, 1:]
    found = guidance_map(clicks, image, (0.79, 0.79, 5.0), Guidance("gaussian", 0))
    np.testing.assert_allclose(found.ravel()[golden[f"{name}_idx"]], golden[f"{name}_val"], atol=1e-4)


@pytest.mark.slow
def test_a_network_with_a_classifier(vectors: Path) -> None:
    golden = arrays(vectors / "mirror_unet" / "golden.npz")
    shape = (1, 1, 96, 96, 96)
    x = np.concatenate((signal("mirror.ct96", shape, 2), 2 * signal("mirror.pet96", shape, 2)), 1)
    network = MirrorUNet(MirrorConfig("fission_classification"))
    load_filled(network)
    with torch.inference_mode():
        found = network(torch.from_numpy(x))
    assert list(found["output"].shape) == golden["fission_classification_shape"].tolist()
    close(
        found["output"].numpy().ravel()[golden["fission_classification_idx"]],
        golden["fission_classification_val"],
    )
    close(found["lesion"].item(), golden["cls"])


@pytest.mark.slow
def test_inside_the_adapted_encoder(vectors: Path) -> None:
    """What leaves it is in test_sam; of ``adapter0_of_block2`` no place in the encoder is known."""
    golden = arrays(vectors / "sam_med2d" / "golden.npz")
    with torch.device("meta"):
        encoder = Sam(SamConfig("sam-med2d", 256, 768)).image_encoder
    encoder = encoder.to_empty(device="cpu").eval()
    state = encoder.state_dict()
    encoder.load_state_dict(
        {k: torch.from_numpy(fill(f"image_encoder.{k}", tuple(v.shape))) for k, v in state.items()}
    )
    seen = []

    def compare(name: str, found: torch.Tensor) -> None:
        close(found.numpy().ravel()[golden[f"{name}_idx"]], golden[f"{name}_val"])
        seen.append(name)

    for name, block in zip(("block0", "block1", "block2"), encoder.blocks, strict=False):
        block.register_forward_hook(lambda _, __, found, name=name: compare(name, found))
    with torch.inference_mode():
        encoder(torch.from_numpy(signal("sam_med2d.image", (1, 3, 256, 256), 4) * np.float32(4.2) - 2))
    assert seen == ["block0", "block1", "block2"]


def test_prompts_become_tokens(vectors: Path) -> None:
    golden = arrays(vectors / "sam_med2d" / "golden.npz")
    with torch.device("meta"):
        prompts = Sam(SamConfig("sam-med2d", 256, 768)).prompt_encoder
    prompts = prompts.to_empty(device="cpu")
    state = prompts.state_dict()
    filled = {k: torch.from_numpy(fill(f"prompt_encoder.{k}", tuple(v.shape))) for k, v in state.items()}
    prompts.load_state_dict(filled)
    points = (torch.from_numpy(golden["points"]), torch.from_numpy(golden["point_labels"]))
    box, mask = torch.from_numpy(golden["box"])[:, 0], torch.from_numpy(golden["mask_input"])
    cases = {
        "pt": (points, None, None),
        "box": (None, box, None),
        "ptbox": (points, box, None),
        "mask": (None, None, mask),
        "ptmask": (points, None, mask),
        "none": (None, None, None),
    }
    with torch.inference_mode():
        close(prompts.get_dense_pe().numpy().ravel()[golden["pe_idx"]], golden["pe_val"])
        for name, prompt in cases.items():
            tokens = prompts(*prompt)[0].numpy()
            assert tokens.shape == golden[f"{name}_sparse"].shape
            if tokens.size:
                close(tokens, golden[f"{name}_sparse"])


def test_statistics_of_whole_outputs(vectors: Path) -> None:
    """Where only samples were kept, these say that the rest is right, too."""
    golden = arrays(vectors / "stunet" / "golden.npz")
    network = STUNet(STUNetConfig(16))
    load_filled(network)
    with torch.inference_mode():
        logits = network(torch.from_numpy(golden["x"]))["logits"].numpy()
    np.testing.assert_allclose(stats(logits), golden["stats"], rtol=1e-3, atol=1e-5)


def test_statistics_of_guidance_maps(vectors: Path) -> None:
    golden = arrays(vectors / "geodesic_guidance" / "golden.npz")
    image, clicks = golden["gtg_image"][0], golden["gtg_clicks"][:, 1:]
    spacings = {"autopet": (2.03642, 2.03642, 3.0), "msd": (0.79, 0.79, 5.0)}
    rules = {f"heatmap_s{s}": ("autopet", Guidance("gaussian", s)) for s in (0, 1, 3, 5)}
    for data in spacings:
        rules |= {
            f"edt_s1_th10_{data}": (data, Guidance("edt", 1)),
            f"gdt_s5_th10_{data}": (data, Guidance("geodesic", 5)),
            f"expgeos_s5_{data}": (data, Guidance("exponential", 5)),
        }
    for name, (data, guidance) in rules.items():
        found = guidance_map(clicks, image, spacings[data], guidance)
        np.testing.assert_allclose(stats(found), golden[f"{name}_stats"], rtol=1e-3, atol=1e-5, err_msg=name)
