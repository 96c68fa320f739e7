"""Fluorescence images: channels however they are stored, their names, and which of them a model sees."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from plate_data import CHANNELS, EDGE, SPACING_UM, field, plate_xml, write_plate
from sources_data import overwrite, set_tag, smooth, tile_places, write_pyramid

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources import Source, open_source
from wsitk.sources.channel_choice import choose_channels, parse_channels
from wsitk.sources.ome_xml import first_description, parse_ome
from wsitk.sources.planes import PlanesSource
from wsitk.sources.tiff import TiffSource

NAMES = ["DAPI", "HSP70", "GFP"]
OFFSETS, COUNTS = 273, 279


def noise(channels: int, dtype: str = "u2", shape: tuple[int, int] = (150, 170)) -> NDArray[Any]:
    """Return (C, H, W); no codec or layout can be mistaken for another on noise."""
    top = np.iinfo(dtype).max
    return np.random.default_rng(channels).integers(0, top, (channels, *shape), dtype, endpoint=True)


def whole(source: Source) -> NDArray[Any]:
    return source.read(Region((0, 0), source.shape))


def same(path: Path, want: NDArray[Any]) -> tuple[str, ...]:
    """Compare a file, whole and in a window across tiles, with (C, H, W); return the channels' names."""
    with open_source(path) as source:
        assert isinstance(source, PlanesSource)
        assert source.dtype == want.dtype
        np.testing.assert_array_equal(whole(source), np.moveaxis(want, 0, -1))
        window = source.read(Region((13, 29), (40, 71)))
        np.testing.assert_array_equal(window, np.moveaxis(want[:, 13:53, 29:100], 0, -1))
        return source.channel_names


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"rowsperstrip": 32},
    {"tile": (32, 48)},
    {"compression": "zlib"},
    {"compression": "lzw", "rowsperstrip": 20},
    {"compression": "zlib", "predictor": True, "tile": (64, 64)},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_pages_interleaved_and_planar_are_the_same_image(
    tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    image = noise(3, dtype)
    metadata = {"axes": "CYX", "Channel": {"Name": NAMES}}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="minisblack", metadata=metadata, **options)
    assert same(tmp_path / "a.ome.tif", image) == ("DAPI", "HSP70", "GFP")
    between = np.ascontiguousarray(np.moveaxis(image, 0, -1))
    tifffile.imwrite(tmp_path / "b.tif", between, photometric="minisblack", planarconfig="contig", **options)
    assert same(tmp_path / "b.tif", image) == ("c0", "c1", "c2")
    tifffile.imwrite(tmp_path / "c.tif", image, photometric="minisblack", planarconfig="separate", **options)
    assert same(tmp_path / "c.tif", image) == ("c0", "c1", "c2")


@pytest.mark.parametrize("channels", [2, 4, 5, 17])
def test_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    image = noise(channels, shape=(60, 110))
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="minisblack", metadata={"axes": "CYX"})
    assert same(tmp_path / "a.ome.tif", image) == tuple(f"c{k}" for k in range(channels))
    between = np.ascontiguousarray(np.moveaxis(image, 0, -1))
    tifffile.imwrite(tmp_path / "b.tif", between, photometric="minisblack", planarconfig="contig")
    same(tmp_path / "b.tif", image)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_byte_orders_and_white_zeros(tmp_path: Path, order: str, bigtiff: bool, photometric: str) -> None:
    image = noise(2)
    stored = ~image if photometric == "miniswhite" else image
    options: dict[str, Any] = {"byteorder": order, "bigtiff": bigtiff, "photometric": photometric}
    for name, more in (("a.ome.tif", {}), ("b.ome.tif", {"tile": (64, 64), "compression": "zlib"})):
        tifffile.imwrite(tmp_path / name, stored, metadata={"axes": "CYX"}, **options, **more)
        same(tmp_path / name, image)
    assert "<OME" in first_description(str(tmp_path / "a.ome.tif"))


def test_a_strip_for_the_whole_image_is_read_in_parts(tmp_path: Path) -> None:
    image = noise(2, shape=(1500, 900))
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="minisblack", metadata={"axes": "CYX"})
    with open_source(tmp_path / "a.ome.tif") as source:
        assert isinstance(source, PlanesSource)
        assert source.levels[0].chunk[0] < 600
        np.testing.assert_array_equal(
            source.read(Region((570, 100), (40, 50))), np.moveaxis(image[:, 570:610, 100:150], 0, -1)
        )
        assert source._store.cache._used < image.nbytes  # and not all of it was decoded for that


