"""A plate with known numbers of bright discs in its wells, and a model that counts them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.grid import Tile
from wsitk.model import ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.objects import ObjectTable

CHANNELS = ("DAPI", "HSP70", "GFP")
SPACING_UM = 0.5
EDGE = 96
RADII = (3, 5)
LOW, HIGH = 500, 9000


def well_name(number: int, columns: int = 12) -> str:
    """Return A01, A02 and so on, row by row."""
    return f"{chr(ord('A') + number // columns)}{number % columns + 1:02d}"


def disc(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(y * y + x * x <= radius * radius)


def field(count: int, brightness: int = HIGH, size: int = EDGE) -> NDArray[np.uint16]:
    """Return (3, size, size): a ramp, `count` discs of two sizes in turn, and noise that no model may see."""
    rng = np.random.default_rng(count)
    image = rng.integers(0, 60_000, (3, size, size)).astype(np.uint16)
    image[0] = np.linspace(0, LOW, size, dtype=np.uint16)
    image[1] = LOW
    places = [(y, x) for y in range(8, size - 8, 16) for x in range(8, size - 8, 16)]
    for k in range(count):
        y, x = places[k]
        radius = RADII[k % 2]
        box = image[1, y - radius : y + radius + 1, x - radius : x + radius + 1]
        box[disc(radius)] = brightness
    return image


def area_um2(k: int) -> float:
    """Return the area of the k-th disc."""
    return float(disc(RADII[k % 2]).sum()) * SPACING_UM**2


def plate_xml(wells: Mapping[str, int], channels: tuple[str, ...] = CHANNELS, size: int = EDGE) -> str:
    """Return OME-XML of a Plate whose wells have so many fields each, stored one after the other."""
    images, layout = [], []
    number = 0
    for well, fields in wells.items():
        samples = []
        for index in range(fields):
            names = "".join(
                f'<Channel ID="Channel:{number}:{c}" SamplesPerPixel="1" Name="{name}"/>'
                for c, name in enumerate(channels)
            )
            images.append(
                f'<Image ID="Image:{number}" Name="field {number}"><Pixels ID="Pixels:{number}" '
                f'DimensionOrder="XYCZT" Type="uint16" SizeX="{size}" SizeY="{size}" SizeC="{len(channels)}" '
                f'SizeZ="1" SizeT="1" PhysicalSizeX="{SPACING_UM}" PhysicalSizeY="{SPACING_UM}">{names}'
                f'<TiffData IFD="{number * len(channels)}" PlaneCount="{len(channels)}"/></Pixels></Image>'
            )
            samples.append(
                f'<WellSample ID="WS:{number}" Index="{index}"><ImageRef ID="Image:{number}"/></WellSample>'
            )
            number += 1
        row, column = ord(well[0]) - ord("A"), int(well[1:]) - 1
        layout.append(f'<Well ID="W:{well}" Row="{row}" Column="{column}">{"".join(samples)}</Well>')
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Plate ID="Plate:0" Name="dose">{"".join(layout)}</Plate>{"".join(images)}</OME>'
    )


def write_plate(path: Path, images: list[NDArray[Any]], description: str, **options: Any) -> Path:
    """Write (C, H, W) images one after the other, a page for each channel."""
    with tifffile.TiffWriter(path) as writer:
        for number, image in enumerate(images):
            for channel, plane in enumerate(image):
                first = number == channel == 0
                text = description.encode() if first else None
                writer.write(
                    plane,
                    description=text,
                    metadata=None,
                    photometric="minisblack",
                    contiguous=False,
                    **options,
                )
    return path


class DiscModel(TileModel):
    """Finds what is brighter than a threshold in its first channel, and measures both of its channels."""

    def __init__(self, channels: int = 2, names: tuple[str, ...] = ()) -> None:
        self.spec = ModelSpec(
            name="discs",
            version="1",
            spacing=None,
            tile=(128, 128),
            halo=(16, 16),
            align=(16, 16),
            channels=channels,
            channel_names=names,
            dtype="uint16",
            objects=True,
            classes=(ObjectClass("disc", (255, 0, 0)),),
            object_columns=("intensity_HSP70", "existence"),
        )
        self._network = torch.nn.Identity()

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image": batch.float()}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        image = outputs["image"][0]
        labels, count = ndimage.label(image > 2 * LOW)
        every = range(1, count + 1)
        means = np.asarray([image[labels == k].mean() for k in every], np.float32)
        columns = {
            "intensity_HSP70": means,
            # small discs are seen by half of the samples
            "existence": np.asarray([1.0 if (labels == k).sum() > 50 else 0.5 for k in every], np.float32),
        }
        objects = ObjectTable.from_labels(labels, origin=tile.read.start, columns=columns)
        return TileResult(objects)


def discs() -> DiscModel:
    return DiscModel()


def wanting() -> DiscModel:
    return DiscModel(names=("HSP70", "DAPI"))
