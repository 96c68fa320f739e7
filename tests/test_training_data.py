"""Training data: outlines to pixels and back, the layouts that labs have, targets, and what is refused."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat
from writers_data import CLASSES, COLUMNS, rows_of

from wsitk.errors import SourceError, UsageError
from wsitk.models.cellvit.training.annotations import read_annotations
from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Dataset, Example, Joined, Subset
from wsitk.models.cellvit.training.datasets import PanNuke, Patches, Slides, open_dataset, write_patches
from wsitk.models.cellvit.training.masks import read_mask
from wsitk.models.cellvit.training.rasterise import HUNDREDTHS, Lattice, Outlines, paint
from wsitk.models.cellvit.training.targets import hv_target, make_targets
from wsitk.objects import ObjectTable
from wsitk.polygons import rings, to_shapely
from wsitk.testing.synthetic import SyntheticSlide, decode_labels

Array = NDArray[Any]

LABELS = arrays(np.int32, (14, 17), elements=st.integers(0, 4))


def outlines_of(geometries: Array) -> Outlines:
    """Polygons and multipolygons as flat outlines, by shapely alone."""
    points: list[Array] = []
    ring_offset, object_offset = [0], [0]
    for geometry in geometries:
        for part in shapely.get_parts(geometry):
            for ring in shapely.get_rings(part):
                points.append(np.rint(shapely.get_coordinates(ring) * HUNDREDTHS).astype(np.int32))
                ring_offset.append(ring_offset[-1] + len(points[-1]))
        object_offset.append(len(ring_offset) - 1)
    xy = np.concatenate([np.zeros((0, 2), np.int32), *points])
    return Outlines(xy, np.array(ring_offset), np.array(object_offset))


def geojson(features: list[dict[str, Any]]) -> str:
    return json.dumps({"type": "FeatureCollection", "features": features})


def feature(geometry: Any, name: str | None = None, kind: str = "detection", **extra: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind}
    if name is not None:
        properties["classification"] = {"name": name, "color": [1, 2, 3]}
    return {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(geometry),
        "properties": properties,
        **extra,
    }


def nuclei_of(labels: Array, names: Any = lambda number: "Nucleus") -> list[dict[str, Any]]:
    table = ObjectTable.from_labels(labels)
    shapes = to_shapely(rings(table))
    numbers = np.unique(labels[labels > 0])
    return [feature(s, names(int(n))) for s, n in zip(shapes, numbers, strict=True)]


# Outlines to pixels


@settings(max_examples=40)
@given(LABELS)
def test_outlines_of_masks_give_the_masks_back(labels: Array) -> None:
    """Holes, parts that touch at corners, one-pixel objects: what wsitk exports, it learns from unchanged."""
    shapes = to_shapely(rings(ObjectTable.from_labels(labels)))
    numbers = np.unique(labels[labels > 0])
    drawn = np.zeros_like(labels)
    paint(drawn, outlines_of(shapes), numbers, (1.0, 1.0), (0.0, 0.0))
    assert (drawn == labels).all()


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=3, max_size=8, unique=True),
    st.sampled_from([(1.0, 1.0), (2.0, 2.0), (0.37, 1.9)]),
    st.tuples(st.integers(-3, 4), st.integers(-3, 4)),
)
def test_filling_is_by_the_centre_of_each_pixel(
    points: list[tuple[int, int]], scale_xy: tuple[float, float], start_xy: tuple[int, int]
) -> None:
    shape = shapely.Polygon(np.array(points) / HUNDREDTHS)
    if not shape.is_valid:
        return
    drawn = np.zeros((7, 8), np.int32)
    paint(drawn, outlines_of(np.array([shape])), np.array([5]), scale_xy, start_xy)
    y, x = np.mgrid[:7, :8] + 0.5
    centres = shapely.points((x + start_xy[0]) * scale_xy[0], (y + start_xy[1]) * scale_xy[1])
    # a centre on the very outline belongs to either side
    unsure = shapely.distance(shapely.boundary(shape), centres) < 1e-6
    inside = shapely.contains(shape, centres)
    assert ((drawn == 5) == inside)[~unsure].all()


def test_neighbours_share_a_border_but_no_pixel() -> None:
    left, right = shapely.box(0.5, 0, 3.5, 6), shapely.box(3.5, 0, 6.5, 6)
    drawn = np.zeros((2, 6, 8), np.uint8)
    for k, shape in enumerate((left, right)):
        paint(drawn[k], outlines_of(np.array([shape])), np.array([1]), (1, 1), (0, 0))
    assert drawn.sum(0).max() == 1
    assert drawn.sum() == 36


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_the_lattice_finds_what_a_look_at_every_box_finds(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(-300, 300, (count, 2)).astype(np.int32)
    high = low + rng.integers(0, 150, (count, 2)).astype(np.int32)
    lattice = Lattice(low, high, 64)
    for _ in range(5):
        a = rng.integers(-400, 400, 2)
        b = a + rng.integers(0, 200, 2)
        expected = np.flatnonzero(((low <= b) & (high >= a)).all(1))
        assert lattice.query(a, b).tolist() == expected.tolist()


# Examples and sets


def test_example_counts_nuclei_by_most_of_their_pixels() -> None:
    inst = np.array([[1, 1, 1, 2], [0, -1, 3, 2]], np.int32)
    types = np.array([[2, 2, 1, 1], [0, 255, 255, 1]], np.uint8)
    example = Example(np.zeros((2, 4, 3), np.uint8), inst, types, 0.25)
    assert example.count(2).tolist() == [1, 1]
    with pytest.raises(UsageError, match="WSI900"):
        Example(np.zeros((2, 3, 3), np.uint8), inst, types, 0.25)


class Few(Dataset):
    """Three images whose instances are of every class, and of none."""

    def __init__(self, name: str, classes: tuple[str, ...], typed: bool = True) -> None:
        self.name, self.classes, self.typed, self.reads = name, classes, typed, 0

    def __len__(self) -> int:
        return 3

    def read(self, index: int) -> Example:
        self.reads += 1
        inst = np.zeros((4, 8), np.int32)
        inst[0, : len(self.classes) + 1] = np.arange(1, len(self.classes) + 2)
        types = np.zeros((4, 8), np.uint8)
        types[0, : len(self.classes) + 1] = [*range(1, len(self.classes) + 1), IGNORE]
        return Example(np.zeros((4, 8, 3), np.uint8), inst, types if self.typed else None, 0.25)

    @property
    def tissues(self) -> tuple[str, ...]:
        return (self.name,) * 3

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"{self.name}{k}" for k in range(3))

    def identity(self) -> dict[str, Any]:
        return {"few": self.name}


def test_joined_sets_speak_of_the_same_classes() -> None:
    parts = [
        Few("a", ("Tumour", "Immune")),
        Few("b", ("Immune", "Stroma", "Dirt")),
        Few("c", (), typed=False),
    ]
    joined = Joined(parts, classes=("Immune", "Neoplastic", "Stroma"), rename={"Tumour": "Neoplastic"})
    first, second, third = joined.read(0), joined.read(3), joined.read(8)
    assert first.types is not None
    assert second.types is not None
    assert first.types[0, :4].tolist() == [2, 1, IGNORE, 0]
    assert second.types[0, :5].tolist() == [1, 3, IGNORE, IGNORE, 0]
    assert third.types is None
    assert joined.cells().tolist() == [[1, 1, 0]] * 3 + [[1, 0, 1]] * 3 + [[0, 0, 0]] * 3
    assert all((joined.count(i) == joined.read(i).count(3)).all() for i in range(9))
    assert joined.groups[4] == "b1"
    assert Joined(parts).classes == ("Tumour", "Immune", "Stroma", "Dirt")
    with pytest.raises(IndexError):
        joined.read(9)


def test_shares_are_of_sets_whatever_their_size() -> None:
    small, large = Subset(Few("a", ("x",)), [1]), Few("b", ("x",))
    weights = Joined([small, large], shares=(3, 1)).weights
    assert weights[0] / weights[1:].sum() == pytest.approx(3)
    with pytest.raises(UsageError, match="WSI901"):
        Joined([small, large], shares=(1,))


def test_subset_keeps_its_order() -> None:
    part = Subset(Few("a", ("x",)), [2, 0])
    assert part.groups == ("a2", "a0")
    assert part.cells().tolist() == [[1], [1]]


def test_cells_are_counted_once_and_kept_for_these_data_only(tmp_path: Path) -> None:
    few = Few("a", ("x", "y"))
    counted = few.cells(tmp_path / "run")
    assert few.reads == 3
    assert (few.cells(tmp_path / "run") == counted).all()
    assert few.reads == 3
    Few("b", ("x", "y")).cells(tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 2


# Targets


def slow_hv(inst: Array, shift: int) -> Array:
    """HoVer-Net's maps, pixel by pixel; `shift` is the one pixel that its code is off."""
    maps = np.zeros((2, *inst.shape))
    for number in np.unique(inst[inst > 0]):
        places = np.argwhere(inst == number)
        for channel, axis in ((0, 1), (1, 0)):
            centre = int(places[:, axis].mean() + 0.5)
            offsets = places[:, axis] - centre + shift
            for (y, x), offset in zip(places, offsets, strict=True):
                reach = max(offsets) if offset > 0 else -min(offsets)
                maps[channel, y, x] = offset / reach if offset else 0
    return maps