def test_pyramids_in_sub_pages(tmp_path: Path) -> None:
    image = noise(3, shape=(256, 320))
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", bigtiff=True) as writer:
        writer.write(
            image, subifds=1, tile=(64, 64), photometric="minisblack",
            metadata={"axes": "CYX", "Channel": {"Name": NAMES}},
        )  # fmt: skip
        writer.write(image[:, ::2, ::2], subfiletype=1, tile=(64, 64), photometric="minisblack")
    with open_source(tmp_path / "a.ome.tif") as source:
        assert [level.shape for level in source.levels] == [(256, 320), (128, 160)]
        half = source.read(Region((0, 0), (128, 160)), level=1)
        np.testing.assert_array_equal(half, np.moveaxis(image[:, ::2, ::2], 0, -1))


def test_pixel_sizes_and_who_says_so(tmp_path: Path) -> None:
    image = noise(2)
    size = {
        "PhysicalSizeX": 325,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.325,
        "PhysicalSizeYUnit": "µm",
    }
    tifffile.imwrite(
        tmp_path / "a.ome.tif", image, photometric="minisblack", metadata={"axes": "CYX", **size}
    )
    with open_source(tmp_path / "a.ome.tif") as source:
        assert source.spacing is not None
        assert source.spacing.um == pytest.approx((0.325, 0.325))
        assert source.spacing.provenance == "OME PhysicalSizeX"
    tifffile.imwrite(
        tmp_path / "b.tif", image, imagej=True, resolution=(4, 4), metadata={"axes": "CYX", "unit": "um"}
    )
    with open_source(tmp_path / "b.tif") as source:
        assert source.spacing is not None
        assert (source.spacing.um, source.spacing.provenance) == ((0.25, 0.25), "imagej.unit")
        assert source.channel_names == ("c0", "c1")
    tifffile.imwrite(tmp_path / "c.ome.tif", image, photometric="minisblack", metadata={"axes": "CYX"})
    with open_source(tmp_path / "c.ome.tif") as source:
        assert source.spacing is None
        assert "OME PhysicalSizeX, imagej.unit" in source.spacing_error
    with open_source(tmp_path / "c.ome.tif", mpp=0.5) as source:
        assert source.spacing is not None
        assert source.spacing.provenance == "--mpp"


def test_one_named_channel_keeps_its_name_and_grey_images_their_reader(tmp_path: Path) -> None:
    image = noise(1)[0]
    metadata = {"axes": "YX", "Channel": {"Name": ["DAPI"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="minisblack", metadata=metadata)
    assert same(tmp_path / "a.ome.tif", image[None]) == ("DAPI",)
    tifffile.imwrite(tmp_path / "b.tif", image, photometric="minisblack", tile=(64, 64))
    with open_source(tmp_path / "b.tif") as source:
        assert isinstance(source, TiffSource)


@pytest.mark.parametrize("name", ["a.ome.tif", "a.tif"])
def test_colour_is_left_to_the_readers_of_slides(tmp_path: Path, name: str) -> None:
    path = write_pyramid(tmp_path / name, smooth(200, 150), levels=2, subifds=True)
    with open_source(path) as source:
        assert isinstance(source, TiffSource)
        assert source.channel_names == ("red", "green", "blue")


@pytest.mark.parametrize("axes", ["ZYX", "TYX", "ZCYX"])
def test_stacks_along_depth_or_time_are_refused(tmp_path: Path, axes: str) -> None:
    image = noise(4) if len(axes) == 3 else noise(4).reshape(2, 2, 150, 170)
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="minisblack", metadata={"axes": axes})
    with pytest.raises(SourceError, match=r"WSI130 a.ome.tif: 4 planes of one size .*stack; extract one"):
        open_source(tmp_path / "a.ome.tif", channels="0,1")
    if axes != "TYX":
        tifffile.imwrite(tmp_path / "b.tif", image, imagej=True, metadata={"axes": axes})
        with pytest.raises(SourceError, match="WSI130"):
            open_source(tmp_path / "b.tif")


def test_pages_that_nobody_explains_are_channels_only_if_someone_says_so(tmp_path: Path) -> None:
    image = noise(3)
    for name, more in (("a.tif", {}), ("b.tif", {"tile": (64, 64)})):
        tifffile.imwrite(tmp_path / name, image, photometric="minisblack", metadata=None, **more)
        with pytest.raises(SourceError, match=r"WSI130 .*--channels"):
            open_source(tmp_path / name)
        with open_source(tmp_path / name, channels=[2, 0]) as source:
            assert source.channel_names == ("c2", "c0")
            np.testing.assert_array_equal(whole(source), np.moveaxis(image[[2, 0]], 0, -1))
            copy = pickle.loads(pickle.dumps(source))
            np.testing.assert_array_equal(whole(copy), whole(source))
            copy.close()


# --- damage ------------------------------------------------------------------------------------------


def test_a_missing_tile_is_black_and_absent(tmp_path: Path) -> None:
    image = noise(2, shape=(128, 128))
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, image, tile=(64, 64), photometric="minisblack", metadata={"axes": "CYX"})
    set_tag(path, 325, 1, 0, page=1)  # no bytes for tile (0,1) of the second channel
    with open_source(path) as source:
        reading = source.read_inside(Region((0, 0), (128, 128)), 0)
        assert reading.absent is not None
        assert reading.absent[:64, 64:].all()
        assert not reading.absent[:, :64].any()
        assert (reading.pixels[:64, 64:, 1] == 0).all()
        np.testing.assert_array_equal(reading.pixels[..., 0], image[0])
        only = source.read_channels(Region((0, 0), (128, 128)), 0, [0])
        assert only.absent is None  # a channel that is not asked for is not missed


