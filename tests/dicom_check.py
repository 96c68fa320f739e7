"""What dciodvfy has against a DICOM file, less what it may say of ours, and why."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PERMITTED = {
    "binary": {
        "Unrecognized defined term = <99WSITK>": "a class without a public code has one of ours: PS3.16, 8.2 "
        "leaves schemes that begin with 99 to everyone",
        "Missing attribute or value that would be needed to build DICOMDIR": "left empty in the input",
    },
    "labelmap": {
        "Information Object Not found": "Label Map Segmentation came with Supplement 243 (2024), after it",
        "SegmentNumber not monotonically increasing from one by one - have SegmentSequence item number 1 (from "
        "one) with SegmentNumber of 0": "in a label map the background is segment 0 (PS3.3, C.8.20.2)",
    },
}
"""By kind of segmentation: words of what it may say -> the reason."""


def complaints(path: Path, kind: str = "binary") -> list[str]:
    """Return its errors and warnings that are not permitted; skip the test where it is not installed."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("needs dciodvfy (Debian: dicom3tools)")
    done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).splitlines()
    known = "Segmentation" if kind == "binary" else "Information Object Not found"
    assert any(known in line for line in said), said
    lines = [line for line in said if line.startswith(("Error", "Warning"))]
    return [line for line in lines if not any(words in line for words in PERMITTED[kind])]
