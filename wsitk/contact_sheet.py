"""`index.html`: every input with its picture, how it ended, and links to its files. No scripts, no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

from wsitk.journal import write_durably
from wsitk.record import NOTICE, InputRow

__all__ = ["write_contact_sheet"]

FILES = (
    "preview.png",
    "objects.geojson.gz",
    "objects.parquet",
    "maps.ome.zarr",
    "restored.ome.zarr",
    "restored.ome.tiff",
    "restored_regions.parquet",
    "restored_regions.geojson.gz",
    "tiles.parquet",
    "provenance.json",
)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>wsitk: {title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self'; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }}
main {{ display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1.5rem }}
article {{ border: 1px solid #ddd; border-radius: 8px; padding: 1rem; overflow-wrap: anywhere }}
article.failed, article.gaps {{ border-color: #c0504d; background: #fdf6f5 }}
img {{ width: 100%; border-radius: 4px }} h2 {{ font-size: 1rem; margin: 0 0 .5rem }} p {{ margin: .3rem 0 }}
small {{ color: #666 }}
</style></head><body><h1>{title}</h1><p>{totals}</p><main>
{cards}
</main><p><small>{notice}</small></p></body></html>
"""


def write_contact_sheet(out: Path, rows: Iterable[InputRow]) -> None:
    """Write `index.html` into the output folder `out`."""
    ordered = sorted(rows, key=lambda row: row.input)
    done = sum(row.status == "done" for row in ordered)
    objects = sum(sum(row.objects.values()) for row in ordered)
    totals = f"{done} of {len(ordered)} inputs done, {objects:,} objects"
    page = PAGE.format(
        title=escape(out.resolve().name),
        totals=totals,
        cards="\n".join(_card(out, row) for row in ordered),
        notice=escape(NOTICE),
    )
    write_durably(out / "index.html", page.encode())


def _card(out: Path, row: InputRow) -> str:
    base = quote(row.input)
    lines = [f'<article class="{escape(row.status)}"><h2>{escape(row.input)}</h2>']
    lines += [
        f'<a href="{base}/{picture}"><img src="{base}/{picture}" alt="" loading="lazy"></a>'
        for picture in ("preview.png", "before_after.png")
        if row.status != "failed" and (out / row.input / picture).is_file()
    ]
    lines.append(f"<p><b>{escape(row.status)}</b> {escape(row.code)} {escape(row.message)}</p>")
    if row.tissue_mm2 is not None:
        counts = ", ".join(f"{count:,} {escape(name)}" for name, count in row.objects.items())
        lines.append(f"<p>{row.tissue_mm2:.1f} mm² of tissue at {row.spacing_um:.4f} µm; {counts}</p>")
    present = [name for name in FILES if row.status != "failed" and (out / row.input / name).exists()]
    links = " · ".join(f'<a href="{base}/{name}">{name}</a>' for name in present)
    return "\n".join([*lines, f"<p><small>{links}</small></p></article>"])
