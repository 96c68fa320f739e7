"""Low-rank adapters (LoRA, Hu 2021) on an encoder's linear layers, and their way back into plain weights.

A layer W x + b becomes W x + b + alpha / rank * U (D x), where W and b rest and only D (rank, in) and U
(out, rank) learn: under one per cent of the weights, so that a large encoder can be tuned on little data and
the result shipped in megabytes. `merge_lora` adds the product to W, after which nothing tells that it was there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.errors import UsageError

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "add_lora",
    "merge_lora",
    "lora_state",
    "load_lora_state",
    "lora_names",
]

ATTENTION = ("qkv", "proj")
PERCEPTRON = ("fc1", "fc2", "lin1", "lin2")
"""Last names of the encoders' linear layers; SAM calls the perceptron's lin1 and lin2."""


@dataclass(frozen=True)
class LoraConfig:
    """Rank and strength of the adapters.

    Attributes
    ----------
    rank, alpha
        Width of an adapter, and `alpha / rank`, the factor of what it adds.
    dropout
        On the adapter's input.
    mlp
        Whether the perceptrons get adapters too, besides the attention's qkv and projection.
    seed
        Of the adapters' first weights.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    mlp: bool = False
    seed: int = 19

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}: wanted a rank from 1, an "
                "alpha above 0, a dropout below 1"
            )


@final
class LoraLinear(nn.Module):
    """A resting linear layer with an adapter beside it: (…, in) -> (…, out)."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        # Drawn on the CPU, so that a seed gives the same adapters on every device.
        bound = 1 / math.sqrt(base.in_features)
        down = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        like = base.weight
        self.down = nn.Parameter(down.to(like.device, like.dtype))
        # Zeros: the first step starts from the network as it was.
        self.up = nn.Parameter(like.new_zeros(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        # Two thin products instead of one with the full matrix: its gradient is never made.
        added = F.linear(F.linear(self.dropout(x), self.down), self.up)
        result: Tensor = self.base(x) + self.scale * added
        return result

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return one plain layer that does the same."""
        weight = self.base.weight
        wide = torch.promote_types(weight.dtype, torch.float64)
        delta = self.scale * (self.up.to(wide) @ self.down.to(wide))
        self.base.weight.copy_(weight.to(wide) + delta)
        return self.base.requires_grad_(True)


def add_lora(encoder: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    """Put adapters into an encoder, in place, and let all else of it rest; return the adapters' parameters.

    The names are those of ``encoder.named_parameters()``. The network computes what it computed before. Raises
    UsageError WSI898 if no layer of it takes adapters, or it has some already.
    """
    targets = ATTENTION + (PERCEPTRON if config.mlp else ())
    if any(isinstance(module, LoraLinear) for module in encoder.modules()):
        raise UsageError("WSI898", "the encoder has adapters already; merge them first")
    found = [
        (parent, leaf, layer)
        for parent in encoder.modules()
        for leaf, layer in parent.named_children()
        if leaf in targets and isinstance(layer, nn.Linear)
    ]
    if not found:
        wanted = ", ".join(targets)
        raise UsageError(
            "WSI898", f"{type(encoder).__name__} has no linear layer named {wanted}; no place for LoRA"
        )
    encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    for parent, leaf, layer in found:
        setattr(parent, leaf, LoraLinear(layer, config, generator))
    return lora_names(encoder)


def merge_lora(network: nn.Module) -> int:
    """Fold every adapter into the layer beneath it, in place; return how many there were.

    Afterwards the state dict has the names and shapes of the network without adapters, and all of it can be
    trained again.
    """
    adapted = [
        (parent, leaf, layer)
        for parent in network.modules()
        for leaf, layer in parent.named_children()
        if isinstance(layer, LoraLinear)
    ]
    for parent, leaf, layer in adapted:
        setattr(parent, leaf, layer.merged())
    if adapted:
        network.requires_grad_(True)
    return len(adapted)


def lora_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of all adapters' parameters, as in ``network.named_parameters()``."""
    return tuple(name for name, _ in _adapters(network))


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' weights alone: what there is to keep of a tuning."""
    return {name: value.detach().clone() for name, value in _adapters(network)}


def load_lora_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put weights that `lora_state` returned into a network with the same adapters.

    Raises UsageError WSI899 if names or shapes differ.
    """
    wanted = dict(_adapters(network))
    differing = sorted(set(wanted) ^ set(state))
    differing += [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    if differing:
        raise UsageError(
            "WSI899",
            f"adapter weights do not fit at {differing[0]!r}; wanted those of this encoder and config",
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


def _adapters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for above, module in network.named_modules():
        if isinstance(module, LoraLinear):
            prefix = f"{above}." if above else ""
            yield f"{prefix}down", module.down
            yield f"{prefix}up", module.up
