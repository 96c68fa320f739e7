"""`wsitk models convert`: weights out of any container, as safetensors, without running anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]


def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint: .pt, .pth, .model, .ckpt, .safetensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The safetensors file to write.")],
    key: Annotated[
        str | None, typer.Option("--key", help="Where the weights lie, for files with several sets.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Take the weights out of a checkpoint and write them as safetensors; nothing in the file is run."""
    from wsitk.torchfile import read_tensors, write_safetensors

    weights = read_tensors(file, key)
    write_safetensors(weights, out, overwrite=overwrite)
    where = f" of {weights.key!r}" if weights.key else ""
    size = sum(tensor.nbytes for tensor in weights.tensors.values())
    typer.echo(
        f"{out}: {len(weights.tensors)} tensors{where}, {size:,} bytes, from a {weights.container} file"
    )
