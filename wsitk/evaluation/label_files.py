"""Label images from files: instance `.npz`, HoVer-Net's `.mat`, PanNuke's `.npy`, TIFF, PNG and NIfTI.

Nothing is unpickled. Whether the values of a plain map are objects or classes is a matter of the task; files that
hold instances and types say it themselves.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, WsitkError
from wsitk.evaluation.labels import Labels

__all__ = ["LabelReader", "PANNUKE", "LARGEST"]

Array = NDArray[Any]

PANNUKE = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
"""Channels 0 to 4 of PanNuke's masks; the sixth is background."""

LARGEST = 1 << 28
"""Pixels of a label image that are held at once; beyond that, polygons are the way."""

_INSTANCES = ("inst", "inst_map", "instances", "instance_map", "labels", "label", "mask", "arr_0")
_KINDS = ("type", "types", "inst_type", "class_id", "classes")
_KIND_MAPS = ("type_map", "class_map", "sem", "semantic")
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    MemoryError,  # of a header that claims terabytes
)  # fmt: skip


@final
@dataclass(frozen=True)
class LabelReader:
    """Reads label images.

    Attributes
    ----------
    semantic : bool
        Whether the values of a plain map are classes, not objects.
    classes : number -> name
        Names of numbered classes; others are called ``class N``.
    """

    semantic: bool = False
    classes: Mapping[int, str] = field(default_factory=dict)

    def read(self, path: Path) -> Labels:
        """Return the label image in `path`, by the ending of its name.

        Raises SourceError: WSI821 if the file can't be read, WSI822 if it holds no label image, WSI834 if the
        image is too large to be held.
        """
        reader = _reader(path)
        try:
            labels = reader(self, path)
        except WsitkError:
            raise
        except _DAMAGE as error:
            said = str(error).split("\n")[0]
            raise SourceError("WSI821", f"{path}: can't be read ({said}); is the file whole?") from error
        if labels.layers[0].size > LARGEST:
            raise SourceError(
                "WSI834",
                f"{path}: {labels.shape} pixels; label images are held whole up to {LARGEST:,} pixels:"
                " give polygons (objects.parquet or GeoJSON), or cut the image",
            )
        return replace(labels, source=f"{path.name}: {labels.source}")

    def pannuke(self, masks: Array, index: int) -> Labels:
        """Return image `index` of PanNuke's masks (N, H, W, 6), each channel a map of instances."""
        channels = np.moveaxis(np.asarray(masks[index])[..., : len(PANNUKE)], -1, 0)
        layers = np.ascontiguousarray(channels.astype(np.int32))
        kinds = np.arange(len(PANNUKE))
        return Labels(layers, PANNUKE, kinds, layered=True, declared=True, source=f"image {index} of a fold")

    def _plain(self, values: Array, said: str, path: Path, **facts: Any) -> Labels:
        """Return a map of numbers as objects of one class, or as classes."""
        layer = _whole_numbers(values, path)
        if not self.semantic:
            kinds = np.full(int(layer.max(initial=0)) + 1, -1, np.int64)
            return Labels(layer[None], (), kinds, typed=False, source=f"{said}, instances", **facts)
        top = int(layer.max(initial=0))
        names, kinds = self._named(np.arange(1, top + 1), met=np.unique(layer))
        return Labels(
            layer[None],
            names,
            kinds,
            source=f"{said}, classes",
            areas=True,
            declared=bool(self.classes),
            **facts,
        )

    def _typed(self, values: Array, each: Array, said: str, path: Path) -> Labels:
        """Return instances whose label ``k`` (1, 2, ...) has the class number ``each[k - 1]``."""
        layer = _whole_numbers(values, path)
        if len(each) < int(layer.max(initial=0)):
            raise SourceError(
                "WSI822",
                f"{path}: {len(each)} types for labels up to {layer.max()}; give a type for each label",
            )
        names, kinds = self._named(each.astype(np.int64), met=each)
        return Labels(layer[None], names, kinds, source=said, declared=bool(self.classes))

    def _named(self, numbers: Array, *, met: Array) -> tuple[tuple[str, ...], Array]:
        """Return class names, and the class of label 0, 1, ... from the class numbers of labels 1, 2, ..."""
        known = sorted(self.classes) if self.classes else sorted({int(v) for v in met} - {0})
        names = tuple(self.classes.get(n, f"class {n}") for n in known)
        position = {number: index for index, number in enumerate(known)}
        values, inverse = np.unique(numbers, return_inverse=True)
        table = np.array([position.get(int(v), -1) for v in values], np.int64)
        return names, np.concatenate([[-1], table[inverse] if len(values) else []]).astype(np.int64)

    def _npz(self, path: Path) -> Labels:
        wanted = (*_INSTANCES, *_KINDS, *_KIND_MAPS)
        # opened here: NumPy leaves a file open that turns out to be no archive
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise SourceError("WSI821", f"{path}: no archive of arrays; is the file whole?")
            for member in stored.zip.infolist() if stored.zip else ():
                if member.file_size > 8 * LARGEST:  # before it is unpacked
                    raise SourceError("WSI834", f"{path}: {member.filename} has {member.file_size:,} bytes")
            arrays = {name: stored[name] for name in stored.files if name in wanted}
            return self._named_arrays(arrays, tuple(stored.files), path)

    def _mat(self, path: Path) -> Labels:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        try:
            with open(path, "rb") as file:
                arrays = {k: v for k, v in loadmat(file).items() if k[0] != "_"}
        except (MatReadError, TypeError) as error:  # scipy's reader trips over damage in both ways
            raise SourceError("WSI821", f"{path}: can't be read ({error}); is the file whole?") from error
        return self._named_arrays(arrays, tuple(arrays), path)

    def _named_arrays(self, arrays: Mapping[str, Array], held: tuple[str, ...], path: Path) -> Labels:
        """Return labels from named arrays: instances, and their types one by one or as a map."""
        instances = _first(arrays, _INSTANCES)
        if instances is None and self.semantic:
            instances = _first(arrays, _KIND_MAPS)
        if instances is None:
            raise SourceError(
                "WSI822",
                f"{path}: holds {sorted(held)}; wanted a label image called {' or '.join(_INSTANCES[:3])}",
            )
        kinds, kind_map = _first(arrays, _KINDS), _first(arrays, _KIND_MAPS)
        if kinds is not None and kinds.ndim == instances.ndim and kinds.shape == instances.shape:
            kinds, kind_map = None, kinds
        if kinds is not None:
            return self._typed(instances, np.ravel(kinds), "instances with types", path)
        if kind_map is not None and kind_map is not instances:
            return self._with_map(instances, kind_map, path)
        # a map that is called "instances" holds no classes, whatever the task
        reader = replace(self, semantic=self.semantic and _first(arrays, _INSTANCES[:4]) is None)
        return reader._plain(instances, "label map", path)

    def _with_map(self, instances: Array, kind_map: Array, path: Path) -> Labels:
        """Return instances, each of the class that most of its pixels have in `kind_map`."""
        if kind_map.shape != instances.shape:
            raise SourceError(
                "WSI822", f"{path}: instances {instances.shape} and types {kind_map.shape} differ in shape"
            )
        layer, kinds = _whole_numbers(instances, path), _whole_numbers(kind_map, path)
        return self._typed(layer, _majority(layer, kinds), "instances with a map of types", path)

    def _npy(self, path: Path) -> Labels:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
        if values.ndim == 3 and values.shape[2] in (2, 5):  # HoVer-Net: (RGB,) instances, types
            return self._with_map(np.asarray(values[..., -2]), np.asarray(values[..., -1]), path)
        return self._plain(np.asarray(values), "label map", path)

    def _tiff(self, path: Path) -> Labels:
        import tifffile

        return self._plain(tifffile.imread(path), "TIFF label map", path)

    def _png(self, path: Path) -> Labels:
        from PIL import Image

        with Image.open(path) as picture:
            values = np.asarray(picture)
        return self._plain(values, "PNG label map", path)

    def _nifti(self, path: Path) -> Labels:
        import nibabel
        from nibabel.filebasedimages import ImageFileError

        try:
            image: Any = nibabel.load(path)
            values = np.asanyarray(image.dataobj)
        except ImageFileError as error:
            raise SourceError("WSI821", f"{path}: can't be read ({error}); is the file whole?") from error
        spacing = tuple(float(v) for v in image.header.get_zooms()[: values.ndim])
        labels = self._plain(values, "NIfTI label map", path, spacing=spacing, unit="mm")
        return replace(labels, affine=tuple(np.asarray(image.affine, np.float64).ravel().tolist()))


