"""What the trainer knows of a model: a network, batches, losses. A model's own package implements it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["Batch", "Group", "Task"]

Batch = dict[str, Tensor]
"""Tensors by name; the trainer moves them to the device and looks at nothing else."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes
    ----------
    names
        As in ``network.named_parameters()``.
    rate
        Factor of the configured learning rate.
    weight_decay
        None for the configured one.
    thaw
        First epoch, counted from 0, in which they learn; None for never.
    """

    names: tuple[str, ...]
    rate: float = 1.0
    weight_decay: float | None = None
    thaw: int | None = 0


class Task(ABC):
    """A network and what it has to learn.

    Whatever the trainer asks for by number is a pure function of that number, so that a run resumed from its
    checkpoint needs no record of samplers and their random states.
    """

    network: nn.Module

    @property
    @abstractmethod
    def epoch_steps(self) -> int:
        """Return the number of optimiser steps that make an epoch."""

    @abstractmethod
    def batch(self, index: int, rank: int, world: int) -> Batch:
        """Return batch `index` (from 0) of process `rank` of `world`: a pure function of these and the seed.

        May be called in another process and in any order; must not read or change a global random state.
        """

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss (a scalar, to be differentiated) and its parts (scalars, for the log).

        Called under autocast, in training mode, with the global random state set from seed, step and rank.
        """

    @abstractmethod
    def groups(self) -> Sequence[Group]:
        """Return the parameters that may learn; those in no group stay as they are."""

    @abstractmethod
    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return scores of `network` (in evaluation mode, averaged weights if they are kept) on held-out data."""

    @abstractmethod
    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write what a user runs; `facts` are the trainer's (steps, minutes, scores) for the model's card."""

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Return what the result depends on besides the trainer's settings, as JSON: data, network, losses."""

    def state(self) -> dict[str, Any]:
        """Return what the task itself has learned besides the network, as JSON; for most tasks nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; called after every start from a checkpoint."""
        del state  # most tasks have none
