"""`review.png`: small pictures of objects side by side, read from the slides one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import shapely
from numpy.typing import NDArray

from wsitk.anonymous import pseudonym
from wsitk.errors import WsitkError
from wsitk.geometry import Region
from wsitk.writers.base import atomic_file

if TYPE_CHECKING:
    from wsitk.sources.base import Source

__all__ = ["Crop", "draw_sheet", "slides_of"]

Array = NDArray[Any]
Color = tuple[int, int, int]

_SIDE, _GAP, _CAPTION, _TOP, _COLUMNS = 176, 14, 46, 74, 10
_MOST = 100  # pictures on a sheet; longer lists are for the table
_FIELD_UM, _FIELD_PX = 32.0, 128.0  # what a picture shows at least: some cells around a nucleus
_LARGEST = 2048  # pixels along a side that are read for one picture
_INK, _SOFT, _RULE = (29, 37, 44), (104, 116, 126), (224, 229, 233)


def slides_of(
    runs: Mapping[str, Path],
    given: Path | None,
    record: Path,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Path]:
    """Return where the slide of each input lies, as far as that is known; name -> path.

    `given` is a slide or a folder of slides, under the names that they had in the run. Without it the command in
    `record` (``run.json``) is tried. A file that is not the one that was run is left out, and `on_note` is told.
    Raises UsageError (WSI023, WSI024) for a folder without slides.
    """
    found: dict[str, Path] = {}
    for name, path in _candidates(runs, given) if given else _named_in(runs, record):
        if name not in found and _same(path, runs[name], on_note):
            found[name] = path
    return found


def _candidates(runs: Mapping[str, Path], given: Path) -> Iterator[tuple[str, Path]]:
    """Yield inputs with the paths below `given` that bear their name; of one and one, that one."""
    from wsitk.sources.discover import expand_inputs

    items = expand_inputs([given]).items
    if len(items) == len(runs) == 1:
        yield next(iter(runs)), items[0].path
        return
    for name in runs:
        yield from ((name, i.path) for i in items if name in (i.name, pseudonym(i.name)))
        last = [i.path for i in items if i.name.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
        if len(last) == 1:
            yield name, last[0]


def _named_in(runs: Mapping[str, Path], record: Path) -> Iterator[tuple[str, Path]]:
    """Yield inputs with the files that the command of a run named, where these still lie there."""
    try:
        command = json.loads(record.read_bytes())["command"]
        words = [Path(word) for word in command[1:] if isinstance(word, str)]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no record, or of another version: then there are no pictures
    for name in runs:
        for path in words:
            if path.name == name.rsplit("/", 1)[-1] and path.exists():
                yield name, path
            elif (path / name).exists():
                yield name, path / name


def _same(path: Path, folder: Path, on_note: Callable[[str], None]) -> bool:
    """Tell whether a file is the one whose results lie in `folder`, by the identity that the run noted."""
    from wsitk.sources import open_source

    try:
        noted = json.loads((folder / "provenance.json").read_bytes())["input"]
        with open_source(str(path)) as source:
            found = source.identity()
    except WsitkError:
        return True  # said when the pictures are made
    except (OSError, ValueError, KeyError):
        return False
    # a file may have been renamed, and another version of wsitk may have noted more or less of it
    if all(found[key] == noted[key] for key in found.keys() & noted.keys() - {"name"}):
        return True
    on_note(f"{path}: not the file that was run for {folder.name}; its pictures show outlines only")
    return False


@final
@dataclass(frozen=True)
class Crop:
    """One picture: whose object, its outline in level-0 pixels and colour, and two lines below."""

    input: str
    outline: Any
    color: Color
    title: str
    note: str


def draw_sheet(
    out: Path,
    crops: Sequence[Crop],
    slides: Mapping[str, Path],
    title: str,
    on_note: Callable[[str], None] = lambda text: None,
) -> None:
    """Draw `crops` in their order, at most 100; outlines on white where there is no slide, or none that can be read.

    A picture of one object is held at a time, and one slide is open at a time. Raises OutputError as `atomic_file`.
    """
    from PIL import Image, ImageDraw

    from wsitk.writers.lettering import write

    shown = crops[:_MOST]
    across = min(_COLUMNS, max(4, len(shown)))
    down = -(-max(1, len(shown)) // across)
    size = (_GAP + across * (_SIDE + _GAP), _TOP + down * (_SIDE + _CAPTION + _GAP))
    page = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(page)
    write(pen, (_GAP, 16), title, 24, _INK)
    more = f"; {len(crops) - len(shown):,} more in review.csv" if len(crops) > len(shown) else ""
    write(pen, (_GAP, 46), f"{len(shown)} objects{more}", 15, _SOFT)
    with _Slides(slides, on_note) as pictures:
        # slide by slide, so that each is opened once, whatever the ranks
        for k, crop in sorted(enumerate(shown), key=lambda pair: (pair[1].input, pair[0])):
            x, y = _GAP + k % across * (_SIDE + _GAP), _TOP + k // across * (_SIDE + _CAPTION + _GAP)
            page.paste(Image.fromarray(_panel(pictures.get(crop.input), crop, on_note)), (x, y))
            pen.rectangle([x, y, x + _SIDE - 1, y + _SIDE - 1], outline=_RULE)
            write(pen, (x, y + _SIDE + 4), crop.title, 17, _INK)
            write(pen, (x, y + _SIDE + 25), _short(crop.note), 13, _SOFT)
    with atomic_file(out, overwrite=True) as stream:
        page.save(stream, "PNG")


def _short(words: str) -> str:
    return words if len(words) <= 24 else f"{words[:23]}…"


@final
class _Slides:
    """Opens the slide of an input, and closes the one before."""

    def __init__(self, paths: Mapping[str, Path], on_note: Callable[[str], None]) -> None:
        self._paths = paths
        self._note = on_note
        self._stack = ExitStack()
        self._name = ""
        self._open: Source | None = None

    def __enter__(self) -> _Slides:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def get(self, name: str) -> Source | None:
        """Return the open slide of an input; None where there is none, which is noted once."""
        from wsitk.sources import open_source

        if name != self._name:
            self._stack.close()
            self._stack, self._name, self._open = ExitStack(), name, None
            if name not in self._paths:
                self._note(f"{name}: no slide at hand; its pictures show outlines only (see --slides)")
                return None
            try:
                source = self._stack.enter_context(open_source(str(self._paths[name])))
            except WsitkError as error:  # the list is worth having without pictures
                self._note(f"{name}: {error}; its pictures show outlines only")
                return None
            if source.ndim != 2:
                self._note(f"{name}: a volume; its pictures show outlines only")
                return None
            self._open = source
        return self._open


def _panel(source: Source | None, crop: Crop, on_note: Callable[[str], None]) -> Array:
    """Return one picture, (`_SIDE`, `_SIDE`, 3) uint8."""
    import cv2

    window = _window(source, crop.outline)
    pixels = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    if source is not None:
        try:
            pixels = cv2.resize(_pixels(source, window), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        except WsitkError as error:
            on_note(f"{crop.input}: {error}; one picture shows an outline only")
    zoom = _SIDE / window.shape[0]
    image = np.ascontiguousarray(pixels)
    for ring in shapely.get_rings(shapely.get_parts(crop.outline)):
        xy = (shapely.get_coordinates(ring) - window.start[::-1]) * zoom * 16
        points = np.rint(xy).astype(np.int32)
        cv2.polylines(image, [points], True, (255, 255, 255), 3, cv2.LINE_AA, 4)
        cv2.polylines(image, [points], True, crop.color, 1, cv2.LINE_AA, 4)
    return np.asarray(image)


def _window(source: Source | None, outline: Any) -> Region:
    """Return the square of level 0 around an object: some micrometres, or twice the object."""
    left, top, right, bottom = shapely.bounds(outline)
    field = _FIELD_UM / source.spacing.mean if source is not None and source.spacing else _FIELD_PX
    side = int(np.ceil(max(field, 2 * (right - left), 2 * (bottom - top))))
    return Region((round((top + bottom) / 2 - side / 2), round((left + right) / 2 - side / 2)), (side, side))


def _pixels(source: Source, window: Region) -> Array:
    """Return a window as RGB uint8, from the level that shows it in no more pixels than a picture needs."""
    wanted = window.shape[0] / _LARGEST
    level = next(
        (k for k, v in enumerate(source.levels) if v.downsample[0] >= wanted), len(source.levels) - 1
    )
    step = source.levels[level].downsample
    start = tuple(round(a / s) for a, s in zip(window.start, step, strict=True))
    shape = tuple(max(1, round(n / s)) for n, s in zip(window.shape, step, strict=True))
    raw = np.asarray(source.read(Region(start, shape), level)).reshape(*shape, -1)
    rgb = np.repeat(raw, 3, axis=2) if raw.shape[2] < 3 else raw
    return _eight_bit(np.ascontiguousarray(rgb[..., :3]))


def _eight_bit(values: Array) -> Array:
    """Return any values as 8 bit; other than 8 bit stretched to what the window holds."""
    if values.dtype == np.uint8:
        return values
    exact = np.nan_to_num(values.astype(np.float64))
    low, high = np.percentile(exact, [0.5, 99.5])
    return np.asarray(np.clip((exact - low) / max(high - low, 1e-12) * 255, 0, 255), np.uint8)