def test_damaged_tiles_are_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"tile": (64, 64), "photometric": "minisblack", "compression": "zlib"}
    tifffile.imwrite(path, noise(2, shape=(128, 128)), metadata={"axes": "CYX"}, **options)
    offsets, counts = tile_places(path, page=1)
    overwrite(path, offsets[3], bytes(counts[3]))
    with open_source(path) as source:
        source.read(Region((0, 0), (64, 64)))
        with pytest.raises(SourceError, match=r"WSI111 a.ome.tif: level 0 tile \(1,1\)"):
            source.read(Region((64, 64), (10, 10)))


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    path = write_plate(tmp_path / "a.ome.tif", [field(3)], plate_xml({"A01": 1}))
    data = path.read_bytes()
    path.write_bytes(data[:-400])
    with pytest.raises(SourceError, match="WSI102"):
        open_source(path)
    path.write_bytes(data)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[COUNTS].overwrite(100, dtype=4)
    with pytest.raises(SourceError, match=r"WSI102 .*strip holds 100 of 18,432 bytes"):
        open_source(path)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('SizeC="2"', 'SizeC="2000000000"', "WSI172"),
        ('IFD="0" PlaneCount="2"', 'IFD="7" PlaneCount="2"', "WSI172"),
        ('IFD="0" PlaneCount="2"', 'IFD="-2" PlaneCount="2"', "WSI172"),
        ('IFD="0" PlaneCount="2"', 'IFD="0" PlaneCount="1"', "WSI172"),
        (
            'PlaneCount="2"/>',
            'PlaneCount="2"><UUID FileName="b.ome.tif">urn:uuid:1</UUID></TiffData>',
            "WSI172",
        ),
    ],
)
def test_metadata_that_contradict_the_file(tmp_path: Path, old: str, new: str, code: str) -> None:
    xml = plate_xml({"A01": 1}, ("x", "y"))
    assert old in xml
    text = xml.replace(old, new)
    if "2000000000" in new:  # a file that claims channels without listing them
        text = text.replace("<Channel", "<Chanel")
    path = write_plate(tmp_path / "a.ome.tif", [noise(2, shape=(EDGE, EDGE))], text)
    with pytest.raises(SourceError, match=rf"{code} a.ome.tif"):
        open_source(path)


def test_channels_of_different_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    xml = plate_xml({"A01": 1}, ("x", "y"))
    with tifffile.TiffWriter(path) as writer:
        writer.write(noise(1)[0], description=xml.encode(), metadata=None, photometric="minisblack")
        writer.write(noise(1)[0, :50], metadata=None, photometric="minisblack")
    with pytest.raises(SourceError, match="WSI173"):
        open_source(path)


def test_entities_are_not_expanded() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><OME><Image Name="&b;"/></OME>'
    assert parse_ome(bomb) is None
    assert parse_ome("<OME><Image>") is None
    assert parse_ome('{"shape": [3, 64, 80]}') is None
    document = parse_ome('<OME><Image Name="x"><Pixels SizeX="wide" SizeC="2"/></Image></OME>')
    assert document is not None
    assert document.images[0].shape == (1, 1)


