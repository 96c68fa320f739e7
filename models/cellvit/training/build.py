"""The network that a configuration asks for: built, filled with the weights to start from, adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsitk.errors import ModelError, UsageError
from wsitk.models.cellvit import compact
from wsitk.models.cellvit.checkpoint import load_checkpoint
from wsitk.models.cellvit.config import VARIANTS
from wsitk.models.cellvit.network import CellViT
from wsitk.models.cellvit.training.config import NetworkConfig
from wsitk.models.cellvit.training.lora import add_lora
from wsitk.torchfile import TensorFile, checked_state, read_tensors
from wsitk.training.task import Group

__all__ = ["align_of", "build", "description", "normalisation", "parameter_groups", "types_of"]

COMPACT = "compact"

HEADS = ("nuclei_type_map", "classifier_head.", "encoder.head.")
"""What may differ between the weights to start from and the network: it depends on the data's classes."""

Triple = tuple[float, float, float]


def types_of(config: NetworkConfig, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the nucleus types that the network tells apart; empty if it has no type map.

    The published variants always have one: without types to learn, of the single type "Nucleus". Raises
    UsageError WSI870 if types are wanted and the data name none.
    """
    if config.types and not classes:
        raise UsageError("WSI870", "network.types is true, but the data name no classes; leave it out")
    wanted = tuple(classes) if config.types is not False else ()
    # one class needs no map to tell it from another
    if config.arch == COMPACT:
        return wanted if len(wanted) > 1 else ()
    return wanted or ("Nucleus",)


def description(config: NetworkConfig, types: Sequence[str], tissues: int) -> dict[str, Any]:
    """Return the card's ``[network]`` table: what builds the network again."""
    if config.arch == COMPACT:
        return {"arch": COMPACT, **({"types": len(types)} if types else {})}
    return {"arch": config.arch, "nuclei_classes": len(types) + 1, "tissue_classes": max(1, tissues)}


def build(config: NetworkConfig, types: Sequence[str], tissues: int, seed: int) -> nn.Module:
    """Return the network to train, its first weights drawn from `seed` or taken from ``config.start``.

    Raises UsageError WSI870 for an architecture that there is not, WSI871 for weights that do not fit it;
    ModelError for a file that is no checkpoint.
    """
    wishes = description(config, types, tissues)
    arch = wishes.pop("arch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == COMPACT:
            network: nn.Module = compact.compact_cellvit(**wishes)
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to stubs
        elif arch in VARIANTS:
            network = CellViT(replace(VARIANTS[arch], dropout=config.dropout, **wishes))
        else:
            names = ", ".join((COMPACT, *VARIANTS))
            raise UsageError("WSI870", f"network.arch is {arch!r}, wanted one of {names}")
    if config.start:
        _fill(network, _start(config.start, network), config.start)
    if config.learn == "lora":
        add_lora(_encoder(network), config.lora)
    return network


def _encoder(network: nn.Module) -> nn.Module:
    return network.get_submodule("encoder")


def normalisation(config: NetworkConfig) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of RGB in 0..1 that the encoder was pretrained with."""
    return (compact.MEAN, compact.STD) if config.arch == COMPACT else ((0.5,) * 3, (0.5,) * 3)


def align_of(network: nn.Module) -> int:
    """Return the number of pixels of which a tile's sides are multiples."""
    return network.config.align if isinstance(network, CellViT) else compact.LATTICE


def parameter_groups(network: nn.Module, config: NetworkConfig) -> tuple[Group, ...]:
    """Return the encoder and the rest as groups that learn as `config` says."""
    names = [name for name, _ in network.named_parameters()]
    encoder = tuple(n for n in names if n.startswith("encoder."))
    rest = tuple(n for n in names if not n.startswith("encoder."))
    if config.learn == "lora":
        encoder = tuple(n for n in encoder if n.rpartition(".")[2] in ("down", "up"))
    thaw = None if config.learn == "decoder" else config.thaw
    return Group(encoder, rate=config.encoder_rate, thaw=thaw), Group(rest)


def _start(start: str, network: nn.Module) -> dict[str, Tensor]:
    """Return weights by the network's names, from a model's name, a folder, or a file."""
    from wsitk.registry import load_model, model_names

    path = Path(start)
    if start in model_names():
        return load_model(start).network.state_dict()
    if path.is_dir():
        from wsitk.models.cellvit.folder import from_folder

        return from_folder(path).network.state_dict()
    if not path.is_file():
        known = ", ".join(model_names())
        raise UsageError(
            "WSI871", f"network.start is {start!r}: no such file or folder, and no model of {known}"
        )
    file = read_tensors(path)
    if "arch" in file.meta:
        return load_checkpoint(path)[0].state_dict()
    return _encoder_state(file, network)


def _encoder_state(file: TensorFile, network: nn.Module) -> dict[str, Tensor]:
    """Return a pretrained encoder's weights: MobileSAM's, SAM's, or a DINO student or teacher."""
    state = {_bare(name): value for name, value in file.tensors.items()}
    encoder = _encoder(network)
    if isinstance(network, compact.CompactCellViT):
        state = compact.encoder_state({f"image_encoder.{k}": v for k, v in state.items()})
    wanted = encoder.state_dict()
    # A pretrained encoder has heads that we don't need, and lacks the one for tissues.
    have = {name: value for name, value in state.items() if name in wanted}
    lacking = {n: v for n, v in wanted.items() if n not in have and n.startswith("head.")}
    try:
        checked = checked_state(replace(file, tensors={**have, **lacking}), wanted)
    except ModelError as error:
        raise UsageError(
            "WSI871", f"{file.path} is no encoder of {type(network).__name__}: {error}"
        ) from error
    return {f"encoder.{name}": value for name, value in checked.items() if name not in lacking}


def _bare(name: str) -> str:
    """Return a weight's name without what wrapped the encoder when it was saved."""
    for prefix in ("module.", "backbone.", "image_encoder."):
        name = name.removeprefix(prefix)
    return name


def _fill(network: nn.Module, state: Mapping[str, Tensor], start: str) -> None:
    """Copy weights into the network; heads of other classes stay as drawn. Raises UsageError WSI871."""
    own = network.state_dict()
    fits = {n: v for n, v in state.items() if n in own and own[n].shape == v.shape}
    encoder_only = not any(not n.startswith("encoder.") for n in state)
    missing = [n for n in own if n not in fits and not n.startswith(HEADS)]
    if encoder_only:
        missing = [n for n in missing if n.startswith("encoder.")]
    if missing:
        raise UsageError(
            "WSI871",
            f"{start} does not fit the network: {len(missing)} of its {len(own)} entries are missing or of "
            f"another shape ({missing[0]}, …); wanted weights of the same network.arch",
        )
    network.load_state_dict({**own, **fits})
