"""A MONAI bundle, a folder of configuration and weights, as the engine sees it.

The bundle's own workflow is not run: its description is read and mapped to `ModelSpec`, and wsitk's engine does
the rest. Cardoso et al. 2022, "MONAI: An open-source framework for deep learning in healthcare", arXiv 2211.02701.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.errors import ModelError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.models.monai_bundle.config import Config, read_file
from wsitk.models.monai_bundle.networks import build_network
from wsitk.models.monai_bundle.transforms import Output, Preparation, Windows, output, preparation, windows
from wsitk.torchfile import TensorFile, checked_state, read_tensors

__all__ = ["BundleModel", "from_bundle", "is_bundle"]

FIELD = "labels"


@final
class BundleModel(TileModel):
    """A bundle's network. The engine normalises; the network wants its axes in the order x, y, z."""

    def __init__(self, network: torch.nn.Module, spec: ModelSpec) -> None:
        self.spec = spec
        self._network = network

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return ``logits`` (N, C, Z, Y, X) for normalised tiles (N, channels, Z, Y, X)."""
        logits: Tensor = self._network(batch.float().permute(0, 1, 4, 3, 2))
        return {"logits": logits.float().permute(0, 1, 4, 3, 2)}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the logits: as MONAI does, they are averaged where windows overlap, and judged afterwards."""
        return TileResult(None, {FIELD: outputs["logits"].astype(np.float32, copy=False)})


def is_bundle(folder: str | Path) -> bool:
    """Return whether a folder looks like a bundle: it has metadata in its place."""
    return (Path(folder) / "configs" / "metadata.json").is_file()


def from_bundle(path: str | Path, *, trust: bool = False, skip_expressions: bool = False) -> BundleModel:
    """Return the model in a bundle's folder: configs/metadata.json, configs/inference.json or .yaml, models/model.pt.

    Texts that begin with ``$`` are Python. A bundle that holds any is refused (WSI361) and nothing of it runs.
    With `skip_expressions` they are left alone, and the bundle is refused only where a value is needed that one
    would have to make. With `trust` those that are needed are run, by MONAI, with all that they may do.

    Raises ModelError: WSI360 (files missing or damaged), WSI361, WSI362 (a network that isn't on the list), WSI363
    (a transform, inferer or setting that wsitk has no equal of), WSI364 (references), WSI365 (MONAI is missing),
    WSI366 (arguments of the network), and as `read_tensors` and `checked_state` do for the weights.
    """
    folder = Path(path)
    metadata = read_file(folder / "configs" / "metadata.json")
    config = Config.read(folder, "trust" if trust else "skip" if skip_expressions else "refuse")
    network, arguments = build_network(config)
    size = windows(config)
    weights = folder / "models" / "model.pt"
    if not weights.is_file():
        raise ModelError(
            "WSI360", f"{weights} is missing; a TorchScript file in its place would be code, not weights"
        )
    file = read_tensors(weights)
    network.load_state_dict(checked_state(file, network.state_dict()), strict=True, assign=True)
    inside, out = _channels(config, arguments)
    prepared = preparation(config, inside)
    names = _names(metadata, out)
    spec = _spec(metadata, file, size, prepared, output(config, out), inside, names)
    return BundleModel(network.eval(), spec)


def _channels(config: Config, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return the network's inputs and outputs."""
    found = [arguments.get(name) for name in ("in_channels", "out_channels")]
    if not all(type(n) is int and 0 < n < 10_000 for n in found):
        raise ModelError(
            "WSI366",
            f"{config.path}: in_channels and out_channels are {found}; wanted two whole numbers, written out",
        )
    return int(found[0] or 0), int(found[1] or 0)


def _names(metadata: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return a name for each output, from ``network_data_format`` where it has one for each."""
    here: Any = metadata
    for key in ("network_data_format", "outputs", "pred", "channel_def"):
        here = here.get(key, {}) if isinstance(here, Mapping) else {}
    # a single output is what is looked for, though bundles describe it as 0 and 1
    first = int(count == 1 and isinstance(here, Mapping) and "1" in here)
    given = [here.get(str(k + first)) for k in range(count)] if isinstance(here, Mapping) else []
    names = [n for n in given if isinstance(n, str) and n.strip()]
    if len(set(names)) == len(names) == count:
        return tuple(names)
    return ("background", *(f"label {k}" for k in range(1, count))) if count > 1 else ("label 1",)


def _spec(
    metadata: Mapping[str, Any],
    file: TensorFile,
    size: Windows,
    prepared: Preparation,
    out: Output,
    channels: int,
    names: tuple[str, ...],
) -> ModelSpec:
    regions = (1,) if out.kind == "threshold" else ()
    objects = names if regions else names[1:]
    field = FieldSpec(
        FIELD, names, "labels", "argmax", size.weights, "uint8" if len(names) < 256 else "uint16",
        regions=regions, threshold=out.threshold,
    )  # fmt: skip
    return ModelSpec(
        name=str(metadata.get("name") or file.path.parent.parent.name),
        version=str(metadata.get("version", "unknown")),
        spacing=prepared.spacing_um,
        spacing_tolerance=0.001,
        tile=size.size,
        halo=(0, 0, 0),
        align=(1, 1, 1),
        channels=channels,
        dtype="",
        border="constant",
        fill=0.0,
        step=1.0 - size.overlap,
        interpolation="linear",
        orientation=prepared.orientation,
        normalise=(prepared.rule,) if prepared.rule else (),
        normalise_first=prepared.rule_first,
        fields=(field,),
        classes=tuple(ObjectClass(n, _color(k)) for k, n in enumerate(objects)),
        weights_sha256=file.sha256,
        licences=Licences(
            "Apache-2.0 (MONAI)", str(metadata.get("license", "not stated")), "see the bundle", None
        ),
    )


def _color(k: int) -> tuple[int, int, int]:
    """Return well-separated colours, the same for the same label."""
    from colorsys import hsv_to_rgb

    red, green, blue = hsv_to_rgb(k * 0.381966 % 1, 0.75, 0.9)  # the golden angle
    return round(255 * red), round(255 * green), round(255 * blue)