# --- choosing ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stained") / "a.ome.tif"
    return write_plate(path, [field(5)], plate_xml({"A01": 1}))


@pytest.mark.parametrize(
    ("asked", "picks"),
    [("DAPI,HSP70", [0, 1]), ("gfp, dapi", [2, 0]), ("2,0", [2, 0]), ([1], [1]), (["HSP70", 0], [1, 0])],
)
def test_channels_by_name_and_number(stained: Path, asked: Any, picks: list[int]) -> None:
    with open_source(stained, channels=asked) as source, open_source(stained) as every:
        assert source.channel_names == tuple(CHANNELS[k] for k in picks)
        np.testing.assert_array_equal(whole(source), whole(every)[..., picks])
        assert source.identity()["picks"] == picks
        assert source.identity() != every.identity()
        assert source.spacing == every.spacing
        again = open_source(source.ref)
        np.testing.assert_array_equal(whole(again), whole(source))
        assert again.identity() == source.identity()
        again.close()


def test_only_what_is_chosen_is_read(stained: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    path.write_bytes(stained.read_bytes())
    set_tag(path, COUNTS, 0, 0, page=2)  # a channel that the file does not hold
    with open_source(path, channels="DAPI,HSP70") as source:
        assert source.read_inside(Region((0, 0), source.shape), 0).absent is None
    with open_source(path, channels="GFP") as source:
        assert source.read_inside(Region((0, 0), source.shape), 0).absent is not None


def test_a_channel_that_is_not_there(stained: Path) -> None:
    with pytest.raises(
        SourceError, match=r"WSI171 a.ome.tif: has no channel 'Cy5'; there are 0 DAPI, 1 HSP70, 2 GFP"
    ):
        open_source(stained, channels="DAPI,Cy5")
    with pytest.raises(SourceError, match="WSI171"):
        open_source(stained, channels=[3])
    with pytest.raises(SourceError, match="WSI171"):
        open_source(stained, channels=[-1])


@pytest.mark.parametrize("asked", ["DAPI,", "DAPI,DAPI", ",", ["x", "x"]])
def test_choices_that_make_no_sense(asked: Any) -> None:
    with pytest.raises(UsageError, match="WSI085"):
        parse_channels(asked)


def test_names_that_repeat_and_names_that_are_numbers() -> None:
    image = noise(3).transpose(1, 2, 0)
    from wsitk.sources.array import ArraySource

    twice = ArraySource(image, axes="yxc", channel_names=["GFP", "gfp", "GFP"])
    assert choose_channels(twice, ["gfp"]).channel_names == ("gfp",)  # exactly so, before any other
    with pytest.raises(SourceError, match="2 channels called 'GFP'; give its number"):
        choose_channels(twice, ["GFP"])
    waves = ArraySource(image, axes="yxc", channel_names=["488", "1", "0"])
    assert choose_channels(waves, "488,0").channel_names == ("488", "0")
    assert choose_channels(waves, [0]).channel_names == ("488",)  # a number is a position


def test_what_a_model_wants_is_taken_if_the_file_names_it(stained: Path) -> None:
    with open_source(stained, wanted=("hsp70", "dapi")) as source:
        assert source.channel_names == ("HSP70", "DAPI")
        assert source.warnings == ()
    with open_source(stained, wanted=CHANNELS) as source:
        assert isinstance(source, PlanesSource)
    with open_source(stained, wanted=("HSP70", "Cy5")) as source:
        assert source.channel_names == CHANNELS
        assert source.warnings[0].startswith("WSI174 a.ome.tif: the model wants channels HSP70, Cy5")
        with open_source(stained) as every:
            assert source.identity() == every.identity()
    with open_source(stained, channels="GFP", wanted=("hsp70", "dapi")) as source:
        assert source.channel_names == ("GFP",)


def test_any_source_can_be_chosen_from() -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    with open_source(grey, axes="yx", channels="0") as source:
        assert source.axes == ("y", "x", "c")
        np.testing.assert_array_equal(whole(source)[..., 0], grey)
    colour = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    with open_source(colour, channels="blue,red") as source:
        np.testing.assert_array_equal(whole(source), colour[..., [2, 0]])
        with pytest.raises(TypeError):
            pickle.dumps(source)
    with pytest.raises(UsageError, match="WSI020"):
        open_source(source, channels="blue")


def test_spacing_of_the_plate_is_each_fields_own(stained: Path) -> None:
    with open_source(stained) as source:
        assert source.spacing is not None
        assert source.spacing.um == (SPACING_UM, SPACING_UM)
