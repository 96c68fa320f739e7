"""`labels.dcm`: labels as a DICOM Segmentation of the series that they were found in, through highdicom.

A segmentation belongs to a patient, a study and images, so it can be written for a DICOM input alone. highdicom
takes the whole label map; it is the one writer here that holds one byte (or two) for each voxel in memory. The
input's files are not opened here: `series_of` collects their headers wherever the input may be read.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.sources import Origin, borrowed
from wsitk.sources.base import Source, SourceRef
from wsitk.sources.dicom_header import read_header
from wsitk.writers.base import atomic_file
from wsitk.writers.labels import (
    Code,
    LabelClass,
    ReadLabels,
    check_classes,
    label_dtype,
    read_checked,
    slabs,
)

if TYPE_CHECKING:
    from wsitk.sources.dicom_series import DicomSeriesSource

__all__ = ["Maker", "Series", "kind_for", "series_of", "write_dicom_seg"]

_SLAB = 32
_STRUCTURE = Code("SCT", "123037004", "Anatomical Structure")
_PRIVATE = "99WSITK"  # a class that no code was given for; 99 marks private schemes (PS3.16, 8.2)
_FAMILY = ("123109", "DCM", "Artificial Intelligence")
_LONGEST_NAME = 64
_MOST_BINARY = 32

Kind = Literal["binary", "labelmap"]


@dataclass(frozen=True)
class Series:
    """What a segmentation takes from its series: shape (z, y, x), headers, and of one file the z of each frame."""

    name: str
    shape: tuple[int, ...]
    images: tuple[Any, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, source: DicomSeriesSource) -> Series:
        """Read the headers of an open series; pixels are left where they are."""
        import pydicom

        files = dict.fromkeys(s.store.path for s in source.slices)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the input's own offences against DICOM
            images = tuple(pydicom.dcmread(f, stop_before_pixels=True) for f in files)
        places = [0] * len(source.slices)
        for z, item in enumerate(source.slices):
            places[item.frame] = z
        return cls(source.name, source.shape, images, tuple(places) if len(images) == 1 else ())


def series_of(origin: Origin) -> Series | None:
    """Return the headers of an input that is a DICOM series, of the first where several are its channels; or None.

    To be called where the input can be read; what it returns can be pickled.
    """
    if not isinstance(origin, Source):
        if not _maybe_dicom(origin.path):
            return None
        origin = SourceRef(origin.path, {k: v for k, v in origin.options.items() if k in ("mpp", "name")})
    from wsitk.sources.dicom_series import DicomSeriesSource

    with borrowed(origin) as source:
        return Series.of(source) if isinstance(source, DicomSeriesSource) else None


def _maybe_dicom(path: str) -> bool:
    """Tell whether a path is a folder, or a DICOM file; what lies in memory is neither."""
    return os.path.isdir(path) or (os.path.isfile(path) and read_header(path) is not None)


def kind_for(classes: Sequence[LabelClass]) -> Kind:
    """Return ``binary``, which every viewer reads, for up to 32 classes, and ``labelmap`` for more.

    A bit for each voxel and class of a whole body with 104 structures is a gigabyte.
    """
    return "binary" if len(classes) <= _MOST_BINARY else "labelmap"


@dataclass(frozen=True, slots=True)
class Maker:
    """Who made the labels: the model, its version, and the version of wsitk."""

    model: str
    model_version: str
    software: str


def write_dicom_seg(
    path: str | Path,
    series: Series,
    classes: Sequence[LabelClass],
    read: ReadLabels,
    maker: Maker,
    *,
    kind: Kind = "binary",
    overwrite: bool = False,
) -> None:
    """Write the labels of `series` as DICOM SEG: a bit for each voxel and class, or a label map.

    Frames without a label are left out, each of the others refers to its slice. Classes with a `Code` are
    coded, others get a private one (scheme 99WSITK) with their name; segment k is the k-th class by value, and
    its tracking identifier names that value. Identifiers are made from the input's, the labels and the maker,
    dates are the series' own: the same labels give the same bytes. ``labelmap`` (Supplement 243) takes less
    room with many classes; fewer viewers read it.

    Raises OutputError: WSI510 to WSI513, WSI514 for classes that contradict each other, WSI530 where highdicom
    is missing, WSI531 where the headers of the series do not allow it or nothing was labelled.
    """
    ordered = check_classes(classes)
    try:
        import highdicom
    except ImportError as error:
        raise OutputError(
            "WSI530", "writing DICOM SEG needs highdicom: pip install 'wsitk[volumes]'"
        ) from error
    labels = _as_segments(series.shape, read, ordered)
    if not labels.any():
        raise OutputError("WSI531", f"{series.name}: nothing is labelled; a DICOM SEG cannot be empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the input's own offences against DICOM
            made = _build(highdicom, series, ordered, labels, maker, kind)
            with atomic_file(path, overwrite=overwrite) as stream:
                made.save_as(stream, enforce_file_format=True)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise OutputError(
            "WSI531",
            f"{series.name}: the series' headers do not allow a DICOM SEG: {error}; write NIfTI instead",
        ) from error


def _as_segments(
    shape: tuple[int, ...], read: ReadLabels, classes: Sequence[LabelClass]
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label map with segment numbers 1, 2, … for the values of the classes."""
    largest = classes[-1].value
    kind = label_dtype(len(classes))
    values = np.array([0, *(c.value for c in classes)])
    out = np.empty(shape, kind)
    for region in slabs(shape, _SLAB):
        labels = read_checked(read, region, largest)
        places = np.searchsorted(values, labels)
        if not np.array_equal(values[places], labels):
            unknown = np.setdiff1d(labels, values)[:5].tolist()
            raise OutputError("WSI513", f"labels at {region.start}: values {unknown} belong to no class")
        out[region.slices()] = places
    return out


