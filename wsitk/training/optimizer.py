"""AdamW over a task's groups, and the random state of a place in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from wsitk.errors import UsageError
from wsitk.training.settings import FitConfig
from wsitk.training.task import Group

__all__ = ["make_optimizer", "random_state"]


def make_optimizer(network: nn.Module, groups: Sequence[Group], config: FitConfig) -> torch.optim.AdamW:
    """Return AdamW over the groups, those without decay apart. Raises UsageError WSI868 if nothing learns."""
    parameters = dict(network.named_parameters())
    made: list[dict[str, Any]] = []
    for group in groups:
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        chosen = [parameters[name] for name in group.names] if group.thaw is not None else []
        decays = [p for p in chosen if config.decay_vectors or p.ndim > 1]
        rest = [p for p in chosen if not config.decay_vectors and p.ndim <= 1]
        for members, own in ((decays, decay), (rest, 0.0)):
            if members:
                made.append({"params": members, "weight_decay": own, "rate": group.rate})
    if not made:
        raise UsageError("WSI868", "no parameter of the network is to learn; check what the settings freeze")
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=config.betas)


def random_state(*numbers: int) -> None:
    """Set torch's random state from the place in the run."""
    high, low = np.random.SeedSequence(numbers).generate_state(2).tolist()
    torch.manual_seed(high << 31 ^ low)
