"""Small volumes with known voxels on oblique grids, and the files that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from wsitk.frame import Frame
from wsitk.geometry import Region

Array = NDArray[Any]
SERIES = "1.2.826.0.1.3680043.8.498.1"


def noise(*shape: int, low: int = -1000, high: int = 2000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


def turn(x: float, y: float, z: float) -> Array:
    """Return a rotation by Euler angles in degrees."""
    a, b, c = np.deg2rad([x, y, z])
    first = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    second = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    third = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return first @ second @ third


def oblique(spacing: tuple[float, float, float] = (5.0, 0.8, 0.7), flip: bool = False) -> Frame:
    """Return an oblique, anisotropic frame; left-handed in x, y, z with `flip`."""
    directions = turn(20, -35, 50)[:, ::-1].copy()
    if flip:
        directions[:, 0] *= -1
    return Frame.from_axes((-120.5, 33.25, 812.125), directions, spacing)


def save_nifti(path: Path, volume: Array, frame: Frame | None = None, **fields: Any) -> Path:
    """Save (z, y, x) or (z, y, x, c) with nibabel."""
    order = (2, 1, 0, 3)[: volume.ndim]
    image = nibabel.Nifti1Image(volume.transpose(order), (frame or oblique()).to_nifti_affine())
    for key, value in fields.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def patch(path: Path, offset: int, data: bytes) -> Path:
    """Overwrite bytes of a file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


def ct_slice(pixels: Array, frame: Frame, z: int, number: int, **fields: Any) -> Dataset:
    """Return one CT slice as a dataset: stored = HU + 1024 in unsigned 12 of 16 bits."""
    place = frame.to_dicom()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"{SERIES}.{number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = Dataset()
    item.file_meta = meta
    item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    item.PatientName, item.PatientID, item.PatientBirthDate, item.PatientSex = "A^B", "1", "19700101", "O"
    item.StudyInstanceUID, item.SeriesInstanceUID = f"{SERIES}.0.1", f"{SERIES}.0.2"
    item.FrameOfReferenceUID = f"{SERIES}.0.3"
    item.StudyDate = item.SeriesDate = item.ContentDate = item.AcquisitionDate = "20200102"
    item.StudyTime = item.SeriesTime = item.ContentTime = item.AcquisitionTime = "101112"
    item.StudyID, item.SeriesNumber, item.InstanceNumber, item.AccessionNumber = "1", 3, number, "7"
    item.ReferringPhysicianName, item.Modality, item.Manufacturer = "C^D", "CT", "nobody"
    item.PatientOrientation, item.PositionReferenceIndicator = "", ""
    item.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    # DS holds 16 characters
    item.ImagePositionPatient = [f"{v:.9f}"[:16] for v in frame.to_world((z, 0, 0))]
    item.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in place.orientation]
    item.PixelSpacing = [repr(round(v, 9)) for v in place.pixel_spacing]
    item.SliceThickness = repr(place.slice_spacing)
    item.Rows, item.Columns = pixels.shape
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 12, 11, 0
    item.RescaleSlope, item.RescaleIntercept = 1, -1024
    item.PixelData = (pixels.astype(np.int32) + 1024).astype("<u2").tobytes()
    for key, value in fields.items():
        setattr(item, key, value)
    return item


def save_series(
    folder: Path,
    volume: Array,
    frame: Frame,
    change: Callable[[Dataset, int], None] | None = None,
    skip: tuple[int, ...] = (),
) -> Path:
    """Save a CT series whose instance numbers and file names contradict the order in space."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = len(volume)
    for z in range(depth):
        if z in skip:
            continue
        number = 1 + (z * 7) % depth if depth % 7 else depth - z
        item = ct_slice(volume[z], frame, z, number)
        if change:
            change(item, z)
        item.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return folder


def multiframe(volume: Array, frame: Frame, order: list[int]) -> Dataset:
    """Return an enhanced CT whose frames come in `order`, with a slope of their own each."""
    item = ct_slice(volume[0], frame, 0, 1)
    item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for key in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(item, key)
    shared, frames = Dataset(), []
    first = ct_slice(volume[0], frame, 0, 1)
    shared.PlaneOrientationSequence = [_only(ImageOrientationPatient=first.ImageOrientationPatient)]
    shared.PixelMeasuresSequence = [
        _only(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
    ]
    for z in order:
        group = Dataset()
        place = ct_slice(volume[z], frame, z, 1).ImagePositionPatient
        group.PlanePositionSequence = [_only(ImagePositionPatient=place)]
        group.PixelValueTransformationSequence = [
            _only(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
        ]
        frames.append(group)
    item.SharedFunctionalGroupsSequence = [shared]
    item.PerFrameFunctionalGroupsSequence = frames
    item.NumberOfFrames = len(order)
    item.PixelData = (volume[order].astype(np.int32) + 1024).astype("<u2").tobytes()
    return item


def _only(**fields: Any) -> Dataset:
    item = Dataset()
    for key, value in fields.items():
        setattr(item, key, value)
    return item


def fresh_uid() -> str:
    return str(generate_uid())


def whole(source: Any) -> Array:
    return np.asarray(source.read_inside(Region((0,) * source.ndim, source.shape), 0).pixels)
