"""Small models whose answer can be drawn several times, for the tests of uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.grid import Tile
from wsitk.model import FieldSpec, ModelSpec, ObjectClass, TileResult
from wsitk.objects import ObjectTable
from wsitk.uncertainty import SampledModel

REACH = 12
"""Pixels that `Net` looks far: 1 + 2 + 4 (at half the resolution) + 2 + 1, rounded up to the lattice."""


class Net(nn.Module):
    """A small U-Net: a stem before any dropout, then two scales with batch norm and dropout on each."""

    def __init__(self, rate: float, layer: type[nn.Module] = nn.Dropout2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Conv2d(8, 12, 2, 2)
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), layer(rate))
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), layer(rate))
        self.head = nn.Conv2d(8, 1, 1)
        self.runs = 0

    def prefix(self, x: Tensor) -> dict[str, Tensor]:
        self.runs += 1
        return {"stem": self.stem(x / 255 - 0.5)}

    def suffix(self, stem: Tensor) -> Tensor:
        y = self.up(self.deep(self.down(stem)))
        out: Tensor = self.head(self.join(torch.cat([stem, y], 1)))
        return out


def net(rate: float = 0.3, layer: type[nn.Module] = nn.Dropout2d, seed: int = 0) -> Net:
    """Return the network with random weights, and norms that have seen something."""
    torch.manual_seed(seed)
    network = Net(rate, layer)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]  # there when tracking
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    network.eval()
    with torch.no_grad():  # a head that says yes and no about as often, and not all too faintly
        y = network.suffix(network.prefix(scene().permute(2, 0, 1)[None].float())["stem"])
        scale = 2 / y.std()
        network.head.weight *= scale
        network.head.bias.copy_((network.head.bias - y.mean()) * scale)  # type: ignore[union-attr]  # it has one
    network.runs = 0
    return network


def scene(shape: tuple[int, int] = (130, 150), seed: int = 4) -> Tensor:
    """Return a blotchy picture, uint8 (H, W, 3)."""
    from scipy import ndimage

    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    soft = ndimage.gaussian_filter(noise, (3, 3, 0)) * 10
    return torch.from_numpy(np.clip(128 + 90 * soft, 0, 255).astype(np.uint8))


class Small(SampledModel):
    """`Net` as the engine sees it: one map, and (if asked for) the connected pieces of what is above one half."""

    def __init__(
        self,
        network: Net,
        *,
        objects: bool = False,
        halo: int = REACH,
        dtype: Any = "float32",
        window: Any = "ramp",
        batch: int = 1,
    ) -> None:
        self._network = network
        self.vectors = {}
        self.spec = ModelSpec(
            name="small",
            version="1",
            spacing=(0.5, 0.5),
            tile=(64, 64),
            halo=(halo, halo),
            align=(2, 2),
            fields=(FieldSpec("probability", ("Thing",), window=window, dtype=dtype),),
            objects=objects,
            classes=(ObjectClass("Thing", (255, 0, 0)),) if objects else (),
            compute_batch=batch,
        )

    @property
    def network(self) -> Net:
        return self._network

    def prefix(self, batch: Tensor) -> dict[str, Tensor]:
        return self._network.prefix(batch.float())

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"probability": self._network.suffix(features["stem"]).sigmoid()}

    def probabilities(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([1 - outputs["probability"], outputs["probability"]], 1)

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        from scipy import ndimage

        fields = {"probability": outputs["probability"]}
        if not self.spec.objects:
            return TileResult(None, fields)
        labels, _ = ndimage.label(outputs["probability"][0] > self.threshold)
        return TileResult(ObjectTable.from_labels(labels, origin=tile.read.start, tile=tile.index), fields)


class Thick(SampledModel):
    """Two convolutions in three dimensions with dropout between them."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        layers = (nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Dropout3d(0.4), nn.Conv3d(6, 1, 3, padding=1))
        self._network = nn.Sequential(*layers).eval()
        self.spec = ModelSpec(
            name="thick",
            version="1",
            spacing=(1000.0,) * 3,
            tile=(16, 24, 24),
            halo=(4, 4, 4),
            align=(1, 1, 1),
            channels=1,
            fields=(FieldSpec("probability", ("Thing",), window="crop", dtype="float32"),),
        )

    @property
    def network(self) -> nn.Module:
        return self._network

    def prefix(self, batch: Tensor) -> dict[str, Tensor]:
        return {"x": self._network[:2](batch.float() / 64)}

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"p": (4 * self._network[2:](features["x"])).sigmoid()}

    def probabilities(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([1 - outputs["p"], outputs["p"]], 1)

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        return TileResult(None, {"probability": outputs["p"]})


class Canned(SampledModel):
    """Gives out distributions that were put into it, whatever it sees: sample after sample."""

    def __init__(self, answers: list[Tensor], dropout: bool = True) -> None:
        self._answers, self._next = answers, 0
        self._network = nn.Sequential(nn.Dropout2d(0.5)) if dropout else nn.Identity()
        self.spec = ModelSpec(
            "canned", "1", None, tuple(answers[0].shape[2:]), (0, 0), (1, 1), fields=(FieldSpec("p", ("p",)),)
        )

    @property
    def network(self) -> nn.Module:
        return self._network

    def prefix(self, batch: Tensor) -> dict[str, Tensor]:
        return {}

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._next += 1
        return {"p": self._answers[(self._next - 1) % len(self._answers)]}

    def probabilities(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["p"]

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        return TileResult(None, {"p": np.asarray(outputs["p"][:1])})


def small_model(rate: float = 0.3) -> Small:
    """Return a model that finds objects: to be built by name in another process."""
    return Small(net(rate), objects=True, dtype="uint8")
