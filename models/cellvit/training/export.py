"""What a training leaves to its user: a folder with weights and a card, which `wsitk run` takes as a model."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsitk.card import write_card
from wsitk.errors import UsageError
from wsitk.models.cellvit.checkpoint import object_classes, save_upstream_checkpoint
from wsitk.models.cellvit.training import build
from wsitk.models.cellvit.training.config import TrainConfig
from wsitk.training.state import write_tensors
from wsitk.writers.base import sha256_file

__all__ = ["WEIGHTS", "write_folder", "write_upstream"]

WEIGHTS = "model.safetensors"

PAPER = "Hörst et al. 2024, CellViT, Medical Image Analysis 94, 103143"

USE = "Research use only: not a medical device, not validated for any diagnosis."


def write_folder(
    folder: Path,
    network: nn.Module,
    description: Mapping[str, Any],
    types: Sequence[str],
    config: TrainConfig,
    facts: Mapping[str, Any],
    data: tuple[str, int],
) -> None:
    """Write ``model.safetensors`` and ``card.toml``; `data` are the training set's name and number of images.

    `facts` are the trainer's. Raises OutputError as `write_tensors` and `write_card` do.
    """
    weights = folder / WEIGHTS
    write_tensors(weights, network.state_dict(), {"format": "pt"})
    mean, std = build.normalisation(config.network)
    card: dict[str, Any] = {
        "name": config.card.name,
        "version": config.card.version,
        "summary": config.card.summary,
        "paper": PAPER,
        "spacing_um": config.data.spacing_um,
        "classes": [{"name": c.name, "color": list(c.color)} for c in _classes(types)],
        "weights": WEIGHTS,
        "sha256": sha256_file(weights),
        "size_bytes": weights.stat().st_size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "licence": config.card.licence,
        "data_licence": config.card.data_licence,
        "use": USE,
        "network": dict(description),
        "normalisation": {"scale": 255, "mean": list(mean), "std": list(std)},
        "training": _training(config, facts, network),
        "known_failures": {
            "not_examined": "nobody has looked yet; compare with labels of your own before use"
        },
        "training_data": [
            {
                "name": data[0],
                "labels": config.card.labels,
                "licence": config.card.data_licence,
                "images": data[1],
            }
        ],
    }
    if config.postprocessing:
        card["postprocessing"] = dict(config.postprocessing)
    if facts["held_out"]:
        said = (
            "panoptic quality at the network's spacing on the held-out images; pooled, bpq: mean over images"
        )
        card["measured"] = {
            "definition": said,
            "held_out": {k: round(v, 4) for k, v in facts["held_out"].items()},
        }
    if config.network.start:
        card["started_from"] = [{"name": Path(config.network.start).name, "licence": "see its origin"}]
    write_card(folder / "card.toml", card, overwrite=True)


def _classes(types: Sequence[str]) -> Sequence[Any]:
    names = list(types) or ["Nucleus"]
    return object_classes(dict(enumerate(names, 1)), len(names) + 1)


def _training(config: TrainConfig, facts: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """Return the card's account of time and energy: an estimate, and how it was made."""
    device = next(network.parameters()).device
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    hours = facts["minutes"] / 60
    return {
        "hours": round(hours, 3),
        "hardware": f"{machine}; {platform.machine()}",
        "energy_kwh": round(hours * config.card.watts / 1000, 4),
        "energy_from": f"estimated: hours x {config.card.watts:g} W (card.watts)",
        "seed": config.fit.seed,
        "steps": facts["steps"],
        "config": "config.toml",
        "command": " ".join(["wsitk", *sys.argv[1:]]),
    }


def write_upstream(
    path: Path, network: nn.Module, types: Sequence[str], config: TrainConfig, *, overwrite: bool = False
) -> None:
    """Write a checkpoint in upstream's container. Raises UsageError WSI873, ModelError WSI315, WSI316."""
    magnification = {0.25: 40, 0.5: 20}.get(config.data.spacing_um)
    if magnification is None:
        raise UsageError(
            "WSI873",
            f"upstream's files know 0.25 and 0.5 µm/px, not {config.data.spacing_um}; leave --upstream out",
        )
    mean, std = build.normalisation(config.network)
    save_upstream_checkpoint(
        path,
        network,
        classes=_classes(types),
        mean=mean,
        std=std,
        magnification=magnification,
        mixed_precision=config.fit.precision != "float32",
        overwrite=overwrite,
    )
