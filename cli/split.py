"""`wsitk split make|check`: sets that share no slide and no patient."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from wsitk.splits import Listing, Split, SplitReport

__all__ = ["app"]

app = typer.Typer(help="Make train and test sets that share nothing, and check them.", no_args_is_help=True)

SHOWN = 20
"""Findings of one kind that are printed; `--json` prints all."""

Group = Annotated[Literal["slide", "patient"], typer.Option(help="What must not be divided.")]
Column = Annotated[str | None, typer.Option(help="CSV column that names each file's group.")]
Pattern = Annotated[
    str | None, typer.Option(help="Regular expression that finds the group in a path: its first group.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


@app.command("make")
def make(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|LIST", help="A folder, a CSV or a text file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV to write: path, group, part.")],
    group: Group = "slide",
    parts: Annotated[str, typer.Option(help="Names and shares.")] = "train=.7,val=.15,test=.15",
    stratify: Annotated[str | None, typer.Option(help="CSV column to spread evenly.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    group_column: Column = None,
    group_pattern: Pattern = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the CSV.")] = False,
    as_json: Json = False,
) -> None:
    """Divide files into parts by whole slides or patients, each stratum as evenly as that allows."""
    from wsitk.splits import group_names, make_split, parse_parts, read_listing, write_split

    listing = read_listing(source)
    if group_column is not None:
        groups, rules = list(listing.column(group_column)), {f"column {group_column}": len(listing.names)}
    else:
        groups, rules = group_names(listing.names, group, group_pattern)
    strata = listing.column(stratify) if stratify is not None else None
    split = make_split(groups, parse_parts(parts), strata, seed)
    write_split(out, listing, groups, split, overwrite=overwrite)
    facts = {"items": split.items, "groups": split.groups, "strata": split.strata, "wanted": split.wanted}
    if as_json:
        typer.echo(json.dumps({"out": str(out), **facts, "rules": rules, "seed": seed}))
        return
    for line in _achieved(split, group, rules):
        typer.echo(line)
    typer.echo(f"Written to {out}")


def _achieved(split: Split, unit: str, rules: Mapping[str, int]) -> list[str]:
    """Return what a split came to: sizes, shares, strata, and how groups were found."""
    total = sum(split.items.values())
    lines = [f"{total:,} files of {sum(split.groups.values()):,} groups ({unit}); found by {_said(rules)}"]
    for part, count in split.items.items():
        line = f"  {part:<8} {count:>8,} files, {split.groups[part]:>6,} groups, {count / total:6.1%}"
        strata = split.strata.get(part, {})
        spread = ", ".join(f"{name} {n / max(1, count):.1%}" for name, n in strata.items())
        lines.append(f"{line} (wanted {split.wanted[part]:.1%}){': ' + spread if spread else ''}")
    empty = [f"{name} in {part}" for part, each in split.strata.items() for name, n in each.items() if not n]
    if empty:
        lines.append(f"  missing, since groups are not divided: {', '.join(empty)}")
    return lines


def _said(rules: Mapping[str, int]) -> str:
    return ", ".join(f"{rule} ({count:,})" for rule, count in rules.items())


@app.command("check")
def check(
    lists: Annotated[
        list[Path],
        typer.Argument(metavar="SPLIT.csv | TRAIN TEST...", help="A CSV with parts, or a list each."),
    ],
    group: Group = "slide",
    group_column: Column = None,
    group_pattern: Pattern = None,
    names_only: Annotated[bool, typer.Option("--names-only", help="Don't open the files.")] = False,
    distance: Annotated[int, typer.Option(min=0, max=15, help="Differing bits of 63 in one picture.")] = 6,
    as_json: Json = False,
) -> None:
    """Exit with 1 if parts share a slide or patient, a file, a picture, or pixels of a slide; a line for each."""
    from wsitk.splits import read_parts

    parts = read_parts(lists)
    report = _examined(parts, group, group_column, group_pattern, not names_only, distance)
    if as_json:
        for leak in report.leaks:
            typer.echo(json.dumps(leak.facts()))
        found = Counter(leak.code for leak in report.leaks)
        typer.echo(json.dumps({"leaks": found, "notes": report.notes, "rules": report.rules}))
    else:
        _print(report, parts)
    raise typer.Exit(int(bool(report.leaks)))


def _examined(
    parts: Mapping[str, Listing],
    unit: Literal["slide", "patient"],
    column: str | None,
    pattern: str | None,
    contents: bool,
    distance: int,
) -> SplitReport:
    from dataclasses import replace

    from wsitk.splits import examine_split, group_names, shared_groups

    files = {part: [str(file) for file in listing.files] for part, listing in parts.items()}
    groups: dict[str, Sequence[str]] | None = None
    if column is not None:
        groups = {part: listing.column(column) for part, listing in parts.items()}
    elif pattern is not None:
        groups = {part: group_names(listing.names, unit, pattern)[0] for part, listing in parts.items()}
    boxes = {part: _boxes(listing) for part, listing in parts.items()}
    report = examine_split(
        files, group=unit, groups=groups, boxes=boxes, contents=contents, distance=distance
    )
    if groups is None and all("group" in listing.columns for listing in parts.values()):
        # A list that names its groups must keep to them, and its files' names have their say beside that.
        told = (
            (p, f, g) for p, one in parts.items() for f, g in zip(files[p], one.column("group"), strict=True)
        )
        known = {frozenset(leak.members.items()) for leak in report.leaks}
        more = [leak for leak in shared_groups(told, "group") if frozenset(leak.members.items()) not in known]
        report = replace(report, leaks=(*more, *report.leaks))
    return report


def _boxes(listing: Listing) -> list[tuple[int, int, int, int] | None]:
    """Return tiles' places from the columns x, y, width, height; None for each without them."""
    from wsitk.errors import UsageError

    names = ("x", "y", "width", "height")
    if not all(name in listing.columns for name in names):
        return [None] * len(listing.names)
    try:
        rows = zip(*(listing.columns[name] for name in names), strict=True)
        return [(int(x), int(y), int(w), int(h)) for x, y, w, h in rows]
    except ValueError as error:
        raise UsageError("WSI935", f"{listing.source}: x, y, width and height: {error}; mend it") from error


def _print(report: SplitReport, parts: Mapping[str, Listing]) -> None:
    sizes = ", ".join(f"{part} {len(listing.names):,}" for part, listing in parts.items())
    typer.echo(f"{sizes} files; groups found by {_said(report.rules)}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    shown: Counter[str] = Counter()
    for leak in report.leaks:
        shown[leak.code] += 1
        if shown[leak.code] <= SHOWN:
            typer.echo(leak.line())
    for code, count in shown.items():
        if count > SHOWN:
            typer.echo(f"{code} and {count - SHOWN:,} more; --json prints all")
    typer.echo(f"{len(report.leaks):,} leaks" if report.leaks else "Nothing shared was found")