def _build(
    hd: Any,
    series: Series,
    classes: Sequence[LabelClass],
    labels: NDArray[Any],
    maker: Maker,
    kind: str,
) -> Any:
    """Return the finished dataset."""
    first = series.images[0]
    if len({i.SeriesInstanceUID for i in series.images}) != 1:
        raise ValueError("slices of several series")
    pixels = labels[list(series.places)] if series.places else labels
    root = _digest(first.SeriesInstanceUID, labels, classes, maker, kind)
    made = hd.seg.Segmentation(
        source_images=series.images,
        pixel_array=pixels,
        segmentation_type=kind.upper(),
        segment_descriptions=[_segment(hd, k, c, maker, root) for k, c in enumerate(classes, 1)],
        series_instance_uid=_uid(root, "series"),
        series_number=int(first.get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=_uid(root, "instance"),
        instance_number=1,
        manufacturer="wsitk",
        manufacturer_model_name=maker.model[:_LONGEST_NAME],
        software_versions=maker.software,
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=maker.model[:_LONGEST_NAME],
        omit_empty_frames=True,
    )
    made.SeriesDescription = f"wsitk {maker.model}"[:_LONGEST_NAME]
    _fix_time_and_names(made, first, root)
    return made


def _segment(hd: Any, number: int, item: LabelClass, maker: Maker, root: str) -> Any:
    code = item.code or Code(_PRIVATE, _private_value(item.name), item.name[:_LONGEST_NAME])
    category = item.category or _STRUCTURE
    family = hd.sr.CodedConcept(*_FAMILY)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=item.name[:_LONGEST_NAME],
        segmented_property_category=hd.sr.CodedConcept(category.value, category.scheme, category.meaning),
        segmented_property_type=hd.sr.CodedConcept(code.value, code.scheme, code.meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=maker.model[:_LONGEST_NAME], version=maker.model_version[:_LONGEST_NAME], family=family
        ),
        tracking_id=f"label {item.value}",
        tracking_uid=_uid(root, f"segment {item.value}"),
        display_color=hd.color.CIELabColor.from_rgb(*item.color),
    )


def _private_value(name: str) -> str:
    """Return a code of 16 characters, the longest a code value may be, for a name."""
    return hashlib.sha256(name.encode()).hexdigest()[:16].upper()


def _digest(series: str, labels: NDArray[Any], classes: Sequence[LabelClass], maker: Maker, kind: str) -> str:
    """Return a hash of all that the bytes follow from."""
    digest = hashlib.sha256(repr((str(series), tuple(classes), maker, kind, labels.shape)).encode())
    for slice_ in labels:
        digest.update(np.ascontiguousarray(slice_).tobytes())
    return digest.hexdigest()


def _uid(root: str, purpose: str) -> str:
    """Return a UID under 2.25, the arc for UUIDs (PS3.5, B.2), the same in every run."""
    digest = hashlib.sha256(f"{root} {purpose}".encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def _fix_time_and_names(made: Any, first: Any, root: str) -> None:
    """Replace what highdicom takes from the clock or draws at random."""
    date = next((v for k in _DATES if (v := first.get(k))), "19700101")
    time = next((v for k in _TIMES if (v := first.get(k))), "000000")
    for keyword in ("ContentDate", "InstanceCreationDate", "SeriesDate"):
        setattr(made, keyword, date)
    for keyword in ("ContentTime", "InstanceCreationTime", "SeriesTime"):
        setattr(made, keyword, time)
    for item in made.get("ContributingEquipmentSequence", []):
        item.ContributionDateTime = date + time
    # an item without a code is an offence that some archives commit; it is not ours to pass on
    if any("CodeMeaning" not in item for item in made.get("ProcedureCodeSequence", [])):
        del made.ProcedureCodeSequence
    dimension = _uid(root, "dimensions")
    for item in made.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = dimension
    for item in made.DimensionIndexSequence:
        item.DimensionOrganizationUID = dimension


_DATES = ("SeriesDate", "AcquisitionDate", "ContentDate", "StudyDate")
_TIMES = ("SeriesTime", "AcquisitionTime", "ContentTime", "StudyTime")
