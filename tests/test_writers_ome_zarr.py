"""maps.ome.zarr: valid NGFF 0.5, exact pyramids against a naive reference, checksums that find bit rot."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.writers import ome_zarr
from wsitk.writers.base import tree_files, tree_sha256
from wsitk.writers.ome_zarr import MapChannel, plan_levels, shrink, write_maps

RED, BLUE = MapChannel("tumour", (255, 0, 0)), MapChannel("density", (0, 0, 255), (0.0, 40.0))


def reader(array):
    return lambda region: array[(Ellipsis, *region.slices())]


def write(path, array, channels=(RED, BLUE), **options):
    axes = array.ndim - bool(channels)
    spacing = options.pop("spacing_um", (0.5,) * axes)
    translation = options.pop("translation_um", (0.0,) * axes)
    kind = "image" if channels else "labels"
    shape = array.shape[-axes:]
    return write_maps(
        path, shape, array.dtype, channels, spacing, translation, reader(array), kind=kind, **options
    )


def noise(*shape, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, shape)
    return (values / 7).astype(dtype) if np.issubdtype(dtype, np.floating) else values.astype(dtype)


def validate(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about its own future
        from ome_zarr_models import open_ome_zarr
    return open_ome_zarr(zarr.open_group(str(path), mode="r"))


@pytest.fixture
def small_shards(monkeypatch):
    """Shrink chunks and shards, so that small images have many of both."""
    monkeypatch.setattr(ome_zarr, "_CHUNK", {2: 8, 3: 4})
    monkeypatch.setattr(ome_zarr, "_SHARD", {2: 32, 3: 8})
    monkeypatch.setattr(ome_zarr, "_SMALLEST", 16)


def naive_shrink(array, steps, kind):
    """Shrink one output pixel at a time."""
    axes = len(steps)
    lead = array.shape[: array.ndim - axes]
    shape = tuple(-(-n // f) for n, f in zip(array.shape[-axes:], steps, strict=True))
    out = np.zeros((*lead, *shape), array.dtype)
    for head in np.ndindex(*lead):
        for at in np.ndindex(*shape):
            box = tuple(slice(a * f, (a + 1) * f) for a, f in zip(at, steps, strict=True))
            values = array[head][box].ravel()
            if kind == "labels":
                # the last line counts twice where it has no partner
                full = np.pad(
                    array[head][box],
                    [(0, f - n) for f, n in zip(steps, array[head][box].shape, strict=True)],
                    "edge",
                )
                names, first, counts = np.unique(full, return_index=True, return_counts=True)
                out[head][at] = names[np.lexsort((first, -counts))[0]]
            elif np.issubdtype(array.dtype, np.integer):
                out[head][at] = int(np.floor(values.astype(float).mean() + 0.5))
            else:
                out[head][at] = values.astype(np.float64).mean()
    return out


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    steps=st.tuples(*[st.integers(1, 2)] * 3),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.float32]),
    kind=st.sampled_from(["image", "labels"]),
    seed=st.integers(0, 99),
)
def test_shrink_equals_the_naive_reference(shape, steps, dtype, kind, seed):
    array = noise(2, *shape, dtype=dtype, seed=seed)
    if kind == "labels":
        array = (array % 4).astype(dtype)
    steps = steps[: len(shape)]
    got = shrink(array, steps, kind)
    assert got.dtype == array.dtype
    np.testing.assert_allclose(got, naive_shrink(array, steps, kind), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((70, 45), (0.5, 0.5)), ((33, 100), (0.5, 0.5)), ((5, 3), (1.0, 1.0)), ((1, 40), (1.0, 2.0))],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_levels_equal_whole_array_shrinking(tmp_path, small_shards, shape, spacing, dtype):
    array = noise(2, *shape, dtype=dtype)
    levels = write(tmp_path / "m.ome.zarr", array, spacing_um=spacing)
    group = zarr.open_group(str(tmp_path / "m.ome.zarr"), mode="r")
    assert sorted(group.array_keys()) == [str(k) for k in range(len(levels))]
    wanted = array
    for index, level in enumerate(levels):
        if index:
            steps = tuple(-(-a // b) for a, b in zip(levels[index - 1].shape, level.shape, strict=True))
            wanted = shrink(wanted, steps)
        np.testing.assert_array_equal(group[str(index)][:], wanted)
    assert max(levels[-1].shape) <= 16


@pytest.mark.parametrize("channels", [(RED, BLUE), ()])
def test_volumes_and_labels(tmp_path, small_shards, channels):
    array = noise(*([2] if channels else []), 9, 30, 41, dtype=np.uint16) % 5
    levels = write(tmp_path / "v.ome.zarr", array, channels, spacing_um=(3.0, 1.0, 1.0))
    assert [level.shape for level in levels] == [(9, 30, 41), (9, 15, 21), (5, 8, 11)]
    assert levels[2].spacing_um == (6.0, 4.0, 4.0)
    group = zarr.open_group(str(tmp_path / "v.ome.zarr"), mode="r")
    kind = "image" if channels else "labels"
    np.testing.assert_array_equal(group["1"][:], shrink(array, (1, 2, 2), kind))
    np.testing.assert_array_equal(group["2"][:], shrink(shrink(array, (1, 2, 2), kind), (2, 2, 2), kind))
    validate(tmp_path / "v.ome.zarr")


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 100_000), min_size=2, max_size=3),
    spacing=st.tuples(*[st.floats(0.1, 10)] * 3),
)
def test_all_levels_cover_the_same_ground(shape, spacing):
    spacing = spacing[: len(shape)]
    levels = plan_levels(tuple(shape), spacing, (0.0,) * len(shape))
    assert max(levels[-1].shape) <= 512
    for finer, coarser in pairwise(levels):
        assert max(finer.shape) > 512
        for axis in range(len(shape)):
            low = [v.translation_um[axis] - v.spacing_um[axis] / 2 for v in (finer, coarser)]
            high = [
                a + v.shape[axis] * v.spacing_um[axis] for a, v in zip(low, (finer, coarser), strict=True)
            ]
            assert low[1] == pytest.approx(low[0], abs=1e-6)
            assert -1e-6 <= high[1] - high[0] <= finer.spacing_um[axis] + 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (100, 37), (513, 600)])
def test_metadata_are_ngff(tmp_path, shape):
    write(tmp_path / "m.ome.zarr", noise(2, *shape), translation_um=(1.5, 2.5), notes={"model": "m"})
    image = validate(tmp_path / "m.ome.zarr")
    assert type(image).__module__ == "ome_zarr_models.v05.image"
    group = zarr.open_group(str(tmp_path / "m.ome.zarr"), mode="r")
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    scale = ome["multiscales"][0]
    assert [a["name"] for a in scale["axes"]] == ["c", "y", "x"]
    assert [a.get("unit") for a in scale["axes"]] == [None, "micrometer", "micrometer"]
    assert scale["datasets"][0]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 0.5, 0.5]},
        {"type": "translation", "translation": [0.0, 1.5, 2.5]},
    ]
    assert ome["omero"]["channels"][1] == {
        "label": "density",
        "color": "0000FF",
        "active": True,
        "window": {"min": 0.0, "max": 40.0, "start": 0.0, "end": 40.0},
    }
    assert group.attrs["wsitk"] == {"model": "m"}
    finest = group["0"]
    assert finest.metadata.dimension_names == ("c", "y", "x")
    assert finest.shards[0] == 2
    assert finest.chunks[0] == 1
    names = [codec.to_dict()["name"] for codec in finest.metadata.codecs[0].codecs]
    assert names == ["bytes", "zstd", "crc32c"]


def test_labels_are_image_labels(tmp_path):
    write(tmp_path / "l.ome.zarr", noise(60, 40, dtype=np.int32), ())
    assert type(validate(tmp_path / "l.ome.zarr")).__module__ == "ome_zarr_models.v05.image_label"


def test_each_shard_is_asked_for_once_in_order(tmp_path, small_shards):
    array = noise(2, 70, 45)
    asked = []

    def read(region):
        asked.append(region)
        return array[(Ellipsis, *region.slices())]

    write_maps(tmp_path / "m", (70, 45), np.uint8, (RED, BLUE), (1.0, 1.0), (0.0, 0.0), read)
    assert asked == sorted(asked)
    assert max(r.size for r in asked) == 32 * 32
    seen = np.zeros((70, 45), int)
    for region in asked:
        seen[region.slices()] += 1
    assert (seen == 1).all()


def test_same_input_same_bytes(tmp_path, small_shards):
    array = noise(2, 70, 90)
    for name in "ab":
        write(tmp_path / name, array)
    assert tree_sha256(tmp_path / "a") == tree_sha256(tmp_path / "b")
    write(tmp_path / "a", array // 2, overwrite=True)
    assert tree_sha256(tmp_path / "a") != tree_sha256(tmp_path / "b")


def test_a_flipped_bit_is_found(tmp_path):
    array = noise(1, 300, 300)
    write(tmp_path / "m", array, (RED,))
    shard = tmp_path / "m" / "0" / "c" / "0" / "0" / "0"
    whole = shard.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole) - 4, 12).tolist():
        broken = bytearray(whole)
        broken[at] ^= 16
        shard.write_bytes(bytes(broken))
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)checksum|zstd"):
            zarr.open_array(str(tmp_path / "m" / "0"), mode="r")[:]


def test_a_failure_leaves_nothing(tmp_path, small_shards):
    array = noise(1, 64, 64)

    def read(region):
        if region.start == (32, 0):
            raise RuntimeError("stop")
        return array[(Ellipsis, *region.slices())]

    with pytest.raises(RuntimeError, match="stop"):
        write_maps(tmp_path / "m", (64, 64), np.uint8, (RED,), (1.0, 1.0), (0.0, 0.0), read)
    assert tree_files(tmp_path) == []


@pytest.mark.parametrize("array", [noise(1, 9, 9), noise(2, 8, 9), noise(2, 9, 9, dtype=np.uint16)])
def test_other_shapes_and_types_are_refused_not_broadcast(tmp_path, array):
    with pytest.raises(OutputError, match="WSI513"):
        write_maps(
            tmp_path / "m", (9, 9), np.uint8, (RED, BLUE), (1.0, 1.0), (0.0, 0.0), lambda region: array
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "channels", "spacing", "kind"),
    [
        ((9,), (RED,), (1.0,), "image"),
        ((9, 9), (RED,), (1.0,), "image"),
        ((0, 9), (RED,), (1.0, 1.0), "image"),
        ((9, 9), (RED,), (1.0, 0.0), "image"),
        ((9, 9), (), (1.0, 1.0), "image"),
        ((9, 9), (RED,), (1.0, 1.0), "labels"),
    ],
)
def test_contradictions_are_refused(tmp_path, shape, channels, spacing, kind):
    with pytest.raises(OutputError, match="WSI514"):
        write_maps(
            tmp_path / "m", shape, np.uint8, channels, spacing, (0.0,) * len(shape), np.zeros, kind=kind
        )


def test_regions_stay_inside_the_image(tmp_path):
    frame = Region((0, 0), (2100, 30))
    array = noise(1, 2100, 30)

    def read(region):
        assert frame.contains(region)
        return array[(Ellipsis, *region.slices())]

    write_maps(tmp_path / "m", frame.shape, np.uint8, (RED,), (1.0, 1.0), (0.0, 0.0), read)
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "m" / "0"), mode="r")[:], array)
