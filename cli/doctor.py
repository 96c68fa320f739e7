"""`wsitk doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import json
import platform
import shutil
from typing import Annotated, Any

import typer

__all__ = ["doctor"]


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check Python, torch, devices, readers and disk; exits 3 if something that is needed does not work."""
    facts, problems = _facts()
    if as_json:
        typer.echo(json.dumps({**facts, "problems": problems}))
    else:
        for key, value in facts.items():
            typer.echo(f"{key:<18} {value}")
        for problem in problems:
            typer.echo(f"PROBLEM            {problem}")
        if not problems:
            typer.echo("all well")
    raise typer.Exit(3 if problems else 0)


def _facts() -> tuple[dict[str, Any], list[str]]:
    from wsitk.record import versions
    from wsitk.settings import available_cpus, home

    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    facts |= versions()
    facts["cpus available"] = available_cpus()
    facts["weights folder"] = str(home())
    facts["disk free here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    problems: list[str] = []
    for name, look in (("torch", _torch), ("openslide", _openslide), ("default model", _model)):
        try:
            facts |= look()
        except Exception as error:  # whatever a broken installation throws is the finding
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return facts, problems


def _torch() -> dict[str, Any]:
    import torch

    from wsitk.torchvision_guard import ensure_torchvision

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cuda devices": ", ".join(cuda) or "none: the network runs on the CPU",
        "torchvision ops": ensure_torchvision(),
    }


def _openslide() -> dict[str, Any]:
    import openslide

    return {"openslide library": openslide.__library_version__}


def _model() -> dict[str, Any]:
    from wsitk.registry import load_model

    spec = load_model("cellvit").spec
    return {"default model": f"{spec.name} {spec.version}, sha256 {spec.weights_sha256[:12]}"}
