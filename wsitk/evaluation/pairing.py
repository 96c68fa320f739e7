"""From what a person names to pairs of truth and prediction: by stem, and nothing lost silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from wsitk.errors import SourceError, UsageError
from wsitk.evaluation.label_files import PANNUKE, LabelReader
from wsitk.evaluation.labels import Labels, Outlines
from wsitk.evaluation.outline_files import read_geojson, read_objects, read_points
from wsitk.geometry import Region

__all__ = ["Item", "Pair", "Side", "find_items", "find_pictures", "pair_items"]

Answer = Labels | Outlines
Picture = Callable[[Region], Any]

_KINDS: tuple[tuple[str, ...], ...] = (
    (".npz",), (".mat",), (".nii", ".nii.gz"), (".geojson", ".geojson.gz"), (".csv",),
    (".tif", ".tiff"), (".npy",), (".png",),
)  # fmt: skip
"""Endings by priority: of a folder only those of the first line that occurs are labels, the rest are pictures."""

_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_TAILS = (
    "_inst",
    "_instances",
    "_mask",
    "_masks",
    "_label",
    "_labels",
    "_seg",
    "_pred",
    "_gt",
    "_truth",
    "_types",
)
_SLIDES = (".svs", ".tif", ".tiff", ".ome", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".png", ".jpg", ".jpeg",
           ".qptiff", ".vms")  # fmt: skip


@final
@dataclass(frozen=True)
class Item:
    """One image's answer on one side, not yet read.

    Attributes
    ----------
    name : str
        What it pairs by.
    path : Path
        The file that holds it.
    read : callable
        Reads it; raises SourceError.
    picture : callable or None
        Gives a window of the image that the labels belong to, RGB uint8, where one lies beside them.
    tissue : str
        What the set itself says it is of; PanNuke's ``types.npy``.
    """

    name: str
    path: Path
    read: Callable[[], Answer]
    picture: Picture | None = None
    tissue: str = ""


@final
@dataclass(frozen=True)
class Side:
    """All items found under one path, by name, and in words what was read and what was left alone."""

    items: Mapping[str, Item]
    said: str


@final
@dataclass(frozen=True)
class Pair:
    """A true item and its prediction; None where there is none, which counts as the worst there is."""

    name: str
    truth: Item
    predicted: Item | None
    facts: Mapping[str, str] = field(default_factory=dict)


def find_items(path: Path, reader: LabelReader, *, points: bool = False) -> Side:
    """Return all label images or outlines under `path`: a file, a folder, or an output folder of `wsitk run`.

    `points` takes tables of points for labels too. Raises UsageError (WSI820) where there is nothing to read, WSI823
    where two files would have one name.
    """
    if not path.exists():
        raise UsageError("WSI820", f"{path}: no such file or folder; check the path")
    if path.is_file():
        if path.suffix == ".npy" and (shape := _shape(path)) is not None and len(shape) == 4:
            return _fold_side([path], path.parent, reader)
        return Side(dict([_entry(path, path.parent, reader)]), f"{path.name}, one file")
    ours = sorted(path.glob("**/objects.parquet"))
    if ours:
        return _ours(ours, path)
    folds = sorted(p for p in path.glob("**/masks.npy") if len(_shape(p) or ()) == 4)
    if folds:
        return _fold_side(folds, path, reader)
    return _folder(path, reader, points)


def _ours(files: list[Path], root: Path) -> Side:
    """Return the inputs of a run; the name is that of the input."""
    items: dict[str, Item] = {}
    for file in files:
        name = file.parent.relative_to(root).as_posix() if file.parent != root else root.name
        _add(items, Item(_stem(name), file, partial(read_objects, file)))
    return Side(items, f"{len(items)} objects.parquet of wsitk")


def _folder(path: Path, reader: LabelReader, points: bool) -> Side:
    """Return the label files of the first kind that occurs in a folder."""
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    for endings in _KINDS:
        if endings == (".csv",) and not points:
            continue
        mine = [f for f in files if f.name.lower().endswith(endings)]
        if mine:
            items: dict[str, Item] = {}
            for file in mine:
                _add(items, _entry(file, path, reader)[1])
            rest = len(files) - len(mine)
            left = f"; {rest} other files left alone" if rest else ""
            return Side(items, f"{len(mine)} files {' or '.join(f'*{e}' for e in endings)}{left}")
    raise UsageError(
        "WSI820",
        f"{path}: no labels among {len(files)} files; wanted objects.parquet of wsitk, masks.npy of PanNuke, or"
        f" {', '.join(e[0] for e in _KINDS)}",
    )


def _entry(file: Path, root: Path, reader: LabelReader) -> tuple[str, Item]:
    """Return one file as an item, under its name."""
    lower = file.name.lower()
    read: Callable[[], Answer] = partial(reader.read, file)
    if lower.endswith(".parquet"):
        read = partial(read_objects, file)
    elif lower.endswith((".geojson", ".geojson.gz")):
        read = partial(read_geojson, file)
    elif lower.endswith(".csv"):
        read = partial(read_points, file)
    # all tables of objects have one name; their folder is called as the slide is
    name = _stem(file.parent.name if lower == "objects.parquet" else file.relative_to(root).as_posix())
    return name, Item(name, file, read, _beside(file))


def _beside(file: Path) -> Picture | None:
    """Return a reader of the picture with the same stem in the same folder, if there is one."""
    stem = _stem(file.name)
    for ending in _PICTURES:
        found = file.with_name(stem + ending)
        if found != file and found.is_file():
            return partial(read_window, found)
    return None


def find_pictures(folder: Path) -> dict[str, Picture]:
    """Return a reader of windows for each image or slide in a folder, by the name that labels pair by.

    Raises UsageError (WSI820) for a folder that isn't there.
    """
    if not folder.is_dir():
        raise UsageError("WSI820", f"{folder}: no such folder of images; check the path")
    found: dict[str, Picture] = {}
    endings = (*_PICTURES, *_SLIDES)
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name.lower().endswith(endings)):
        found.setdefault(_stem(file.relative_to(folder).as_posix()), partial(read_window, file))
    return found


def read_window(path: Path, region: Region) -> Any:
    """Return a window of an image or slide at level 0, as RGB, uint8. Raises SourceError as `open_source` does."""
    from wsitk.sources import open_source

    with open_source(str(path)) as source:
        pixels = np.asarray(source.read(region, level=0)).reshape(*region.shape, -1)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] < 3 else pixels
    return pixels[..., :3] if pixels.dtype == np.uint8 else (pixels[..., :3] >> 8).astype(np.uint8)


def _fold_side(files: list[Path], root: Path, reader: LabelReader) -> Side:
    """Return every image of PanNuke's folds; `types.npy` and `images.npy` are used where they lie about."""
    items: dict[str, Item] = {}
    for file in files:
        masks = np.load(file, mmap_mode="r", allow_pickle=False)
        if masks.shape[3] != len(PANNUKE) + 1:
            raise SourceError("WSI822", f"{file}: {masks.shape}; PanNuke's masks are (N, H, W, 6)")
        folder = file.parent.relative_to(root).as_posix() if len(files) > 1 else ""
        tissues = _sibling(file, "types.npy", len(masks))
        images = _sibling(file, "images.npy", len(masks))
        for k in range(len(masks)):
            picture = None if images is None else _fold_picture(images, k)
            _add(
                items,
                Item(
                    f"{folder}/{k:05d}".lstrip("/"),
                    file,
                    partial(reader.pannuke, masks, k),
                    picture,
                    "" if tissues is None else str(tissues[k]),
                ),
            )
    return Side(items, f"{len(items)} images of {len(files)} PanNuke folds")