_BY_ENDING: dict[str, Callable[[LabelReader, Path], Labels]] = {
    ".npz": LabelReader._npz,
    ".mat": LabelReader._mat,
    ".npy": LabelReader._npy,
    ".nii": LabelReader._nifti,
    ".nii.gz": LabelReader._nifti,
    ".tif": LabelReader._tiff,
    ".tiff": LabelReader._tiff,
    ".png": LabelReader._png,
}


def _reader(path: Path) -> Callable[[LabelReader, Path], Labels]:
    name = path.name.lower()
    for ending, reader in _BY_ENDING.items():
        if name.endswith(ending):
            return reader
    raise SourceError("WSI821", f"{path}: no label image by its name; wanted {', '.join(_BY_ENDING)}")


def _first(arrays: Mapping[str, Array], names: tuple[str, ...]) -> Array | None:
    return next((np.asarray(arrays[name]) for name in names if name in arrays), None)


def _whole_numbers(values: Array, path: Path) -> Array:
    """Return `values` as integers; refuses pictures, and numbers with a fraction."""
    values = np.asarray(values)
    if values.dtype == bool:
        return values.astype(np.int32)
    if values.ndim < 2 or (values.ndim == 3 and values.shape[2] in (3, 4) and values.dtype == np.uint8):
        raise SourceError(
            "WSI822",
            f"{path}: shape {values.shape} is no label image; wanted one whole number for each pixel",
        )
    if values.dtype.kind not in "iuf" or values.size == 0:
        raise SourceError("WSI822", f"{path}: {values.dtype} of {values.shape} is no label image")
    low, high = values.min(), values.max()
    # the limit is that of the table from labels to classes
    if not (np.isfinite([low, high]).all() and low >= 0 and high < 1 << 24):
        raise SourceError(
            "WSI822", f"{path}: values {low} to {high}; labels are whole numbers from 0 to 2^24"
        )
    whole = values.astype(np.int32)
    if values.dtype.kind == "f" and not np.array_equal(whole, values):
        raise SourceError("WSI822", f"{path}: values with fractions; labels are whole numbers from 0")
    return whole


def _majority(layer: Array, kinds: Array) -> Array:
    """Return, for labels 1, 2, ..., the class that most of their pixels have; the lower one of equals."""
    inside = layer > 0
    columns = int(kinds.max(initial=0)) + 1
    pair, count = np.unique(layer[inside].astype(np.int64) * columns + kinds[inside], return_counts=True)
    each = np.zeros(int(layer.max(initial=0)), np.int64)
    order = np.lexsort((-pair, count))  # the last written wins: most pixels, then the lower class
    each[pair[order] // columns - 1] = pair[order] % columns
    return each
