"""The liver-stage model as the engine sees it: the weights that ship, or a folder of other ones with a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from wsitk.card import Card, read_card
from wsitk.errors import ModelError, UsageError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, ObjectClass, TileResult
from wsitk.models.liverstage.network import NORMALISE, LiverStageUNet, UNetConfig
from wsitk.models.liverstage.objects import CutSettings, parasites
from wsitk.torchfile import checked_state, read_tensors
from wsitk.uncertainty.interface import SampledModel

__all__ = [
    "ARCH",
    "FIELD",
    "HALO",
    "PARASITE_CLASS",
    "TILE",
    "LiverStageModel",
    "default_model",
    "from_folder",
    "hsp70_only",
    "spec_of",
]

ARCH = "liverstage-unet"
"""What the card's ``[network]`` calls it; the other names there are those of `UNetConfig`, and ``channel_names``."""

FIELD = "probability"

PARASITE_CLASS = ObjectClass("Parasite", (255, 64, 160))

TILE, HALO = 768, 128
"""Read window and margin in pixels. The margin is the network's reach (51) and the radius of the largest parasite that
is seen whole by the tile that answers for it (77: 100 µm across at 0.65 µm/px). Larger ones want a larger halo."""


@final
class LiverStageModel(SampledModel):
    """The network in the engine's terms: maps in, parasites out.

    Parameters
    ----------
    network
        In evaluation mode.
    spec
        Its `object_columns` name the means of those channels that are read.
    read
        Which of the network's channels the input has, in that order; the others are given as empty.
    """

    def __init__(
        self, network: LiverStageUNet, spec: ModelSpec, read: tuple[int, ...], settings: CutSettings
    ) -> None:
        self.spec = spec
        self.threshold = settings.threshold
        self.vectors = {}
        self._network = network
        self._read = read
        self._settings = settings

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def prefix(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the maps before the first dropout, and the channels as they came."""
        whole = batch.new_zeros((len(batch), self._network.config.channels, *batch.shape[2:]))
        whole[:, list(self._read)] = batch
        return {"maps": self._network.prefix(whole), "image": batch}

    def suffix(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``foreground`` and ``core`` (N, 1, H, W), 0 to 1, and ``image`` (N, C, H, W)."""
        maps = self._network.suffix(features["maps"]).float().sigmoid()
        return {"foreground": maps[:, :1], "core": maps[:, 1:], "image": features["image"]}

    def probabilities(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return background and parasite (N, 2, H, W)."""
        inside = outputs["foreground"]
        return torch.cat([1 - inside, inside], dim=1)

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the parasites, with the mean of each channel in units of its background, and the map of them."""
        foreground = np.asarray(outputs["foreground"], np.float32)
        found = parasites(
            foreground[0],
            outputs["core"][0],
            outputs["image"],
            self.spec.object_columns,
            tile.read.start,
            tile.index,
            self._settings,
        )
        return TileResult(found, {FIELD: foreground})


def default_model(mpp: float | None = None) -> LiverStageModel:
    """Return the model that ships with wsitk, for DAPI (or another stain of DNA) and HSP70; see `from_folder`."""
    return from_folder(_shipped(), mpp=mpp)


def hsp70_only(mpp: float | None = None) -> LiverStageModel:
    """Return the model that ships with wsitk for images of the parasite's stain alone; see `from_folder`."""
    return from_folder(_shipped(), channels="HSP70", mpp=mpp)


def _shipped() -> Path:
    return Path(str(files("wsitk.models.liverstage")))


def from_folder(path: str | Path, channels: str = "", mpp: float | None = None) -> LiverStageModel:
    """Return the model in the folder `path`, in evaluation mode, float32, on the CPU.

    `channels` names those of the card's channels that images will have, with commas between them; all of them if it
    is empty. Networks learn to do without a channel if they have seen crops without it, as the one that ships has.
    `mpp` is the pixel size in µm to which images are brought; None takes them as they are, since fields often lack
    one. Raises ModelError: WSI314 (the card), WSI317 (other weights than the card describes, or none), WSI318 (a
    network that is none of these), WSI301 to WSI307 (the weights); UsageError WSI622 for a channel that it lacks.
    """
    card = read_card(Path(path) / "card.toml")
    verified = card.verified()
    if not verified:
        why = "are not there" if verified is None else f"don't have sha256 {card.sha256[:12]}"
        raise ModelError("WSI317", f"{card.weights} {why}, as {card.path} says; copy the folder again, whole")
    with torch.device("meta"):
        network, names = _network(card)
    network.load_state_dict(checked_state(read_tensors(card.weights), network.state_dict()), assign=True)
    read = _chosen(card, names, channels)
    content = card.content
    spec = spec_of(
        tuple(names[k] for k in read),
        tuple(ObjectClass(c["name"], tuple(c["color"])) for c in content["classes"]),
        mpp,
    )
    spec = replace(
        spec,
        name=card.name,
        version=card.version,
        weights_sha256=card.sha256,
        licences=Licences("Apache-2.0", content["licence"], content["data_licence"], True),
    )
    # convolutions of few maps are a third faster on a CPU that way
    network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    return LiverStageModel(network, spec, read, _settings(card))


def spec_of(
    names: tuple[str, ...], classes: tuple[ObjectClass, ...] = (PARASITE_CLASS,), mpp: float | None = None
) -> ModelSpec:
    """Return what the engine is told of such a model whose images have the channels `names`; see `from_folder`."""
    return ModelSpec(
        name="liverstage",
        version="0",
        spacing=None if mpp is None else (mpp, mpp),
        tile=(TILE, TILE),
        halo=(HALO, HALO),
        align=(32, 32),
        channels=len(names),
        channel_names=names,
        dtype="",
        interpolation="area" if mpp is None else "cubic",
        normalise=(NORMALISE,),
        normalise_first=True,
        # the margin is wider than the network looks, so that what a tile owns is right, and needs no blending
        fields=(FieldSpec(FIELD, tuple(c.name for c in classes), window="crop"),),
        objects=True,
        classes=classes,
        object_columns=tuple(f"intensity_{name}" for name in names),
    )


def _network(card: Card) -> tuple[LiverStageUNet, tuple[str, ...]]:
    """Return the network that the card's ``[network]`` describes, to be filled, and its channels' names."""
    wishes = dict(card.content.get("network", {}))
    arch, names = wishes.pop("arch", None), tuple(wishes.pop("channel_names", ()))
    problem = f"network.arch is {arch!r}, wanted {ARCH!r}"
    if arch == ARCH:
        # TOML has lists where the configuration has tuples
        wishes = {k: tuple(v) if isinstance(v, list) else v for k, v in wishes.items()}
        try:
            config = UNetConfig(channels=len(names), **wishes)
        except (TypeError, ValueError) as error:
            problem = f"network.arch {arch!r}: {error}"
        else:
            return LiverStageUNet(config), names
    raise ModelError("WSI318", f"{card.path}: {problem}; see docs/how-to/model-card.md")


def _settings(card: Card) -> CutSettings:
    try:
        return CutSettings(**card.content.get("postprocessing", {}))
    except TypeError as error:
        raise ModelError(
            "WSI318", f"{card.path}: [postprocessing]: {error}; see docs/how-to/model-card.md"
        ) from error


def _chosen(card: Card, names: tuple[str, ...], wanted: str) -> tuple[int, ...]:
    """Return the places of the channels that are read."""
    if not wanted:
        return tuple(range(len(names)))
    chosen = [name.strip() for name in wanted.split(",")]
    odd = [name for name in chosen if name not in names]
    if odd or len(set(chosen)) < len(chosen):
        raise UsageError(
            "WSI622", f"{card.name} reads the channels {', '.join(names)}, each once at most; got {wanted!r}"
        )
    return tuple(names.index(name) for name in chosen)