def _fold_picture(images: Any, index: int) -> Picture:
    """Return a reader of windows of one image (N, H, W, 3) of a fold; white beyond it."""

    def read(region: Region) -> Any:
        window = np.full((*region.shape, 3), 255, np.uint8)
        inside = region.intersect(Region((0, 0), tuple(images.shape[1:3])))
        window[inside.slices(region.start)] = images[index][inside.slices()].astype(np.uint8)
        return window

    return read


def _sibling(masks: Path, name: str, count: int) -> Any:
    """Return an array of the same fold, memory-mapped; None if there is none.

    PanNuke's layout is ``masks/fold1/masks.npy`` beside ``images/fold1/images.npy`` and ``types.npy``.
    """
    fold = masks.parent.name
    for folder in (masks.parent, masks.parent.parent.parent / "images" / fold):
        file = folder / name
        if file.is_file():
            values = np.load(file, mmap_mode="r", allow_pickle=False)
            if len(values) != count:
                raise SourceError("WSI822", f"{file}: {len(values)} entries for {count} masks of {masks}")
            return values
    return None


def _shape(file: Path) -> tuple[int, ...] | None:
    """Return the shape of an array file; None if it is none."""
    try:
        return tuple(np.load(file, mmap_mode="r", allow_pickle=False).shape)
    except (OSError, ValueError, EOFError):
        return None