@settings(max_examples=40)
@given(arrays(np.int32, (12, 15), elements=st.integers(-1, 3)))
def test_distances_are_those_of_the_definition(inst: Array) -> None:
    assert hv_target(inst) == pytest.approx(slow_hv(inst, 1))
    assert hv_target(inst, "centred") == pytest.approx(slow_hv(inst, 0))


def test_upstreams_distances_of_a_row_of_five() -> None:
    """Columns 3 to 7: the centre is 5, upstream's code counts from 4; so 1 pixel left of it and 3 right."""
    inst = np.zeros((1, 10), np.int32)
    inst[0, 3:8] = 1
    assert hv_target(inst)[0, 0, 3:8] == pytest.approx([-1, 0, 1 / 3, 2 / 3, 1])
    assert hv_target(inst, "centred")[0, 0, 3:8] == pytest.approx([-1, -0.5, 0, 0.5, 1])


def test_nothing_is_asked_where_nobody_looked() -> None:
    inst = np.array([[0, 1, 1, UNLABELLED]], np.int32)
    types = np.array([[0, 2, IGNORE, 0]], np.uint8)
    image = np.zeros((1, 4, 3), np.uint8)
    targets = make_targets(Example(image, inst, types, 0.25))
    assert targets.nuclei.tolist() == [[0, 1, 1, IGNORE]]
    assert targets.types.tolist() == [[0, 2, IGNORE, IGNORE]]
    assert (targets.hv[:, 0, [0, 3]] == 0).all()
    assert (make_targets(Example(image, inst, None, 0.25)).types == IGNORE).all()


