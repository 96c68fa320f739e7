"""A folder with a card and its weights, as `wsitk train` writes it, to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from wsitk.card import Card, read_card
from wsitk.errors import ModelError
from wsitk.model import FieldSpec, Licences, ModelSpec, ObjectClass
from wsitk.models.cellvit.compact import LATTICE, CompactCellViT, compact_cellvit
from wsitk.models.cellvit.config import VARIANTS, CellViTConfig
from wsitk.models.cellvit.model import FIELD, CellViTModel
from wsitk.models.cellvit.network import CellViT, empty_network
from wsitk.models.cellvit.postprocess import HoverSettings

__all__ = ["from_folder"]

CARD = "card.toml"

Network = CompactCellViT | CellViT


def from_folder(path: str | Path) -> CellViTModel:
    """Return the model in the folder `path`, in evaluation mode, float32, on the CPU.

    The card says all: the network, its normalisation, classes and post-processing. Raises ModelError: WSI314
    (the card), WSI317 (other weights than the card describes, or none), WSI318 (a network or settings that are
    none of CellViT's), WSI301 (the weights are not that network's), WSI307 (weights that are not finite).
    """
    card = read_card(Path(path) / CARD)
    verified = card.verified()
    if not verified:
        why = "are not there" if verified is None else f"don't have sha256 {card.sha256[:12]}"
        raise ModelError("WSI317", f"{card.weights} {why}, as {card.path} says; copy the folder again, whole")
    mean, std, settings = _triple(card, "mean"), _triple(card, "std"), _settings(card)
    network = _network(card)
    spec = _spec(card, network)
    return CellViTModel(_filled(network, card), spec, mean=mean, std=std, settings=settings)


def _network(card: Card) -> Network:
    """Return the network that the card's ``[network]`` describes, to be filled with weights."""
    wishes: dict[str, Any] = dict(card.content.get("network", {}))
    arch = wishes.pop("arch", None)
    # TOML has lists where the configuration has tuples.
    wishes = {k: tuple(v) if isinstance(v, list) else v for k, v in wishes.items()}
    build: Callable[..., Network]
    if arch == "compact":
        build = compact_cellvit
    elif arch == "CellViT" or arch in VARIANTS:
        build = partial(_variant, arch)
    else:
        raise _odd(
            card, f"network.arch is {arch!r}, wanted one of {', '.join(('compact', 'CellViT', *VARIANTS))}"
        )
    try:
        return build(**wishes)
    except (TypeError, ValueError) as error:
        raise _odd(card, f"network.arch {arch!r}: {error}") from error


def _variant(arch: str, **wishes: Any) -> CellViT:
    config = replace(VARIANTS[arch], **wishes) if arch in VARIANTS else CellViTConfig(**wishes)
    if config.family not in ("dino", "sam", "timm"):
        raise ValueError(f"family is {config.family!r}, wanted dino, sam or timm")
    return empty_network(config)


def _filled(network: Network, card: Card) -> Network:
    """Return the network with the card's weights, once they prove to be exactly that network's."""
    try:
        state = load_file(card.weights)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "WSI303", f"{card.weights} is no safetensors file: {error}; copy it again"
        ) from error
    wanted = network.state_dict()
    odd = [
        n
        for n in {**wanted, **state}
        if n not in state or n not in wanted or state[n].shape != wanted[n].shape
    ]
    if odd:
        raise ModelError(
            "WSI301",
            f"{card.weights} doesn't fit the network of its card: {len(odd)} of {len(wanted)} entries are missing, "
            f"unknown or of another shape ({', '.join(map(repr, odd[:3]))}); was the card copied from another model?",
        )
    whole = {name: value.to(wanted[name].dtype) for name, value in state.items()}
    bad = next((n for n, v in whole.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if bad is not None:
        raise ModelError("WSI307", f"{card.weights}: {bad!r} has values that are not finite; train it again")
    network.load_state_dict(whole, strict=True, assign=True)
    return network.eval()


def _settings(card: Card) -> HoverSettings:
    try:
        return HoverSettings(**card.content.get("postprocessing", {}))
    except (TypeError, ValueError) as error:
        raise _odd(card, f"[postprocessing]: {error}") from error


def _spec(card: Card, network: Network) -> ModelSpec:
    """Return what the engine needs; tile, halo and lattice follow from the network."""
    content = card.content
    classes = tuple(ObjectClass(c["name"], tuple(c["color"])) for c in content["classes"])
    typed = len(classes) > 1 or "types" in content.get("network", {})
    if isinstance(network, CellViT):
        typed, channels, align = True, network.config.nuclei_classes - 1, network.config.align
        side, halo = 1024, 64
        if channels != len(classes):
            raise _odd(card, f"{len(classes)} classes for a type map of {channels}")
    else:
        side, halo, align = 1536, 128, LATTICE
    maps = tuple(c.name for c in classes) if typed else ()
    return ModelSpec(
        name=card.name,
        version=card.version,
        spacing=(float(content["spacing_um"]),) * 2,
        tile=(side, side),
        halo=(halo, halo),
        align=(align, align),
        border="constant" if isinstance(network, CellViT) else "reflect",
        fields=(FieldSpec(FIELD, ("Nuclei", *maps)),),
        objects=True,
        classes=classes,
        object_columns=tuple(f"probability_{name}" for name in maps),
        weights_sha256=card.sha256,
        licences=Licences("Apache-2.0", content["licence"], content["data_licence"]),
    )


def _triple(card: Card, name: str) -> tuple[float, float, float]:
    norm = card.content.get("normalisation", {})
    if name not in norm or norm.get("scale", 255) != 255:
        raise _odd(card, "no [normalisation] of pixels divided by 255")
    red, green, blue = map(float, norm[name])
    return red, green, blue


def _odd(card: Card, what: str) -> ModelError:
    return ModelError("WSI318", f"{card.path}: {what}; see docs/how-to/model-card.md")
