"""Images with instance masks in two folders: what a lab has when slides are cut already.

FOLDER/images/a.png        .png .jpg .jpeg .tif .tiff
FOLDER/masks/a.npz         .npz .npy .mat .tif .tiff .png: whole numbers, 0 for background
FOLDER/classes.toml        spacing_um = 0.25, classes = ["Tumour", "Immune"]
FOLDER/samples.csv         optional: tissue, group, weight, spacing_um of each image
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.models.cellvit.training.data import IGNORE, Dataset, Example
from wsitk.models.cellvit.training.masks import ENDINGS, read_mask
from wsitk.models.cellvit.training.samples import Sample, read_samples, write_samples

__all__ = ["Patches", "PatchWriter", "patch_folders", "write_patches"]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@final
class Patches(Dataset):
    """A folder of images and a folder of masks of the same names; see the module for the layout.

    Masks hold the number of the nucleus in each pixel (-1: nobody looked), and perhaps its type: a second
    channel, or in ``.npz`` an array ``types`` (H, W), or ``type`` with one number for each nucleus. HoVer-Net's
    ``.mat`` (``inst_map`` with ``type_map`` or ``inst_type``) is read as it is.

    Parameters
    ----------
    spacing_um
        Micrometres per pixel, for a folder whose ``classes.toml`` does not say.

    Raises
    ------
    UsageError
        WSI906 if this is no such folder, WSI916 for a ``classes.toml`` that cannot be followed or that is needed
        and missing, WSI912 for ``samples.csv``.
    """

    def __init__(self, folder: Path, *, spacing_um: float | None = None) -> None:
        folders = patch_folders(folder)
        if folders is None:
            raise UsageError("WSI906", f"{folder} holds no images/ and masks/ with files of the same names")
        self.name, self.folder = folder.name, folder
        images = {p.stem: p for p in sorted(folders[0].iterdir()) if p.suffix.lower() in PICTURES}
        masks = {p.stem: p for p in sorted(folders[1].iterdir()) if p.suffix.lower() in ENDINGS}
        both = sorted(images.keys() & masks.keys())
        self._pairs = [(images[k], masks[k]) for k in both]
        self.classes, spacing = _classes(folder, spacing_um)
        known = read_samples(folder)
        rows = [known.get(i.name) or known.get(i.stem) or Sample(group=i.stem) for i, _ in self._pairs]
        if spacing is None and any(row.spacing_um is None for row in rows):
            raise UsageError(
                "WSI916",
                f"{folder}: the pixel size is not known; write spacing_um = 0.25 into its classes.toml",
            )
        self._rows = rows
        self._spacings = [row.spacing_um or float(spacing or 0) for row in rows]
        alone = len(images) + len(masks) - 2 * len(both)
        self.warnings = (f"WSI917 {folder.name}: {alone} images or masks have no partner",) if alone else ()

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def tissues(self) -> tuple[str, ...]:
        return tuple(row.tissue for row in self._rows)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(row.group for row in self._rows)

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.array([row.weight for row in self._rows])

    def identity(self) -> dict[str, Any]:
        files = [[i.name, i.stat().st_size, m.name, m.stat().st_size] for i, m in self._pairs]
        return {"patches": files, "classes": list(self.classes)}

    def read(self, index: int) -> Example:
        picture, mask = self._pairs[index]
        row = self._rows[index]
        image = read_picture(picture)
        inst, types = read_mask(mask)
        if inst.shape != image.shape[:2]:
            raise SourceError(
                "WSI918",
                f"{picture.name} is {image.shape[:2]} and its mask {inst.shape}; they must be the same",
            )
        if types is not None and self.classes:
            types = np.where((inst > 0) & (types == 0), IGNORE, np.where(inst > 0, types, 0)).astype(np.uint8)
            highest = int(types[types != IGNORE].max(initial=0))
            if highest > len(self.classes):
                raise SourceError(
                    "WSI918",
                    f"{mask.name} holds type {highest}; classes.toml names {len(self.classes)}: name it",
                )
        return Example(
            image,
            inst,
            types if self.classes else None,
            self._spacings[index],
            row.tissue,
            row.group,
            row.weight,
        )


def patch_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of masks (or labels) if `folder` has files of the same names in both."""
    inner = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    images, masks = inner.get("images"), inner.get("masks") or inner.get("labels")
    if images is None or masks is None:
        return None
    names = {p.stem for p in images.iterdir() if p.suffix.lower() in PICTURES}
    return (
        (images, masks)
        if any(p.stem in names and p.suffix.lower() in ENDINGS for p in masks.iterdir())
        else None
    )


def _classes(folder: Path, spacing_um: float | None) -> tuple[tuple[str, ...], float | None]:
    """Return class names and pixel size from ``classes.toml``. Raises UsageError WSI916."""
    path = folder / "classes.toml"
    table: Mapping[str, Any] = {}
    if path.is_file():
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError("WSI916", f"{path} is no TOML file: {error}") from error
    names, spacing = table.get("classes", []), table.get("spacing_um", spacing_um)
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) and n for n in names)
        or len(names) >= IGNORE
    ):
        raise UsageError(
            "WSI916", f'{path}: classes is {names!r}, wanted a list of names, type 1 first: ["A", "B"]'
        )
    if spacing is not None and (type(spacing) not in (int, float) or not 0.02 < spacing < 20):
        raise UsageError(
            "WSI916", f"{path}: spacing_um is {spacing!r}, wanted micrometres per pixel, such as 0.25"
        )
    return tuple(names), spacing


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return an image file as RGB, uint8 (H, W, 3). Raises SourceError WSI910."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode not in ("RGB", "RGBA", "P", "L"):
                raise SourceError("WSI910", f"{path.name} is {picture.mode}; training wants 8-bit RGB")
            return np.array(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError("WSI910", f"{path.name} cannot be read: {error}") from error


@final
class PatchWriter:
    """Writes a folder that `Patches` reads: PNG and ``.npz``, so that nothing is lost.

    `close` writes the tables last: a folder without ``classes.toml`` is not finished.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] = ()) -> None:
        self.folder, self.classes = folder, classes
        self._rows: dict[str, Sample] = {}
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def add(self, name: str, example: Example) -> None:
        """Write one image as `name`; a file of that name is replaced."""
        from PIL import Image

        Image.fromarray(example.image).save(self.folder / "images" / f"{name}.png")
        arrays = {"inst": example.inst}
        if example.types is not None and self.classes:
            arrays["types"] = example.types  # type: ignore[assignment]  # another integer type
        np.savez_compressed(self.folder / "masks" / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # arrays
        self._rows[f"{name}.png"] = Sample(example.tissue, example.group, example.weight, example.spacing_um)

    def close(self) -> None:
        """Write ``samples.csv`` and ``classes.toml``."""
        import json

        write_samples(self.folder, self._rows)
        # JSON's lists of texts are TOML's too
        text = f"classes = {json.dumps(list(self.classes), ensure_ascii=False)}\n"
        partial = self.folder / "classes.toml.partial"
        partial.write_text(text, "utf-8")
        partial.replace(self.folder / "classes.toml")


def write_patches(dataset: Dataset, folder: Path) -> None:
    """Write every image of a set into `folder`, as `Patches` reads it: slides cut once instead of at each epoch."""
    writer = PatchWriter(folder, dataset.classes)
    for index in range(len(dataset)):
        writer.add(f"{index:06d}", dataset.read(index))
    writer.close()
