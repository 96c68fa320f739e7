"""Several processes that train one network, as `torchrun` starts them: gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["agreed", "average_gradients", "first", "join", "leave", "rank", "same_start", "world"]


def join(device: torch.device) -> torch.device:
    """Join the group that `torchrun` describes, if any; return this process's own device."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """Leave the group again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Tell whether this is the process that speaks and writes for all, also before they have joined."""
    return rank() == 0 and os.environ.get("RANK", "0") == "0"


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def same_start(network: nn.Module) -> None:
    """Give every process the first one's weights."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def agreed(values: Iterable[float], device: torch.device) -> list[float]:
    """Return the largest of each value over all processes: clocks and signals differ, decisions must not."""
    numbers = list(values)
    if not dist.is_initialized():
        return numbers
    shared = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return [float(v) for v in shared]


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if not dist.is_initialized():
        return
    # a parameter that one process did not use still has a part in the message
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
