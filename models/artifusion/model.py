"""ArtiFusion as the engine sees it: the weights that ship, a folder of other ones, or a published state dict."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from math import isqrt
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.card import Card, read_card
from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.model import Licences, ModelSpec, RegionModel
from wsitk.models.artifusion.network import Denoiser, DenoiserConfig
from wsitk.models.artifusion.restore import Chain, Restorer, Sampling
from wsitk.torchfile import TensorFile, checked_state, read_tensors

__all__ = [
    "AFFORDABLE",
    "ARCH",
    "ArtiFusion",
    "config_of",
    "default_model",
    "from_checkpoint",
    "from_folder",
    "is_ours",
]

ARCH = "artifusion"
"""What the card's ``[network]`` calls it; the other fields are `DenoiserConfig`'s, ``schedule`` and ``times``."""

AFFORDABLE = Sampling("dpm++", steps=20, jump_n_sample=1, start=0.7, average=2)
"""The default; the README says what it costs and gives up against the full schedule."""

REGION = 2048
"""Rows and columns of the largest region that is restored at once, in pixels; memory grows with its area."""


@final
class ArtiFusion(RegionModel):
    """Paints what lies under a mask. `sampling` is how; it enters the version, and so the run key."""

    def __init__(self, network: Denoiser, chain: Chain, sampling: Sampling, spec: ModelSpec) -> None:
        self._network, self.chain, self.sampling, self.spec = network, chain, sampling, spec

    @property
    def network(self) -> Denoiser:
        """Return the denoiser."""
        return self._network

    def restorer(self, seed: int = 0) -> Restorer:
        """Return what restores regions with this model's way of sampling."""
        um = self.spec.spacing[0] if self.spec.spacing else None
        return Restorer(
            self._network, self.sampling, seed, self._network.config.size, chain=self.chain, spacing_um=um
        )

    def process_region(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        region: Region,
        *,
        seed: int = 0,
        sample: int = 0,
    ) -> NDArray[np.float32]:
        """Return float32 (H, W, 3) in 0..255: `image`, with what `mask` marks painted; see `Restorer.restore`."""
        y, x = region.start
        return self.restorer(seed).restore(image, mask, (y, x), sample)


def default_model(sampling: Sampling | None = None) -> ArtiFusion:
    """Return the demonstration model that ships with wsitk; see `from_folder`."""
    return from_folder(Path(str(files("wsitk.models.artifusion"))), sampling)


def from_folder(path: str | Path, sampling: Sampling | None = None) -> ArtiFusion:
    """Return the model in the folder `path`, in evaluation mode, float32, on the CPU.

    Raises ModelError: WSI314 (the card), WSI317 (other weights than the card describes, or none), WSI318 (a
    network that is none of these), WSI301 to WSI307 (the weights).
    """
    card = read_card(Path(path) / "card.toml")
    verified = card.verified()
    if not verified:
        why = "are not there" if verified is None else f"don't have sha256 {card.sha256[:12]}"
        raise ModelError("WSI317", f"{card.weights} {why}, as {card.path} says; copy the folder again, whole")
    network, chain = _described(card)
    # what the network computes by itself does not ship; kept in half precision, it works in single
    learned = checked_state(read_tensors(card.weights), dict(network.named_parameters()))
    network.load_state_dict(network.state_dict() | learned)
    content = card.content
    licences = Licences("Apache-2.0", content["licence"], content["data_licence"], True)
    return _model(
        network, chain, sampling, card.name, card.version, float(content["spacing_um"]), card.sha256, licences
    )


def _described(card: Card) -> tuple[Denoiser, Chain]:
    """Return the network that the card's ``[network]`` describes, to be filled with weights, and its noise."""
    wishes: dict[str, Any] = dict(card.content.get("network", {}))
    arch = wishes.pop("arch", None)
    problem = f"network.arch is {arch!r}, wanted {ARCH!r}"
    if arch == ARCH:
        try:
            chain = Chain(wishes.pop("schedule", "linear"), wishes.pop("times", 1000))
            lists = {name: tuple(value) for name, value in wishes.items() if isinstance(value, list)}
            return Denoiser(DenoiserConfig(**(wishes | lists))).eval(), chain
        except (TypeError, ValueError) as error:
            problem = f"network.arch {arch!r}: {error}"
    raise ModelError("WSI318", f"{card.path}: {problem}; see docs/how-to/model-card.md")


