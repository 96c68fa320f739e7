"""Sound files to be damaged: slides from `fuzzing`, images, volumes, drawings, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from fuzzing import CM, KINDS, _write
from PIL import Image
from volume_data import noise, oblique, save_nifti

from wsitk.testing import SyntheticSlide

__all__ = ["BASES", "SQUARE"]

SQUARE = [[10, 10], [200, 10], [200, 200], [10, 200], [10, 10]]


def _slide(name: str, options: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: _write(path, SyntheticSlide.make((512, 640), count=120, seed=3).pixels, **options)


def _tiff(pixels: np.ndarray[Any, Any], **options: Any) -> Callable[[Path], object]:
    options = {"tile": (64, 64), "metadata": None, **CM, **options}
    return lambda path: tifffile.imwrite(path, pixels, **options)


def _image(**options: Any) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(SyntheticSlide.make((96, 128), count=8, seed=1).pixels).save(
        path, **options
    )


def _nrrd(path: Path) -> None:
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nspace: left-posterior-superior\n"
    header += (
        "space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\nendian: little\nencoding: raw\n\n"
    )
    path.write_bytes(header.encode() + noise(4, 5, 6).astype("<i2").tobytes())


def _regions(path: Path) -> None:
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [SQUARE]},
        "properties": {"classification": {"name": "Fold", "color": [1, 2, 3]}},
    }
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def _checkpoint(path: Path) -> None:
    import torch

    torch.save({"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}, path)


def _safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.arange(12, dtype=np.float32).reshape(3, 4)}, path)


def _jp2(path: Path) -> None:
    path.write_bytes(imagecodecs.jpeg2k_encode(SyntheticSlide.make((96, 128), count=8, seed=1).pixels))


_RGB = SyntheticSlide.make((128, 192), count=10, seed=2).pixels
_GREY = np.ascontiguousarray(_RGB[..., 0])

BASES: dict[str, Callable[[Path], object]] = {
    **{name: _slide(name, options) for name, options in KINDS.items()},
    "bare.tiff": _tiff(_RGB, resolution=None, resolutionunit=None, photometric="rgb"),
    "grey.tiff": _tiff(_GREY),
    "deep.tiff": _tiff(_RGB.astype(np.uint16) * 257, photometric="rgb"),
    "float.tiff": _tiff(_GREY.astype(np.float32)),
    "planar.tiff": _tiff(np.moveaxis(_RGB, -1, 0).copy(), photometric="rgb", planarconfig="separate"),
    "alpha.tiff": _tiff(np.dstack([_RGB, _GREY]), photometric="rgb", extrasamples=["unassalpha"]),
    "palette.tiff": _tiff(_GREY, photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
    "white.tiff": _tiff(_GREY, photometric="miniswhite"),
    "cmyk.tiff": _tiff(np.dstack([_RGB, _GREY]), photometric="separated"),
    "bits.tiff": _tiff((_GREY > 128), photometric="minisblack"),
    "strips.tiff": _tiff(_RGB, tile=None, photometric="rgb"),
    "image.png": _image(),
    "image.jpg": _image(quality=90),
    "image.jp2": _jp2,
    "volume.nii": lambda path: save_nifti(path, noise(8, 9, 10), oblique()),
    "volume.nii.gz": lambda path: save_nifti(path, noise(8, 9, 10), oblique()),
    "volume.nrrd": _nrrd,
    "regions.geojson": _regions,
    "weights.pth": _checkpoint,
    "weights.safetensors": _safetensors,
}
"""How to write each sound file, by its name."""
