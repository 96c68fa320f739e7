"""What a run leaves behind: averaged weights, a log, and a checkpoint to resume from."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Average:
    """Exponential moving average of the weights, buffers included: what is delivered."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)


class Log:
    """A CSV with the mean training losses since the last row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def add(self, parts: dict[str, float]) -> None:
        self.rows.append(parts)

    def write(self, step: int, minutes: float, score: dict[str, float]) -> None:
        means = {key: float(np.mean([r[key] for r in self.rows])) for key in self.rows[0]}
        row = {"step": step, "minutes": minutes, **means, **score}
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" for k, v in row.items()})
        self.rows = []


def export(state: dict[str, Tensor], path: Path) -> None:
    """Write the weights under another name and rename, so that readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    plain = {k: v.contiguous() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(plain, temporary)
    temporary.replace(path)


def checkpoint(
    path: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Average,
    step: int,
    spent: float,
) -> None:
    """All that `resume` needs."""
    state = {
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "average": average.state,
        "step": step,
        "spent": spent,
    }
    temporary = path.with_suffix(".resume_partial")
    torch.save(state, temporary)
    temporary.replace(path)


def resume(
    path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, average: Average
) -> tuple[int, float]:
    """Restore a checkpoint if there is one; (steps done, seconds spent)."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    average.state = state["average"]
    return int(state["step"]), float(state["spent"])
