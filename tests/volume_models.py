"""Small models of volumes, whole and in chunks; built by ``volume_models:name`` in other processes, too."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from radiology_fill import load_filled

from wsitk.grid import Tile
from wsitk.model import ChunkedModel, FieldSpec, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.volumes.nnunet_rules import IntensityRule

NAMES = ("background", "liver", "spleen", "kidney", "aorta")
MIRROR = (0, 1, 2)


class Net(torch.nn.Module):
    """A convolution that sees a neighbourhood, and a point-wise head: enough for a wrong tile to be seen."""

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()
        self.body = torch.nn.Conv3d(channels, 6, 3, padding=1)
        self.head = torch.nn.Conv3d(6, classes, 1)
        load_filled(self, scale=4.0)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(self.body(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def spec_of(**changes: Any) -> ModelSpec:
    field = FieldSpec(
        "organs", NAMES, kind="labels", reduction="argmax", window="gaussian", activation="softmax"
    )
    spec = ModelSpec(
        "volume-test",
        "1",
        spacing=None,
        tile=(16, 16, 32),
        halo=(0, 0, 0),
        align=(1, 1, 1),
        step=0.5,
        channels=1,
        dtype="",
        border="constant",
        fill=0.0,
        fields=(field,),
        classes=tuple(ObjectClass(n, (k, 2 * k, 3)) for k, n in enumerate(NAMES)),
    )
    return replace(spec, **changes)


def views(mirror: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(mirror, n) for n in range(len(mirror) + 1)))


class Whole(TileModel):
    """All classes at once: `predict` returns probabilities, averaged under the flips of `mirror`."""

    def __init__(self, net: torch.nn.Module, spec: ModelSpec, mirror: tuple[int, ...] = ()) -> None:
        self.net, self.spec, self.mirror = net, spec, mirror

    @property
    def network(self) -> torch.nn.Module:
        return self.net

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        total = torch.zeros(())
        for view in views(self.mirror):
            axes = tuple(a + 2 for a in view)
            total = total + self.net(batch.flip(axes)).softmax(1).flip(axes)
        return {"organs": total / len(views(self.mirror))}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        return TileResult(fields={"organs": outputs["organs"]})


class Chunked(ChunkedModel):
    """The same, a few classes at a time."""

    def __init__(self, net: Net, spec: ModelSpec, mirror: tuple[int, ...] = ()) -> None:
        self.net, self.spec, self.mirror = net, spec, mirror
        self.views = len(views(mirror))

    @property
    def network(self) -> torch.nn.Module:
        return self.net

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        found = []
        for view in views(self.mirror):
            axes = tuple(a + 2 for a in view)
            found.append(self.net.features(batch.flip(axes)).flip(axes))
        return {"features": torch.stack(found, 1)}

    def head(self, features: Mapping[str, torch.Tensor], name: str, start: int, stop: int) -> torch.Tensor:
        head = self.net.head
        return torch.nn.functional.conv3d(
            features["features"][0], head.weight[start:stop], head.bias[start:stop]
        )


def organs() -> Chunked:
    """Return a model that crops, resamples and normalises."""
    rules = (IntensityRule("zscore"),)
    spec = spec_of(spacing=(1500.0,) * 3, interpolation="cubic", crop=True, normalise=rules)
    return Chunked(Net(5), spec)


def run_organs(path: str, out: str) -> None:
    """Run that model over a file, in this process."""
    import wsitk

    wsitk.run(organs(), path, out=out, threads=1, workers=2, preview=False, device="cpu")


class Bright(TileModel):
    """Labels voxels above 0 as they are, with 2 above 1000: what it must say of an input is known."""

    spec = spec_of(
        fields=(FieldSpec("f", ("", "bright", "glaring"), kind="labels", reduction="argmax"),), classes=()
    )

    @property
    def network(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        kind = (batch > 0).long() + (batch > 1000)
        return {"f": torch.cat([(kind == k).float() for k in range(3)], 1)}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        return TileResult(fields={"f": outputs["f"]})


def bright() -> Bright:
    """Return the model that labels what is bright."""
    return Bright()


# --- tiles that end in misfortune, told by their first voxel ---------------------------------------------

POISON, ONCE = 30_000.0, 29_000.0


class _Unlucky(Chunked):
    """Meets its `fate` at tiles that begin with `POISON`, and at those with `ONCE` from the second time on."""

    fate = "kill"

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        first = float(batch[0, 0, 0, 0, 0])
        if first == POISON or (first == ONCE and self._seen()):
            if self.fate == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return {n: v * float("nan") for n, v in super().predict(batch).items()}
        return super().predict(batch)

    def _seen(self) -> bool:
        mark = Path(os.environ["WSITK_TEST_MARK"])
        seen = mark.exists()
        mark.touch()
        return seen


def unlucky() -> Chunked:
    """Return a model that is killed by the tiles it cannot bear."""
    return _Unlucky(Net(5), spec_of(normalise=(IntensityRule("none"),)))


def failing() -> Chunked:
    """Return the same model, which answers without numbers instead."""
    model = _Unlucky(Net(5), spec_of(normalise=(IntensityRule("none"),)))
    model.fate = "fail"
    return model
