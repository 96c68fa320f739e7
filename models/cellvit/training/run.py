"""From folders of images and a configuration to a trained model: what `wsitk train cellvit` does."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from wsitk.device import autocast
from wsitk.errors import UsageError
from wsitk.journal import write_durably
from wsitk.models.cellvit.training.config import TrainConfig
from wsitk.models.cellvit.training.data import Dataset, Joined, Subset
from wsitk.models.cellvit.training.datasets import open_dataset
from wsitk.models.cellvit.training.export import write_upstream
from wsitk.models.cellvit.training.task import CellViTTask
from wsitk.training import processes
from wsitk.training.config import to_toml
from wsitk.training.fit import Outcome, fit

__all__ = ["Prepared", "prepare", "train"]

Event = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Prepared:
    """A task and its data, ready to be trained; `warnings` are for people, one line each."""

    config: TrainConfig
    task: CellViTTask
    training: Dataset
    held_out: Dataset
    cells: NDArray[np.int64]
    warnings: tuple[str, ...]

    def plan(self) -> dict[str, Any]:
        """Return what a training would do; takes two steps of it to say how long."""
        task, config = self.task, self.config
        steps = config.fit.steps or config.fit.epochs * task.epoch_steps
        learning = sum(
            task.network.get_parameter(name).numel()
            for g in task.groups()
            if g.thaw is not None
            for name in g.names
        )
        return {
            "images": len(self.training),
            "held_out_images": len(self.held_out),
            "groups": len(set(self.training.groups)),
            "held_out_groups": sorted(set(self.held_out.groups)),
            "cells": dict(zip(self.training.classes, map(int, self.cells.sum(axis=0)), strict=True)),
            "tissues": dict(sorted(Counter(t or "unknown" for t in self.training.tissues).items())),
            "types": list(task.types),
            "parameters": sum(p.numel() for p in task.network.parameters()),
            "parameters_that_learn": learning,
            "epoch_steps": task.epoch_steps,
            "steps": steps,
            "hours_on_this_cpu": round(steps * self._seconds() / 3600, 2),
        }

    def _seconds(self) -> float:
        """Return the time of a step on the CPU: the second of two, since the first warms up."""
        taken = 0.0
        for index in range(2):
            started = time.monotonic()
            with autocast(torch.device("cpu"), self.config.fit.precision):
                loss, _ = self.task.losses(self.task.batch(index, 0, 1))
            loss.backward()  # type: ignore[no-untyped-call]
            taken = time.monotonic() - started
        self.task.network.zero_grad(set_to_none=True)
        return taken * self.config.fit.accumulate


def prepare(paths: Sequence[Path], config: TrainConfig, cache: Path | None = None) -> Prepared:
    """Return the task for the images in `paths`, split by slide or patient.

    `cache` is a folder for the counts of cells. Raises UsageError WSI874 for a split that leaves nothing to learn
    from, and what reading the data raises.
    """
    # Each process of a training has its own threads; OpenCV's would make one more pool for nothing.
    cv2.setNumThreads(1)
    data = config.data
    sets = [open_dataset(path, spacing_um=data.spacing_um, side=data.crop, mpp=data.mpp) for path in paths]
    whole = Joined(sets, classes=data.classes or None, rename=data.rename, shares=data.shares or None)
    learn, judge, warnings = _split(whole, config)
    training, held_out = Subset(whole, learn), Subset(whole, judge)
    cells = training.cells(cache)
    task = CellViTTask(config, training, held_out, cells)
    return Prepared(config, task, training, held_out, cells, (*whole.warnings, *warnings))


def _split(whole: Dataset, config: TrainConfig) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Return the images to learn from and to judge on: no group is on both sides."""
    data, groups = config.data, whole.groups
    known = sorted(set(groups))
    if data.held_out_groups:
        unknown = [g for g in data.held_out_groups if g not in known]
        if unknown:
            raise UsageError(
                "WSI874", f"data.held_out_groups names {unknown[0]!r}; the data have {', '.join(known[:8])}"
            )
        chosen = set(data.held_out_groups)
    elif not data.held_out:
        return list(range(len(whole))), [], ()
    elif len(known) == 1:
        return _split_one(len(whole), data.held_out, known[0])
    else:
        chosen = _drawn(Counter(groups), data.held_out, config.fit.seed)
    learn = [i for i, group in enumerate(groups) if group not in chosen]
    if not learn:
        raise UsageError("WSI874", "every group is held out; lower data.held_out or name fewer groups")
    return learn, [i for i, group in enumerate(groups) if group in chosen], ()


def _split_one(count: int, share: float, group: str) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Split the images of a single slide: the last ones are held out, which says little of other slides."""
    kept = max(1, count - max(1, round(share * count)))
    warning = (
        f"WSI875 all images are of one slide ({group}): held-out scores are of its own last part and say nothing "
        "about other slides"
    )
    return list(range(kept)), list(range(kept, count)), (warning,)


def _drawn(images: Mapping[str, int], share: float, seed: int) -> set[str]:
    """Return groups that hold about `share` of the images, in an order that only names and seed decide."""
    order = sorted(images, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    wanted, chosen, have = share * sum(images.values()), set[str](), 0
    for name in order[:-1]:
        # at least one group, then as many as do not overshoot
        if chosen and have + images[name] > wanted:
            continue
        chosen.add(name)
        have += images[name]
        if have >= wanted:
            break
    return chosen


def train(
    prepared: Prepared,
    out: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    upstream: bool = False,
    on_event: Event = lambda kind, facts: None,
) -> Outcome:
    """Train into the folder `out`: ``model.safetensors``, ``card.toml``, ``config.toml``, ``log.csv``.

    `upstream` writes ``upstream.pth`` too. Raises what `fit` and the export raise.
    """
    config, task = prepared.config, prepared.task

    def note(kind: str, facts: Mapping[str, Any]) -> None:
        if kind == "started":  # not before: until then the folder may be another run's
            write_durably(out / "config.toml", to_toml(config).encode())
        on_event(kind, facts)

    outcome = fit(task, config.fit, out, device=device, overwrite=overwrite, on_event=note)
    if upstream and outcome.status != "interrupted" and processes.first():
        from wsitk.models.cellvit.folder import from_folder

        network = from_folder(out).network
        write_upstream(out / "upstream.pth", network, task.types, config, overwrite=True)
    return outcome