def _stem(name: str) -> str:
    """Return a name without endings of files and slides, and without the tails that label files have."""
    folder, _, last = name.rpartition("/")
    for kind in (".parquet", *(e for group in _KINDS for e in group[::-1])):
        if last.lower().endswith(kind):
            last = last[: -len(kind)]
            break
    for endings in (_TAILS, _SLIDES, _TAILS):  # a.svs_mask, a_mask.svs
        cut = next((e for e in endings if last.lower().endswith(e)), "")
        last = last[: len(last) - len(cut)] if len(cut) < len(last) else last
    return f"{folder}/{last}".lstrip("/")


def _add(items: dict[str, Item], item: Item) -> None:
    if item.name in items:
        raise UsageError(
            "WSI823",
            f"{items[item.name].path} and {item.path} are both called {item.name!r}; keep one of them there",
        )
    items[item.name] = item


def pair_items(truth: Side, predicted: Side, *, allow_extra: bool = False) -> tuple[list[Pair], list[str]]:
    """Return a pair for each true item, by name, and the predictions that have no truth.

    One file on each side is one pair, whatever the names. A name that is equal but for its folders pairs too, if it
    is the only one. Raises UsageError: WSI824 if nothing pairs, WSI825 for predictions without truth unless allowed.
    """
    if len(truth.items) == len(predicted.items) == 1:
        (t,), (p,) = truth.items.values(), predicted.items.values()
        return [Pair(t.name, t, p)], []
    found = {name: predicted.items.get(name) for name in truth.items}
    if not any(found.values()):
        short = _by_last(predicted.items)
        unique = _by_last(truth.items)
        found = {
            n: short.get(n.rsplit("/", 1)[-1]) if n.rsplit("/", 1)[-1] in unique else None for n in found
        }
    if not any(found.values()):
        raise UsageError(
            "WSI824",
            f"no prediction has the name of a truth: truth {_some(truth.items)}, predictions"
            f" {_some(predicted.items)}; name the files alike",
        )
    used = {id(item) for item in found.values()}
    extra = [name for name, item in predicted.items.items() if id(item) not in used]
    if extra and not allow_extra:
        raise UsageError(
            "WSI825",
            f"{len(extra)} predictions have no truth: {_some(extra)}; add the truth, or pass --allow-extra",
        )
    return [Pair(name, truth.items[name], item) for name, item in found.items()], extra


def _by_last(items: Mapping[str, Item]) -> dict[str, Item]:
    """Return the items by the last part of their name, if that names only one."""
    lasts = [name.rsplit("/", 1)[-1] for name in items]
    often = Counter(lasts)
    return {last: items[name] for name, last in zip(items, lasts, strict=True) if often[last] == 1}


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
