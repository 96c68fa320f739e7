"""Networks by name: those of MONAI that map a volume to logits of the same size, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wsitk.errors import ModelError
from wsitk.models.monai_bundle.config import Config, Unevaluated, refused

__all__ = ["ALLOWED", "build_network"]

ALLOWED = (
    *("UNet", "Unet", "BasicUNet", "BasicUnet", "DynUNet", "DynUnet", "AttentionUnet", "SegResNet", "VNet"),
    *("UNETR", "SwinUNETR", "HighResNet", "AutoEncoder"),
)
"""Classes of ``monai.networks.nets`` that a bundle may name."""

PACKAGE = "monai.networks.nets."

FORBIDDEN = frozenset({"pretrained", "weights", "progress"})
"""Arguments with which some networks fetch weights from elsewhere."""

ENTRIES = ("network_def", "net_def", "network", "net")


def build_network(config: Config) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the bundle's network, on the meta device, and its arguments.

    Raises ModelError: WSI361 for expressions; WSI362 for a network that isn't of `ALLOWED`, or with arguments that
    aren't plain values; WSI365 without MONAI; WSI366 if its arguments don't make a network.
    """
    where, entry = config.first(*ENTRIES)
    if isinstance(entry, nn.Module) and config.expressions == "trust":
        return entry, {}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
        raise ModelError(
            "WSI362",
            f"{config.path}: no network in any of {', '.join(ENTRIES)}; wanted a table with a _target_",
        )
    name = entry["_target_"].removeprefix(PACKAGE)
    if name not in ALLOWED:
        raise ModelError(
            "WSI362",
            f"{config.path}: {where} is {entry['_target_']!r}, which was not imported; wanted one of {PACKAGE[:-1]}: "
            f"{', '.join(ALLOWED)}",
        )
    arguments = {k: v for k, v in entry.items() if k not in ("_target_", "_desc_")}
    _check_plain(config, where, arguments)
    if arguments.get("spatial_dims") != 3:
        raise ModelError(
            "WSI362", f"{config.path}: {where} has spatial_dims {arguments.get('spatial_dims')!r}, wanted 3"
        )
    return _made(config, name, arguments), arguments


def _check_plain(config: Config, where: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are no plain values, and those that name files or addresses."""
    odd = next((k for k in arguments if k in FORBIDDEN or k.startswith("_")), None)
    if odd is not None:
        raise ModelError(
            "WSI362", f"{config.path}: {where}#{odd} is no setting that a bundle may make; remove it"
        )
    stack: list[Any] = list(arguments.values())
    while stack:
        value = stack.pop()
        if isinstance(value, Unevaluated):
            raise refused(config.path, value.place, value.text)
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise ModelError(
                    "WSI362", f"{config.path}: {where} holds {value['_target_']!r}, which was not imported; wanted "
                    "plain values"
                )  # fmt: skip
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value


def _made(config: Config, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise ModelError(
            "WSI365", f"{config.path}: its network is MONAI's {name}; pip install 'wsitk[monai]'"
        ) from error
    build = getattr(nets, name, None)
    if build is None:
        raise ModelError(
            "WSI366", f"{config.path}: the installed MONAI has no {name}; install another version"
        )
    try:
        with torch.device("meta"):
            network = build(**arguments)
    except Exception as error:  # whatever a constructor makes of wrong arguments
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            "WSI366", f"{config.path}: {name} can't be built from its arguments: {reason}; mend network_def"
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError("WSI366", f"{config.path}: {name} is no network in the installed MONAI")
    return network
