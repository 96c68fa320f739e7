"""preview.png: the same bytes twice, the right colours in the right places, and never a crash on the odd."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from PIL import Image, ImageDraw
from writers_data import CLASSES, blobs, rows_of

from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.writers import preview
from wsitk.writers.base import sha256_file
from wsitk.writers.ledger import TILE_STATUSES, write_ledger
from wsitk.writers.lettering import text_width, write
from wsitk.writers.parquet import ObjectWriter
from wsitk.writers.preview import draw_preview
from wsitk.writers.preview_layers import draw_outlines, take_census, tile_layer

GREY = 200


def objects_file(path, rows):
    with ObjectWriter(path, CLASSES, tuple(rows.columns), overwrite=True) as writer:
        writer.write(rows)
    return path


def grey_patch(asked):
    def read(region):
        asked.append(region)
        return np.full((*region.shape, 3), GREY, np.uint8)

    return read


def draw(folder, shape=(300, 400), scale=(60.0, 60.0), count=400, name="preview.png", **changes):
    extent = min(shape) * scale[0] - 60
    objects = objects_file(folder / "objects.parquet", rows_of(blobs(count, extent=extent)))
    full = tuple(round(n * s) for n, s in zip(shape, scale[::-1], strict=True))
    grid = TileGrid.fit(Region((0, 0), full), (1024, 1024), (64, 64))
    ledger = folder / "tiles.parquet"
    write_ledger(ledger, grid, np.arange(len(grid)) % len(TILE_STATUSES), (1.0, 1.0), overwrite=True)
    asked = []
    arguments = {
        "thumbnail": np.full((*shape, 3), 235, np.uint8),
        "scale_xy": scale,
        "tissue": np.tri(60, 80, dtype=bool),
        "tiles": ledger,
        "objects": objects,
        "classes": CLASSES,
        "lines": ["slide.svs", "model 1.0", "Tissue: 3.5 mm²", "a plain fact"],
        "read_patch": grey_patch(asked),
        "spacing_um": 0.25,
    }
    draw_preview(folder / name, **(arguments | changes))
    return np.asarray(Image.open(folder / name)), asked, full


@pytest.mark.parametrize("shape", [(600, 900), (900, 600), (40, 30)])
def test_windows_lie_inside_and_the_page_holds_all(tmp_path, shape):
    page, asked, full = draw(tmp_path, shape)
    assert page.shape[1:] == (1800, 3)
    windows = [r for r in asked if r.shape[1] < full[1]]
    assert windows
    for window in windows:
        assert Region((0, 0), full).contains(window)
        assert window.shape[1] / window.shape[0] == pytest.approx(4 / 3, rel=0.1)
    assert (page[-1] == 255).all()  # nothing is cut at the bottom
    assert len(set(windows)) == len(windows)
    if min(shape) > 500:
        assert len(windows) == 3


def test_same_bytes_twice_and_no_overwriting(tmp_path):
    draw(tmp_path)
    first = sha256_file(tmp_path / "preview.png")
    draw(tmp_path, name="again.png")
    assert sha256_file(tmp_path / "again.png") == first
    with pytest.raises(OutputError, match="WSI510"):
        draw(tmp_path)


def test_nothing_found_is_a_picture_too(tmp_path):
    page, asked, _ = draw(tmp_path, count=0)
    assert asked == []
    assert page.shape[1] == 1800
    page, asked, _ = draw(
        tmp_path, name="b.png", objects=None, tiles=None, classes=(), lines=[], spacing_um=None
    )
    assert asked == []
    page, asked, _ = draw(tmp_path, name="c.png", count=1, tissue=np.zeros((3, 4), bool))
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_other_pixels_are_shown_as_rgb(dtype, channels):
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    pixels = np.zeros((4, 5) if channels is None else (4, 5, channels), dtype)
    pixels[2] = top
    shown = preview._rgb(pixels)
    assert (shown.shape, shown.dtype) == ((4, 5, 3), np.uint8)
    assert (shown[2] == 255).all()
    assert (shown[3] == 0).all()


def test_a_small_image_with_a_coarse_thumbnail_is_read_again(tmp_path):
    _, asked, full = draw(tmp_path, (40, 50), scale=(50.0, 50.0))
    strips = asked[:-3]
    assert sum(s.size for s in strips) == full[0] * full[1]
    assert max(s.size for s in strips) <= (1 << 24) + 64 * full[1]
    _, asked, _ = draw(tmp_path, (40, 50), scale=(1000.0, 1000.0), name="large.png")
    assert len(asked) <= 3


def test_census_equals_a_naive_count(tmp_path):
    rows = rows_of(blobs(500, extent=3000.0))
    path = objects_file(tmp_path / "o", rows)
    census = take_census(path, 3, (310, 320), (10.0, 10.0), (300, 400))
    np.testing.assert_array_equal(census.counts, np.bincount(rows.class_id, minlength=3))
    naive = np.zeros_like(census.density)
    windows = np.zeros_like(census.cells)
    for kind, (x, y) in zip(rows.class_id, rows.centroid_xy, strict=True):
        naive[kind, int(y // 10), int(x // 10)] += 1
        windows[kind, int(y // 300), int(x // 400)] += 1
    np.testing.assert_array_equal(census.density, naive)
    np.testing.assert_array_equal(census.cells, windows)


def test_outlines_are_where_the_objects_are(tmp_path):
    square = shapely.box(1100, 2050, 1140, 2080)
    rows = rows_of([square, shapely.box(0, 0, 10, 10)], class_id=np.array([2, 0], np.int16))
    window = Region((2000, 1000), (120, 160))
    patch = np.full((480, 640, 3), GREY, np.uint8)  # four times as large
    colors = [c.color for c in CLASSES]
    drawn, counts = draw_outlines(patch, window, objects_file(tmp_path / "o", rows), colors)
    assert counts.tolist() == [0, 0, 1]
    assert tuple(drawn[200 + 60, 400]) == colors[2]  # left side: x 1100, y 2065
    assert tuple(drawn[320, 480]) == colors[2]  # lower side: x 1120, y 2080
    assert (drawn[:150] == GREY).all()
    assert (drawn[:, :350] == GREY).all()
    inside = drawn[260, 480].astype(int)
    assert (np.abs(inside - GREY) < 60).all()  # a hint of colour only
    assert (inside != GREY).any()


def test_tiles_that_failed_are_hatched_and_named():
    image = np.full((100, 100, 3), 255, np.uint8)
    tiles = [
        (Region((0, 0), (400, 400)), "ok"),
        (Region((400, 400), (400, 400)), "unreadable"),
        (Region((800, 0), (200, 400)), "background"),
    ]
    drawn, shown = tile_layer(image, tiles, (10.0, 10.0))
    assert list(shown) == ["unreadable"]
    changed = (drawn != 255).any(axis=2)
    assert changed[40:80, 40:80].all()
    assert not changed[80:, :40].any()
    assert changed[0, :40].all()  # the faint grid
    assert not changed[5:35, 5:35].any()


def test_signs_that_the_font_lacks_are_put_together():
    def pixels(words):
        image = Image.new("L", (300, 80), 0)
        write(ImageDraw.Draw(image), (10, 10), words, 40, 255)
        return np.asarray(image)

    assert text_width("µ", 40) == text_width("u", 40)
    assert text_width("mm", 40) < text_width("mm²", 40) < text_width("mm2", 40)
    assert pixels("µm").sum() > pixels("um").sum()  # the tail
    assert not np.array_equal(pixels("µm"), pixels("\ufffem"))
    np.testing.assert_array_equal(pixels("a–b"), pixels("a-b"))