# PanNuke


def make_pannuke(folder: Path, count: int = 4, side: int = 32) -> list[Array]:
    """Three folds as published: float64 arrays, instances numbered in each channel from anywhere."""
    masks = []
    for fold in (1, 2, 3):
        rng = np.random.default_rng(fold)
        mask = np.zeros((count, side, side, 6))
        for image in range(count):
            for channel in range(5):
                for k in range(int(rng.integers(0, 3))):
                    y, x = rng.integers(0, side - 5, 2)
                    mask[image, y : y + 5, x : x + 4, channel] = 10 * channel + 3 * k + 1
        mask[..., 5] = (mask[..., :5].max(-1) == 0).astype(float)
        base = folder / f"Fold {fold}"
        for name, values in (
            ("images", rng.integers(0, 256, (count, side, side, 3)).astype(float)),
            ("masks", mask),
        ):
            (base / name / f"fold{fold}").mkdir(parents=True)
            np.save(base / name / f"fold{fold}" / f"{name}.npy", values)
        np.save(base / "images" / f"fold{fold}" / "types.npy", np.array(["Breast", "Colon"] * (count // 2)))
        masks.append(mask)
    return masks


def test_pannuke_is_read_as_it_is_published(tmp_path: Path) -> None:
    masks = np.concatenate(make_pannuke(tmp_path))
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, PanNuke)
    assert len(dataset) == 12
    assert dataset.classes == ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
    assert dataset.tissues[:2] == ("Breast", "Colon")
    assert sorted(set(dataset.groups)) == ["fold1", "fold2", "fold3"]
    for index in (0, 5, 11):
        example, mask = dataset.read(index), masks[index]
        assert example.types is not None
        assert example.image.dtype == np.uint8
        # the last channel that claims a pixel has it
        expected = np.zeros(mask.shape[:2], int)
        for channel in range(5):
            expected[mask[..., channel] > 0] = channel + 1
        assert (example.types == expected).all()
        assert ((example.inst > 0) == (expected > 0)).all()
        for channel in range(5):
            here = expected == channel + 1
            pairs = np.unique(np.stack([example.inst[here], mask[..., channel][here]]), axis=1)
            assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    expected_cells = [[len(np.unique(m[..., c])) - 1 for c in range(5)] for m in masks]
    assert dataset.cells().tolist() == expected_cells
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy.read(7).image == dataset.read(7).image).all()
    assert len(pickle.dumps(dataset)) < 5000


def test_pannuke_folds_are_chosen_and_missed(tmp_path: Path) -> None:
    make_pannuke(tmp_path)
    assert set(PanNuke(tmp_path, (3, 1)).groups) == {"fold1", "fold3"}
    with pytest.raises(UsageError, match=r"WSI913 .* no fold 4; it has 1, 2, 3"):
        PanNuke(tmp_path, (4,))


def test_pannuke_arrays_that_do_not_belong_together(tmp_path: Path) -> None:
    make_pannuke(tmp_path)
    np.save(next(tmp_path.glob("Fold 2/masks/*/masks.npy")), np.zeros((4, 32, 32, 5)))
    with pytest.raises(SourceError, match="WSI914 fold 2"):
        PanNuke(tmp_path)
    next(tmp_path.glob("Fold 2/masks/*/masks.npy")).write_bytes(b"no array")
    with pytest.raises(SourceError, match=r"WSI914 masks\.npy"):
        PanNuke(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """CellViT's prepared labels are pickles: refused by the layout, before any is opened."""
    (tmp_path / "fold0" / "images").mkdir(parents=True)
    (tmp_path / "fold0" / "labels").mkdir()
    np.save(
        tmp_path / "fold0" / "labels" / "0_0.npy", np.array({"inst_map": 1}, object)
    )  # a dict, as upstream
    with pytest.raises(UsageError, match=r"WSI915 .*pickled.*fold1\.\.3"):
        open_dataset(tmp_path)
    with pytest.raises(SourceError, match=r"WSI918 .*never opened"):
        read_mask(tmp_path / "fold0" / "labels" / "0_0.npy")


# Patches


def make_patches(folder: Path, *, classes: tuple[str, ...] = ("A", "B")) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    inst = np.zeros((20, 24), np.int32)
    inst[2:6, 3:9], inst[10:18, 10:20], inst[12:14, 2:5] = 1, 2, 5
    types = np.array([0, 2, 1, 0, 0, 2], np.uint8)[inst]
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for name in ("npz", "each", "npy", "mat", "tif", "png", "one"):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(
            folder / "images" / f"{name}.png"
        )
    each = np.array([2, 1, 2], np.uint8)
    np.savez(folder / "masks" / "npz.npz", inst=inst.astype(np.uint16), types=types)
    np.savez(folder / "masks" / "each.npz", inst=inst, type=each)
    np.save(folder / "masks" / "npy.npy", np.stack([inst, types], -1).astype(np.float64))
    savemat(folder / "masks" / "mat.mat", {"inst_map": inst.astype(float), "inst_type": each[:, None]})
    import tifffile

    tifffile.imwrite(folder / "masks" / "tif.tif", np.stack([inst, types]).astype(np.uint16))
    Image.fromarray(inst.astype(np.uint16)).save(folder / "masks" / "png.png")
    np.save(folder / "masks" / "one.npy", np.zeros_like(inst))
    lines = f"spacing_um = 0.25\nclasses = {json.dumps(list(classes))}\n"
    (folder / "classes.toml").write_text(lines)
    return inst, types


def test_patches_of_every_kind_say_the_same(tmp_path: Path) -> None:
    inst, types = make_patches(tmp_path)
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, Patches)
    assert dataset.classes == ("A", "B")
    names = list(dataset.groups)
    assert names == sorted(names)
    for name in ("npz", "each", "npy", "mat", "tif"):
        example = dataset.read(names.index(name))
        assert (example.inst == inst).all(), name
        assert example.types is not None
        assert (example.types == types).all(), name
        assert example.spacing_um == 0.25
    assert dataset.read(names.index("png")).types is None
    assert (dataset.read(names.index("png")).inst == inst).all()
    assert dataset.cells()[names.index("each")].tolist() == [1, 2]


def test_samples_say_what_files_cannot(tmp_path: Path) -> None:
    make_patches(tmp_path)
    (tmp_path / "samples.csv").write_text("file,tissue,group,weight,spacing_um\nnpz.png,Colon,p7,2.5,0.5\n")
    dataset = Patches(tmp_path)
    at = dataset.groups.index("p7")
    assert dataset.tissues[at] == "Colon"
    assert dataset.weights[at] == 2.5
    assert dataset.read(at).spacing_um == 0.5
    for text in (
        "file,colour\na.png,red\n",
        "file,weight\na.png,-1\n",
        "file,weight\na.png,x\n",
        "tissue\nColon\n",
    ):
        (tmp_path / "samples.csv").write_text(text)
        with pytest.raises(UsageError, match="WSI912"):
            Patches(tmp_path)


def test_patches_that_lack_something_say_what(tmp_path: Path) -> None:
    make_patches(tmp_path, classes=("A",))
    dataset = Patches(tmp_path)
    with pytest.raises(SourceError, match=r"WSI918 .*type 2; classes\.toml names 1"):
        dataset.read(dataset.groups.index("npz"))
    (tmp_path / "classes.toml").unlink()
    with pytest.raises(UsageError, match=r"WSI916 .*pixel size"):
        Patches(tmp_path)
    assert Patches(tmp_path, spacing_um=0.25).read(0).types is None
    for text in ("classes = 3", "spacing_um = 0.25\nclasses = ['']", "spacing_um = -1", "= ="):
        (tmp_path / "classes.toml").write_text(text)
        with pytest.raises(UsageError, match="WSI916"):
            Patches(tmp_path)


def test_what_is_no_mask_or_picture_is_named(tmp_path: Path) -> None:
    make_patches(tmp_path)
    dataset = Patches(tmp_path)
    wrong: dict[str, Any] = {
        "a": np.full((20, 24), 0.5),
        "b": np.zeros((20, 24, 3), np.int32),
        "c": np.full((20, 24), -3),
    }
    for name, values in wrong.items():
        np.save(tmp_path / f"{name}.npy", values)
        with pytest.raises(SourceError, match=f"WSI918 {name}"):
            read_mask(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "d.npz", inst=np.ones((4, 4), int), type=np.ones(3, int))
    (tmp_path / "e.npz").write_bytes(b"PK no archive")
    (tmp_path / "f.png").write_bytes(b"no picture")
    (tmp_path / "g.mat").write_bytes(b"no matrix")
    (tmp_path / "h.tif").write_bytes(b"no picture")
    for name in ("d.npz", "e.npz", "f.png", "g.mat", "h.tif"):
        with pytest.raises(SourceError, match=f"WSI918 {name}"):
            read_mask(tmp_path / name)
    np.save(tmp_path / "masks" / "npy.npy", np.zeros((5, 5), int))
    with pytest.raises(SourceError, match=r"WSI918 npy\.png"):
        dataset.read(dataset.groups.index("npy"))
    (tmp_path / "images" / "mat.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match=r"WSI910 mat\.png"):
        dataset.read(dataset.groups.index("mat"))


def test_written_patches_are_the_set_that_was_written(tmp_path: Path) -> None:
    make_pannuke(tmp_path / "in", count=2)
    dataset = PanNuke(tmp_path / "in", (1,))
    write_patches(dataset, tmp_path / "out")
    copy = open_dataset(tmp_path / "out")
    assert copy.classes == dataset.classes
    assert (copy.tissues, copy.groups) == (dataset.tissues, dataset.groups)
    assert (copy.cells() == dataset.cells()).all()
    for index in range(len(dataset)):
        one, two = dataset.read(index), copy.read(index)
        assert (one.image == two.image).all()
        assert (one.inst == two.inst).all()
        assert one.types is not None
        assert two.types is not None
        assert (one.types == two.types).all()


# Slides


def write_slide(folder: Path, pixels: Array, features: list[dict[str, Any]], name: str = "a") -> Path:
    """A tiled TIFF of 0.25 µm/px, and what was drawn on it, as QuPath exports it."""
    import tifffile

    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"tile": (64, 64), "resolution": (40_000, 40_000), "resolutionunit": 3}
    tifffile.imwrite(folder / f"{name}.tif", pixels, **options)
    (folder / f"{name}.geojson").write_text(geojson(features))
    return folder


@pytest.fixture(scope="module")
def slide() -> SyntheticSlide:
    return SyntheticSlide.make((300, 420), count=160, radius=(4, 8), seed=4)


def test_a_slide_is_labelled_where_a_region_says_so(tmp_path: Path, slide: SyntheticSlide) -> None:
    region = shapely.Polygon([(20, 30), (350, 10), (380, 250), (40, 280)])
    names = {0: "Tumor", 1: "Immune", 2: None}
    drawn = nuclei_of(slide.labels, lambda n: names[n % 3])
    folder = write_slide(tmp_path, slide.pixels, [feature(region, "Region*", "annotation"), *drawn])
    dataset = Slides(folder, side=128)
    assert dataset.warnings == ()
    assert dataset.classes == ("Immune", "Tumor")
    assert dataset.groups[0] == "a.tif"
    seen = set()
    for index in range(len(dataset)):
        example = dataset.read(index)
        assert example.types is not None
        assert example.spacing_um == pytest.approx(0.25)
        truth = decode_labels(example.image)
        inside = example.inst > 0
        assert (truth[inside] > 0).all()
        for number in np.unique(example.inst[inside]):
            mask = example.inst == number
            (original,) = np.unique(truth[mask])
            assert (truth == original).sum() == mask.sum()
            wanted = {0: 2, 1: 1, 2: IGNORE}[int(original) % 3]
            assert (example.types[mask] == wanted).all()
            seen.add(int(original))
        # background is said only of background
        assert (truth[example.inst == 0] == 0).all()
        assert (dataset.count(index) == example.count(2)).all()
    centres = slide.truth.anchor
    well_inside = shapely.contains(region.buffer(-9), shapely.points(centres[:, 1], centres[:, 0]))
    assert set((np.flatnonzero(well_inside) + 1).tolist()) <= seen
    far = ~shapely.intersects(region.buffer(9), shapely.points(centres[:, 1], centres[:, 0]))
    assert not set((np.flatnonzero(far) + 1).tolist()) & seen


def test_outside_the_region_nothing_is_said(tmp_path: Path, slide: SyntheticSlide) -> None:
    region = shapely.box(100, 100, 164, 164)
    ignored = shapely.box(130, 130, 140, 140)
    features = [
        feature(region, "Training", "annotation"),
        feature(ignored, "Ignore*", "annotation"),
        *nuclei_of(slide.labels),
    ]
    dataset = Slides(write_slide(tmp_path, slide.pixels, features), side=128)
    assert len(dataset) == 1
    inst = dataset.read(0).inst
    assert (inst[:20] == UNLABELLED).all()
    # 64 pixels in the middle of 128, less those of ignored area and of nuclei that lie mostly outside
    assert (inst[62:72, 62:72] == UNLABELLED).all()
    known = inst[32:96, 32:96] != UNLABELLED
    assert 0.8 < known.mean() < 0.98


@pytest.mark.parametrize("spacing_um", [0.25, 0.5])
def test_crops_cover_a_region_at_any_spacing(
    tmp_path: Path, slide: SyntheticSlide, spacing_um: float
) -> None:
    features = [feature(shapely.box(0, 0, 420, 300), "Region*", "annotation"), *nuclei_of(slide.labels)]
    dataset = Slides(write_slide(tmp_path, slide.pixels, features), side=64, spacing_um=spacing_um)
    height, width = (int(n * 0.25 / spacing_um) for n in (300, 420))
    assert len(dataset) == -(-height // 64) * -(-width // 64)
    pixels = sum(int((dataset.read(i).inst >= 0).sum()) for i in range(len(dataset)))
    assert pixels > 0.97 * height * width


def test_without_a_region_the_box_of_the_nuclei_is_taken_with_a_warning(
    tmp_path: Path, slide: SyntheticSlide
) -> None:
    features = [*nuclei_of(slide.labels), feature(shapely.box(0, 0, 420, 300), "Tumor", "annotation")]
    folder = write_slide(tmp_path, slide.pixels, [*features, feature(shapely.Point(3, 4), "Tumor")])
    dataset = Slides(folder, side=128)
    said = "\n".join(dataset.warnings)
    assert "WSI909" in said
    assert "1 drawings wider than 100" in said
    assert "1 points and lines" in said
    assert sum(dataset.cells().ravel()) > 100


def test_qupath_cells_and_older_exports_are_understood(tmp_path: Path) -> None:
    nucleus, body = shapely.box(10, 10, 16, 16), shapely.box(5, 5, 20, 20)
    cell = feature(body, None, "cell", nucleusGeometry=shapely.geometry.mapping(nucleus))
    cell["properties"]["classification"] = {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}
    tile = feature(body, None, "tile")
    with gzip.open(tmp_path / "x.geojson.gz", "wt") as file:
        file.write(json.dumps([cell, tile]))
    found = read_annotations(tmp_path / "x.geojson.gz")
    assert found.names == ("Tumor: Positive",)
    assert len(found.nuclei) == 1
    low, high = found.nuclei.boxes()
    assert (low.tolist(), high.tolist()) == ([[1000, 1000]], [[1600, 1600]])
    assert found.skipped == {"tile": 1}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no json", "WSI19"),
        ('{"type": "FeatureCollection"}', "WSI191"),
        (
            '[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 1]]]}}]',
            "WSI905 a.geojson: feature 0",
        ),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[["a", 1], [0, 0], [1, 1]]]}}]', "WSI905"),
        ("[3]", "WSI905"),
    ],
)
def test_files_that_are_no_geojson_are_named(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(SourceError, match=code):
        read_annotations(tmp_path / "a.geojson")


def test_slides_can_be_pickled_and_cut_once(tmp_path: Path, slide: SyntheticSlide) -> None:
    features = [feature(shapely.box(0, 0, 200, 200), "ROI 1", "annotation"), *nuclei_of(slide.labels)]
    dataset = Slides(write_slide(tmp_path / "in", slide.pixels, features), side=100)
    copy = pickle.loads(pickle.dumps(dataset))
    write_patches(dataset, tmp_path / "out")
    patches = open_dataset(tmp_path / "out")
    assert len(patches) == len(copy) == len(dataset) == 4
    for index in range(len(dataset)):
        one = dataset.read(index)
        for other in (copy.read(index), patches.read(index)):
            assert (one.image == other.image).all()
            assert (one.inst == other.inst).all()
            assert one.types is not None
            assert other.types is not None
            # patches keep no type where nobody looked: there is none to keep
            here = one.inst != UNLABELLED
            assert (one.types[here] == other.types[here]).all()


def test_a_folder_of_nothing_says_what_was_wanted(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="WSI906"):
            open_dataset(folder)
    with pytest.raises(UsageError, match="WSI907"):
        Slides(write_slide(tmp_path, np.full((64, 64, 3), 200, np.uint8), []))


# Real data


def test_our_own_export_of_a_real_slide_trains_us_again(tmp_path: Path, data: Path) -> None:
    """What a run writes for QuPath, beside a real slide of 0.499 µm: the same pixels and classes come back."""
    import wsitk
    from wsitk.geometry import Region
    from wsitk.writers.geojson import write_geojson
    from wsitk.writers.parquet import ObjectWriter

    path = data / "data" / "wsi" / "cmu-1-small-region.svs"
    truth = np.zeros((1000, 1000), np.int32)
    truth[600:856, 700:956] = SyntheticSlide.make((256, 256), count=90, radius=(3, 7), seed=2).labels
    table = ObjectTable.from_labels(truth)
    rows = rows_of(to_shapely(rings(table)))
    (tmp_path / path.name).symlink_to(path)
    with ObjectWriter(tmp_path / "objects.parquet", CLASSES, COLUMNS) as writer:
        writer.write(rows)
    unreadable = [Region((640, 700), (32, 256))]
    exported = tmp_path / f"{path.name}.geojson.gz"
    write_geojson(tmp_path / "objects.parquet", exported, unreadable=unreadable)
    dataset = open_dataset(tmp_path, spacing_um=0.5, side=256)
    assert "WSI909" in dataset.warnings[0]
    (index,) = range(len(dataset))
    example = dataset.read(index)
    y, x = next(iter(dataset._crops))[1]  # type: ignore[attr-defined]  # the box of the nuclei decides where
    here = (slice(y, y + 256), slice(x, x + 256))
    known = example.inst != UNLABELLED
    assert not known[640 - y : 672 - y].any()
    assert ((example.inst > 0) == (truth[here] > 0))[known].all()
    with wsitk.open_source(path) as source:
        assert (example.image == source.read(Region((y, x), (256, 256)))).all()
    pairs = np.unique(np.stack([example.inst[known], truth[here][known]]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    names = np.array([dataset.classes.index(CLASSES[k].name) + 1 for k in rows.class_id])
    inside = known & (example.inst > 0)
    assert example.types is not None
    assert (example.types[inside] == names[truth[here][inside] - 1]).all()


def test_consep_patches_are_read_as_they_come(data: Path, tmp_path: Path) -> None:
    source = data / "data" / "nuclei" / "consep256" / "train"
    folder = tmp_path
    for name, ending in (("images", "jpg"), ("masks", "npz")):
        (folder / name).mkdir()
        for path in sorted(source.glob(f"train_1_*.{ending}")):
            (folder / name / path.name).symlink_to(path)
    (folder / "classes.toml").write_text(
        'spacing_um = 0.25\nclasses = ["misc", "inflammatory", "epithelial", "spindle"]\n'
    )
    dataset = open_dataset(folder)
    assert len(dataset) == 16
    cells = dataset.cells()
    for index, path in enumerate(sorted(source.glob("train_1_*.npz"))):
        stored = np.load(path)
        expected = np.bincount(stored["type"], minlength=5)[1:]
        assert cells[index].tolist() == expected.tolist()
        assert (dataset.read(index).inst == stored["inst"]).all()


def test_the_shipped_models_data_are_prepared_as_patches(data: Path, tmp_path: Path) -> None:
    """CoNSeP's patches become tiles again, with the nuclei that patches cut made whole, and their types."""
    from wsitk.models.cellvit.training.prepare import main

    source = data / "data" / "nuclei"
    (tmp_path / "in").mkdir()
    (tmp_path / "dsb").mkdir()
    stored = sorted((source / "consep256" / "train").glob("train_1_*"))
    for path in stored:
        (tmp_path / "in" / path.name).symlink_to(path)
    for path in sorted((source / "dsb2018" / "he").iterdir())[:6]:
        (tmp_path / "dsb" / path.name).symlink_to(path)
    main(["--consep", str(tmp_path / "in"), "--dsb", str(tmp_path / "dsb"), "--out", str(tmp_path / "out")])
    tile = open_dataset(tmp_path / "out" / "consep")
    assert (len(tile), tile.groups, tile.tissues) == (1, ("consep_01",), ("Colon",))
    example = tile.read(0)
    assert example.inst.shape == (1000, 1000)
    assert example.spacing_um == 0.25
    assert example.types is not None
    assert ((example.types > 0) == (example.inst > 0)).mean() > 0.999
    nuclei, pieces = (
        len(np.unique(example.inst)) - 1,
        sum(len(np.load(p)["type"]) for p in stored if p.suffix == ".npz"),
    )
    # each nucleus on a seam was in two patches, each in the overlap in both
    assert 0.7 * pieces < nuclei < 0.95 * pieces
    assert tile.cells().sum() == nuclei
    untyped = open_dataset(tmp_path / "out" / "dsb")
    assert len(untyped) == 3
    assert untyped.classes == ()
    assert untyped.read(0).types is None
    assert 0.2 <= untyped.read(0).spacing_um <= 0.6
    joined = Joined([tile, untyped], shares=(0.7, 0.3))
    assert joined.read(3).types is None
    assert joined.cells().shape == (4, 4)
