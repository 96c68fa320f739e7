"""Segment Anything as the engine sees it: prompts in a file, an object for each.

A tile's embedding is computed on the device; the prompts that lie in it are decoded on the CPU, in the pool.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from wsitk.errors import ModelError, UsageError
from wsitk.grid import Tile
from wsitk.model import Licences, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.models.sam.network import MEAN, PATCH, STD, Sam, SamConfig, best, config_of, decode
from wsitk.models.sam.prompts import Prompts, read_prompts
from wsitk.objects import ObjectTable
from wsitk.torchfile import TensorFile, checked_state, read_tensors

__all__ = ["SamModel", "from_checkpoint", "is_ours", "load_network", "prompt_input"]

COLUMNS = ("predicted_iou", "prompt")

CHUNK = 8
"""Prompts that are decoded together. Always as many, so that the arithmetic doesn't depend on their number."""

COLORS = ((230, 57, 70), (42, 157, 143), (69, 123, 157), (244, 162, 97), (131, 56, 236), (255, 190, 11))

UNUSED = ("image_encoder.head.", "image_encoder.norm_head.")
"""MobileSAM's file still holds the classifier that its encoder was trained with."""

LICENCES = {
    "sam": Licences("Apache-2.0", "Apache-2.0", "SA-1B: research only", None),
    "sam-med2d": Licences("Apache-2.0", "Apache-2.0 (repository)", "SA-Med2D-20M: CC BY-NC-SA 4.0", False),
    "mobile-sam": Licences("Apache-2.0", "Apache-2.0", "SA-1B: research only", None),
}


@final
class SamModel(TileModel):
    """A SAM of any family, and prompts in level-0 pixels, which are its working pixels."""

    def __init__(
        self, network: Sam, spec: ModelSpec, prompts: Prompts, *, intensity: Sequence[float] | None = None
    ) -> None:
        self.spec = spec
        self.prompts = prompts
        self._network = network
        self._intensity = intensity
        # The decoder works on the CPU whatever the device: it is small, and postprocess runs in threads.
        self._decoder = _headless(network)

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return ``embedding`` (N, 256, S / 16, S / 16) of tiles (N, 1 or 3, [1,] S, S)."""
        x = batch[:, :, 0] if batch.ndim == 5 else batch
        x = self._bytes(x).expand(-1, 3, -1, -1)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        out: dict[str, Tensor] = self._network((x - mean) / std)
        return {"embedding": out["embedding"].float()}

    def _bytes(self, x: Tensor) -> Tensor:
        """Return pixels in 0..255: as they are if they are bytes, else from the range given, or the tile's own."""
        if self._intensity is None and x.dtype == torch.uint8:
            return x.float()
        x = x.float()
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        if self._intensity is not None:
            low, high = (torch.full_like(low, v) for v in self._intensity)
        return torch.where(high > low, (x - low) / (high - low), 0).clamp(0, 1) * 255

    def wants(self, tile: Tile) -> bool:
        """Tell whether the tile owns a prompt's middle."""
        return bool(len(self.prompts.centred(tile.owned)))

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return an object for each prompt whose middle the tile owns, and whose mask is not empty."""
        rows = self.prompts.centred(tile.owned)
        embedding = torch.from_numpy(outputs["embedding"])[None]
        size = self._decoder.config.size
        found: list[ObjectTable] = []
        with torch.inference_mode():
            for group in _groups(self.prompts, rows):
                filled = np.resize(group, CHUNK)  # the last ones again, to make it whole
                points, boxes, masks = prompt_input(self.prompts, filled, tile, self._decoder.config)
                logits, iou = best(*decode(self._decoder, embedding, points, boxes, masks))
                fine = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)[:, 0] > 0
                for k, row in enumerate(group):
                    table = self._object(fine[k].numpy(), float(iou[k]), int(row), tile)
                    found += [] if table is None else [table]
        objects = ObjectTable.concat(found) if found else ObjectTable.empty(self.spec.ndim, COLUMNS)
        return TileResult(objects)

    def _object(self, mask: NDArray[np.bool_], iou: float, row: int, tile: Tile) -> ObjectTable | None:
        if not mask.any():
            return None
        volume = self.spec.ndim == 3
        return ObjectTable.from_labels(
            (mask[None] if volume else mask).astype(np.uint8),
            origin=tile.read.start,
            class_id=self.prompts.class_id[row : row + 1],
            probability=np.array([min(max(iou, 0.0), 1.0)]),
            columns={"predicted_iou": np.array([iou]), "prompt": np.array([row])},
            tile=tile.index,
        )


def _headless(network: Sam) -> Sam:
    """Return a copy of the network on the CPU, without its encoder."""
    encoder = network.image_encoder
    try:
        network.image_encoder = torch.nn.Identity()
        return copy.deepcopy(network).to("cpu").eval()
    finally:
        network.image_encoder = encoder


def _groups(prompts: Prompts, rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield at most `CHUNK` prompts of one kind at a time: with a box or not, and as many points.

    What is added to fill a prompt up with points would change its answer.
    """
    points = np.diff(prompts.offset)[rows]
    kinds = 2 * points + np.isfinite(prompts.box_xy[rows, 0])
    for kind in np.unique(kinds):
        alike = rows[kinds == kind]
        yield from (alike[k : k + CHUNK] for k in range(0, len(alike), CHUNK))


