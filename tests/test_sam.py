"""SAM-Med2D against vectors recorded from the original; MobileSAM on things whose outline is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cellvit_golden import one_thread
from incontext_data import keys, keys_of, signal
from radiology_fill import load_filled
from torch.nn import functional as F

import wsitk
from wsitk.errors import ModelError, UsageError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.models.sam.model import CHUNK, SamModel, from_checkpoint, is_ours, load_network, prompt_input
from wsitk.models.sam.network import Sam, SamConfig, best, config_of, decode
from wsitk.models.sam.prompts import Prompts, read_prompts
from wsitk.models.sam.tinyvit import MobileEncoder, WindowBlock
from wsitk.torchfile import read_tensors

MED2D = SamConfig("sam-med2d", 256, 768)


def csv_prompts(folder: Path, *lines: str) -> Prompts:
    path = folder / "prompts.csv"
    path.write_text("x,y,label,x0,y0,x1,y1,prompt,class,plane\n" + "\n".join(lines) + "\n")
    return read_prompts(path)


def tile_at(y: int, x: int, size: int, *, deep: bool = False) -> Tile:
    region = Region((0, y, x), (1, size, size)) if deep else Region((y, x), (size, size))
    return Tile(0, region, region)


# --- SAM-Med2D ---------------------------------------------------------------------------------------


def test_state_dict_is_the_originals() -> None:
    with torch.device("meta"):
        network = Sam(MED2D)
    assert keys_of(network) == keys("sam_med2d")
    assert sum(p.numel() for p in network.parameters()) == 271_241_776
    assert config_of(dict(network.state_dict())) == MED2D


@pytest.mark.parametrize(("width", "name"), [(768, "sam-b"), (1024, "sam-l"), (1280, "sam-h")])
def test_plain_sam_is_told_from_its_names_and_shapes(width: int, name: str) -> None:
    with torch.device("meta"):
        network = Sam(SamConfig("sam", 1024, width))
    config = config_of(dict(network.state_dict()))
    assert config == SamConfig("sam", 1024, width)
    assert config.name == name


@pytest.mark.slow
def test_embedding_masks_and_quality_are_the_originals(data: Path) -> None:
    network = Sam(MED2D)
    load_filled(network)
    image = torch.from_numpy(signal("sam_med2d.image", (1, 3, 256, 256), 4) * np.float32(4.2) - 2)
    with np.load(data / "golden" / "radiology" / "sam_med2d" / "golden.npz") as g, torch.inference_mode():
        golden = {name: g[name] for name in g.files}
        embedding = network(image)["embedding"]

        def same(value: torch.Tensor, wanted: np.ndarray) -> None:
            np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())

        same(embedding.flatten()[golden["emb_idx"]], golden["emb_val"])
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
        for name, prompt in cases.items():
            for several in (0, 1):
                logits, iou = decode(network, embedding, *prompt, several=bool(several))
                same(logits, golden[f"{name}_low_{several}"])
                same(iou, golden[f"{name}_iou_{several}"])
        logits, iou = decode(network, embedding, *cases["ptbox"])
        assert int(iou.argmax()) == int(golden["ptbox_best"][0])
        fine = best(logits, iou)[0]
        for size in ((256, 256), (300, 420)):  # the network's image, then the one that was shrunk to it
            fine = F.interpolate(fine, size, mode="bilinear", align_corners=False)
        same(fine.flatten()[golden["full_idx"]], golden["full_val"])
        # the area may differ by pixels that lie on the line
        assert abs(int((fine > 0).sum()) - int(golden["full_area"])) <= int((fine.abs() < 1e-4).sum())


def test_container_with_an_optimizer_object_is_read_without_it(data: Path) -> None:
    folder = data / "golden" / "radiology" / "containers"
    file = read_tensors(folder / "sam_med2d_optimizer_object.pth")
    assert file.key == "model"
    with np.load(folder / "expected.npz") as wanted:
        assert all(np.array_equal(file.tensors[name], wanted[name]) for name in wanted.files)
    with pytest.raises(ModelError, match=r"WSI301 .*holds no SAM"):
        load_network(file.path)
    assert not is_ours(file)


def test_each_prompt_gets_its_own_best_mask() -> None:
    logits = torch.arange(2 * 3).reshape(2, 3, 1, 1).float()
    chosen, iou = best(logits, torch.tensor([[0.1, 0.9, 0.3], [0.7, 0.2, 0.1]]))
    assert chosen.flatten().tolist() == [1.0, 3.0]
    assert torch.equal(iou, torch.tensor([0.9, 0.7]))


# --- MobileSAM ---------------------------------------------------------------------------------------


def test_windows_are_padded_and_cut_again() -> None:
    torch.manual_seed(0)
    block = WindowBlock(8, 2, 7).eval()
    x = torch.randn(1, 8, 10, 9)
    with torch.inference_mode():
        attended = block._attended(x)
        padded = F.pad(x, (0, 5, 0, 4))
        for y0, x0 in ((0, 0), (7, 0), (0, 7), (7, 7)):  # each window alone, as a list of tokens
            window = padded[0, :, y0 : y0 + 7, x0 : x0 + 7].permute(1, 2, 0).reshape(1, 49, 8)
            wanted = block.attn(window)[0].reshape(7, 7, 8).permute(2, 0, 1)
            got = attended[0, :, y0 : y0 + 7, x0 : x0 + 7]
            torch.testing.assert_close(got, wanted[:, : got.shape[1], : got.shape[2]])


def test_encoder_keeps_its_last_resolution() -> None:
    with torch.device("meta"):
        encoder = MobileEncoder(256)
        assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 14, 14)


@pytest.fixture(scope="module")
def mobile(data: Path) -> Path:
    return data / "data" / "weights" / "mobile_sam" / "mobile_sam.pt"


def scene() -> tuple[np.ndarray, list[np.ndarray]]:
    """Return an RGB image with two disks and a bar, and their masks."""
    y, x = np.ogrid[:1024, :1024]
    shapes = [
        (y - 300) ** 2 + (x - 260) ** 2 < 90**2,
        (y - 640) ** 2 + (x - 700) ** 2 < 60**2,
        (abs(y - 250) < 50) & (abs(x - 750) < 150),
    ]
    image = np.random.default_rng(0).integers(195, 215, (1024, 1024, 3)).astype(np.uint8)
    for mask, colour in zip(shapes, ((90, 40, 120), (40, 90, 60), (150, 60, 60)), strict=True):
        image[mask] = colour
    return image, shapes


def test_official_mobile_sam_outlines_what_prompts_point_at(mobile: Path, tmp_path: Path) -> None:
    image, shapes = scene()
    prompts = csv_prompts(
        tmp_path,
        "260,300,1,,,,,a,Disk,",
        ",,,640,580,760,700,b,Disk,",
        "750,250,1,590,190,910,310,c,Bar,",
        "1500,300,1,,,,,d,Disk,",  # in another tile
    )
    model = from_checkpoint(mobile, prompts=prompts)
    assert (model.spec.name, model.spec.tile, model.spec.halo) == ("mobile-sam", (1024, 1024), (256, 256))
    assert [c.name for c in model.spec.classes] == ["Disk", "Bar"]
    with torch.inference_mode(), one_thread():
        batch = torch.from_numpy(image).permute(2, 0, 1)[None]
        out = {"embedding": model.predict(batch)["embedding"][0].numpy()}
        objects = model.postprocess(out, tile_at(0, 0, 1024)).objects
        assert objects is not None
        # moved with its tile, an object moves too
        moved = SamModel(model._network, model.spec, shifted(prompts, 4096, 2048)).postprocess(
            out, tile_at(2048, 4096, 1024)
        )
    order = np.argsort(objects.columns["prompt"])
    assert objects.columns["prompt"][order].tolist() == [0, 1, 2]
    assert objects.class_id[order].tolist() == [0, 0, 1]
    for k, mask in zip(order, shapes, strict=True):
        got = np.zeros_like(mask)
        got[objects.region(int(k)).slices()] = objects.mask(int(k))
        assert (got & mask).sum() / (got | mask).sum() > 0.95
    assert objects.probability.min() > 0.8
    assert moved.objects is not None
    assert np.array_equal(moved.objects.start, objects.start + np.int32([2048, 4096]))
    assert np.array_equal(moved.objects.bits, objects.bits)


def shifted(prompts: Prompts, x: float, y: float) -> Prompts:
    by = np.array([x, y])
    return replace(prompts, box_xy=prompts.box_xy + np.tile(by, 2), point_xy=prompts.point_xy + by)


def test_answers_do_not_depend_on_the_other_prompts(mobile: Path, tmp_path: Path) -> None:
    network, _ = load_network(mobile)
    torch.manual_seed(0)
    out = {"embedding": torch.randn(256, 64, 64).numpy()}
    lines = [f",,,{20 * k},30,{20 * k + 90},{100 + 5 * k},,," for k in range(CHUNK + 3)]
    model = from_checkpoint(mobile, prompts=csv_prompts(tmp_path, *lines))
    with one_thread():
        every = model.postprocess(out, tile_at(0, 0, 1024)).objects
        alone = SamModel(network, model.spec, csv_prompts(tmp_path, lines[4])).postprocess(
            out, tile_at(0, 0, 1024)
        )
    assert every is not None
    assert alone.objects is not None
    k = int(np.flatnonzero(every.columns["prompt"] == 4)[0])
    assert np.array_equal(every.mask(k), alone.objects.mask(0))
    assert every.probability[k] == alone.objects.probability[0]


def test_prompts_become_the_tiles_pixels_and_masks_its_quarters(tmp_path: Path) -> None:
    prompts = csv_prompts(tmp_path, "110.5,207.5,0,104,200,120,216,a,,", "112.5,209.5,1,,,,,a,,")
    points, boxes, masks = prompt_input(prompts, np.array([0]), tile_at(200, 100, 256), MED2D)
    assert points is not None
    assert points[0].tolist() == [[[10.0, 7.0], [12.0, 9.0]]]
    assert points[1].tolist() == [[0, 1]]
    assert boxes is not None
    assert boxes.tolist() == [[3.5, -0.5, 19.5, 15.5]]
    assert masks is None


def test_slices_and_grey_are_taken(mobile: Path, tmp_path: Path) -> None:
    prompts = csv_prompts(tmp_path, "500,400,1,,,,,,,3")
    model = from_checkpoint(mobile, prompts=prompts, channels=1, slices=True, intensity=(-100, 155))
    assert (model.spec.tile, model.spec.halo) == ((1, 1024, 1024), (0, 256, 256))
    x = torch.tensor([-200.0, -100, 27.5, 155, 900]).view(1, 1, 1, 5)
    torch.testing.assert_close(model._bytes(x).flatten(), torch.tensor([0, 0, 127.5, 255, 255]))
    assert prompts.centred(Region((3, 0, 0), (1, 1024, 1024))).tolist() == [0]
    assert prompts.centred(Region((2, 0, 0), (1, 1024, 1024))).tolist() == []


def test_missing_and_oversized_prompts_are_refused(mobile: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WSI075 .*--prompts"):
        from_checkpoint(mobile)
    with pytest.raises(UsageError, match=r"WSI077 prompt 1 spans 600 px"):
        from_checkpoint(mobile, prompts=csv_prompts(tmp_path, ",,,0,0,600,10,,,"))


def test_runs_through_the_engine(mobile: Path, tmp_path: Path) -> None:
    image, shapes = scene()
    crop = (slice(150, 662), slice(100, 612))  # one tile owns all of it
    prompts = csv_prompts(tmp_path, ",,,62,52,258,248,,Disk,", "400,400,1,,,,,,Ground,")
    model = from_checkpoint(mobile, prompts=prompts)
    with one_thread():
        result = wsitk.run(
            model, image[crop], out=tmp_path / "o", spacing=0.5, tissue="none", preview=False, threads=1
        )
    objects = result.objects.set_index("prompt")
    assert objects.loc[0, "class"] == "Disk"
    assert objects.loc[0, "predicted_iou"] > 0.8
    assert abs(objects.geometry[0].area / shapes[0].sum() - 1) < 0.05