def _model(
    network: Denoiser,
    chain: Chain,
    sampling: Sampling | None,
    name: str,
    version: str,
    um: float | None,
    sha256: str,
    licences: Licences,
) -> ArtiFusion:
    how = sampling or AFFORDABLE
    side = network.config.size
    margin = Restorer(network, how, 0, side, chain=chain).margin
    jumps = f"{how.sampler} {how.steps}/{how.jump_length}x{how.jump_n_sample}"
    drawn = f"{jumps} eta {how.eta:g} start {how.start:g} of {how.average}"
    spec = ModelSpec(
        name=name,
        version=f"{version} {drawn}",
        spacing=None if um is None else (um, um),
        tile=(max(REGION, 4 * side),) * 2,
        halo=(margin, margin),
        align=(1, 1),
        restores=True,
        weights_sha256=sha256,
        licences=licences,
    )
    return ArtiFusion(network, chain, how, spec)


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are of ArtiFusion's denoiser."""
    return "output_blocks_concat_back_dim.1.0.weight" in file.tensors


def from_checkpoint(
    path: str | Path,
    *,
    sampling: Sampling | None = None,
    chain: Chain | None = None,
    spacing_um: float | None = None,
) -> ArtiFusion:
    """Return the model in a state dict with the published code's names (``model*.pt``, ``ema_*.pt``).

    Such a file doesn't say how noise grew in its training (`chain`; 4000 linear times by the published script),
    nor at which pixel size; without `spacing_um` images are taken as they are. Raises ModelError: WSI301 to
    WSI307 (the file), WSI646 (a network that these names don't make).
    """
    file = read_tensors(Path(path))
    config = config_of(file.tensors)
    if config is None:
        raise ModelError(
            "WSI646",
            f"{path} is no ArtiFusion denoiser that can be rebuilt from its tensors; give whole state dicts, with "
            "the masks of shifted windows, or a folder with a card",
        )
    network = Denoiser(config).eval()
    state = checked_state(file, network.state_dict())
    own = dict(network.named_buffers())
    if other := next((name for name, value in own.items() if not torch.equal(value, state[name])), None):
        raise ModelError(
            "WSI646", f"{path}: {other} is not what a network of this shape computes; take another"
        )
    network.load_state_dict(state)
    return _model(
        network, chain or Chain("linear", 4000), sampling, Path(path).stem, file.sha256[:12], spacing_um,
        file.sha256, Licences("Apache-2.0", "not stated", "not stated"),
    )  # fmt: skip


def config_of(tensors: Mapping[str, Tensor]) -> DenoiserConfig | None:
    """Return the shape of the network that tensors by their names make; None if they make none.

    The side of the image is told by how many windows a mask of shifted ones has.
    """
    try:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        first = "input_blocks.0.0.blocks"
        rows = int(tensors[f"{first}.0.attn.relative_position_bias_table"].shape[0])
        windows = int(tensors[f"{first}.1.attn_mask"].shape[0])
        levels = 1 + sum(f"input_blocks.{k}.0.downsample.0.norm.weight" in tensors for k in range(16))
        depths = tuple(_count(tensors, f"input_blocks.{k}.0.blocks") for k in range(levels))
        tables = [f"input_blocks.{k}.0.blocks.0.attn.relative_position_bias_table" for k in range(levels)]
        window = (isqrt(rows) + 1) // 2
        return DenoiserConfig(
            size=isqrt(windows) * window * int(patch),
            patch=int(patch),
            width=int(width),
            depths=depths,
            heads=tuple(int(tensors[name].shape[1]) for name in tables),
            window=window,
            time_channels=int(tensors["time_embed.0.weight"].shape[1]),
        )
    except (KeyError, ValueError, IndexError):
        return None


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many blocks there are below `prefix`."""
    return len(
        {name.removeprefix(prefix + ".").split(".")[0] for name in tensors if name.startswith(prefix + ".")}
    )