def prompt_input(
    prompts: Prompts, rows: NDArray[Any], tile: Tile, config: SamConfig
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
    """Return points, boxes and masks of prompts of one kind as `decode` takes them, in the tile's pixels."""
    corner = np.array(tile.read.start[-2:][::-1], np.float64)
    count = int(prompts.offset[rows[0] + 1] - prompts.offset[rows[0]])
    points = boxes = masks = None
    if count:
        index = prompts.offset[rows][:, None] + np.arange(count)
        # Upstream names a pixel by its index and adds half of it; our coordinates are of its corner.
        places = prompts.point_xy[index] - corner - 0.5
        points = (
            torch.from_numpy(places.astype(np.float32)),
            torch.from_numpy(prompts.point_label[index].astype(np.int32)),
        )
    if np.isfinite(prompts.box_xy[rows[0], 0]):
        corners = prompts.box_xy[rows] - np.tile(corner, 2) - 0.5
        boxes = torch.from_numpy(corners.astype(np.float32))
    if prompts.masks is not None:
        masks = torch.stack([_low(prompts.masks, int(row), tile, config) for row in rows])
    return points, boxes, masks


def _low(masks: ObjectTable, row: int, tile: Tile, config: SamConfig) -> Tensor:
    """Return a mask as the prompt encoder takes it, (1, S / 4, S / 4): logits, or SAM-Med2D's probabilities."""
    y, x = (int(v) for v in masks.start[row] - np.array(tile.read.start[-2:]))
    mask = masks.mask(row)
    whole = torch.zeros(1, config.size, config.size)
    whole[0, y : y + mask.shape[0], x : x + mask.shape[1]] = torch.from_numpy(mask).float()
    share = F.avg_pool2d(whole, 4)
    return share if config.family == "sam-med2d" else share.clamp(1e-3, 1 - 1e-3).logit()


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are a SAM's of any family, by names and shapes."""
    return config_of(file.tensors) is not None


def load_network(path: str | Path) -> tuple[Sam, str]:
    """Return the network in an official file of SAM, SAM-Med2D or MobileSAM, and the file's SHA-256.

    Raises ModelError as `read_tensors` and `checked_state` do; WSI301 for other weights.
    """
    file = read_tensors(path)
    tensors = {name: v for name, v in file.tensors.items() if not name.startswith(UNUSED)}
    config = config_of(tensors)
    if config is None:
        raise ModelError(
            "WSI301",
            f"{file.path} holds no SAM, SAM-Med2D or MobileSAM; its first entry is {next(iter(tensors), '')!r}",
        )
    with torch.device("meta"):
        network = Sam(config)
    state = checked_state(replace(file, tensors=tensors), network.state_dict())
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval(), file.sha256


def from_checkpoint(
    path: str | Path,
    *,
    prompts: str | Path | Prompts | None = None,
    channels: int = 3,
    slices: bool = False,
    intensity: Sequence[float] | None = None,
) -> SamModel:
    """Return the model in an official file, with the prompts of a file (see `wsitk.models.sam.prompts`).

    `channels` is 3 for RGB or 1 for grey; `slices` takes a volume slice by slice; `intensity` are the values that
    become black and white (None: bytes as they are, other types by each tile's own range).

    Raises ModelError as `load_network` does, UsageError: WSI075, WSI076, WSI077 (a prompt that no tile is
    sure to hold).
    """
    if prompts is None:
        raise UsageError(
            "WSI075", "SAM outlines what prompts point at; name a file with them: --prompts FILE"
        )
    network, sha256 = load_network(path)
    given = prompts if isinstance(prompts, Prompts) else read_prompts(prompts)
    size, flat = network.config.size, (1,) if slices else ()
    halo = size // 4
    _check_sizes(given, 2 * halo)
    spec = ModelSpec(
        name=network.config.name,
        version=f"{Path(path).name}, {len(given)} prompts",
        spacing=None,
        tile=(*flat, size, size),
        halo=(*(0 for _ in flat), halo, halo),
        align=(*flat, PATCH, PATCH),
        channels=channels,
        dtype="",
        border="constant",
        fill=0,
        objects=True,
        exclusive=True,
        classes=tuple(ObjectClass(n, COLORS[k % len(COLORS)]) for k, n in enumerate(given.classes)),
        object_columns=COLUMNS,
        weights_sha256=f"{sha256}+{given.sha256}"
        + ("" if intensity is None else f"@{intensity[0]:g}:{intensity[1]:g}"),
        licences=LICENCES[network.config.family],
    )
    return SamModel(network, spec, given, intensity=intensity)


def _check_sizes(prompts: Prompts, largest: int) -> None:
    """Raise UsageError (WSI077) for a prompt that reaches farther than a tile does around what it owns."""
    bounds = prompts.bounds_xy
    side = (bounds[:, 2:] - bounds[:, :2]).max(axis=1)
    if side.max() > largest:
        row = int(side.argmax())
        raise UsageError(
            "WSI077",
            f"prompt {row + 1} spans {side[row]:.0f} px, more than the {largest} that a tile is sure to show; "
            "draw it on a coarser image",
        )
