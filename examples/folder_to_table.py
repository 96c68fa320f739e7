# /// script
# requires-python = ">=3.11"
# dependencies = ["wsitk", "pandas"]
# ///
"""A folder of slides in, one table out: nuclei per mm² of tissue, and what failed and why.

python examples/folder_to_table.py                    on two small slides and a broken one, made here
python examples/folder_to_table.py slides/ results/   on yours
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd


def make_slides(folder: Path) -> None:
    """Write two tiled TIFFs that state their pixel size, and one that is cut short."""
    import tifffile

    from wsitk.testing import SyntheticSlide

    per_cm = 1e4 / 0.25
    for name, count in (("sparse.tiff", 20), ("dense.tiff", 120)):
        pixels = np.full((1024, 1024, 3), 245, np.uint8)  # glass
        tissue = SyntheticSlide.make((768, 768), count=count, radius=(10.0, 18.0), seed=count)
        pixels[128:896, 128:896] = tissue.pixels
        tifffile.imwrite(
            folder / name,
            pixels,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
        )
    whole = (folder / "dense.tiff").read_bytes()
    (folder / "broken.tiff").write_bytes(whole[: len(whole) // 2])


def table(slides: Path, out: Path) -> pd.DataFrame:
    """Run the shipped model over a folder and return `summary.csv` with a density column."""
    # The command line goes through everything and exits with 1 if something failed; that is in the table.
    command = [
        sys.executable,
        "-m",
        "wsitk.cli.main",
        "run",
        "cellvit",
        str(slides),
        "-o",
        str(out),
        "--no-maps",
    ]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):
        raise SystemExit(code)
    summary = pd.read_csv(out / "summary.csv")
    objects = summary.filter(like="objects_").sum(axis=1)
    return summary.assign(objects=objects, per_mm2=(objects / summary["tissue_mm2"]).round())


def main() -> None:
    if sys.argv[1:]:
        rows = table(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            slides = Path(folder, "slides")
            slides.mkdir()
            make_slides(slides)
            rows = table(slides, Path(folder, "results"))
    print(
        rows[["input", "status", "code", "spacing_um", "tissue_mm2", "objects", "per_mm2"]].to_string(
            index=False
        )
    )
    for row in rows[rows["status"] != "done"].itertuples():
        print(f"{row.input}: {row.code} {row.message}")


if __name__ == "__main__":
    main()
