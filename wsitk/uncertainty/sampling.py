"""A model asked several times: its mean answer, and how far the answers lie apart, as fields and object columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, ModelSpec, TileModel, TileResult
from wsitk.uncertainty.dropout import DropoutSampler, Kind, dropout_layers
from wsitk.uncertainty.interface import SampledModel
from wsitk.uncertainty.measures import MEASURES, Running
from wsitk.uncertainty.objects import OBJECT_COLUMNS, object_columns

__all__ = ["FIELD", "MonteCarlo", "Sampling"]

FIELD = "uncertainty"
"""The field of `MEASURES` beside the model's own."""

_VOTES = "uncertainty votes"

_WIDTHS: tuple[Literal["uint8", "uint16", "float32"], ...] = ("uint16", "float32")


class Sampling(TileModel):
    """Wraps a `SampledModel`: what it says on average, beside `MEASURES` of how far its answers differ.

    Predicts the mean of every output, post-processed as the model does; maps are stored in 16 bits, since the
    small differences matter here. `description` tells how samples come about; it enters the model's version, and with
    it the run key. Raises UsageError (WSI600) for fewer than two samples.
    """

    def __init__(self, model: SampledModel, samples: int, description: str) -> None:
        if samples < 2:
            raise UsageError(
                "WSI600", f"{samples} samples of {model.spec.name} can't differ; ask for 2 or more"
            )
        self.model = model
        self.samples = samples
        self.spec = _spec(model.spec, f"{samples} {description}")

    @property
    def network(self) -> nn.Module:
        return self.model.network

    def wants(self, tile: Tile) -> bool:
        """Tell what the model does."""
        return self.model.wants(tile)

    @abstractmethod
    def answers(self, batch: Tensor, starts: Sequence[tuple[int, ...]]) -> Iterable[dict[str, Tensor]]:
        """Yield the outputs of each sample, one after the other; `samples` of them."""

    @final
    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return what `predict_at` does for tiles that all lie at the image's corner."""
        return self.predict_at(batch, [(0,) * self.spec.ndim] * len(batch))

    @final
    def predict_at(self, batch: Tensor, starts: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """Return the mean of each output over the samples, ``uncertainty`` (N, 4, *tile), and what objects need."""
        running = Running()
        votes: Tensor | None = None
        for sample, outputs in enumerate(self.answers(batch, starts)):
            running.add(outputs, self.model.probabilities(outputs))
            if self.spec.objects:
                votes = _voted(
                    votes, sample, self.samples, self.model.foreground(outputs) > self.model.threshold
                )
        found = {**running.outputs, FIELD: running.measures()}
        return found if votes is None else {**found, _VOTES: votes}

    @final
    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return what the model makes of its mean answer, with the measures as a field and as object columns."""
        own = {name: value for name, value in outputs.items() if name not in (FIELD, _VOTES)}
        result = self.model.postprocess(own, tile)
        objects, measures = result.objects, outputs[FIELD]
        if objects is not None:
            batch = {name: torch.from_numpy(np.ascontiguousarray(value))[None] for name, value in own.items()}
            columns = object_columns(
                objects,
                tile,
                measures[MEASURES.index("mutual_information")],
                self.model.probabilities(batch)[0].numpy(),
                outputs[_VOTES],
                self.samples,
            )
            objects = objects.with_columns(**columns)
        return replace(result, objects=objects, fields={**result.fields, FIELD: measures})


def _voted(votes: Tensor | None, sample: int, samples: int, foreground: Tensor) -> Tensor:
    """Set the bit of a sample: `votes` is uint8 (N, ceil(samples / 8), *tile), the first sample in the highest."""
    if votes is None:
        shape = (len(foreground), -(-samples // 8), *foreground.shape[1:])
        votes = torch.zeros(shape, dtype=torch.uint8, device=foreground.device)
    votes[:, sample // 8] += foreground.to(torch.uint8) << (7 - sample % 8)
    return votes


def _spec(spec: ModelSpec, how: str) -> ModelSpec:
    """Return the model's spec with a field for `MEASURES` and the columns of its objects."""
    maps = [f for f in spec.fields if f not in spec.labels]
    # maps of one file share a type: the widest of the model's, and no less than 16 bits
    width = max((f.dtype for f in maps if f.dtype in _WIDTHS), key=_WIDTHS.index, default=_WIDTHS[0])
    window = maps[0].window if maps else "ramp"
    fields = [replace(f, dtype=width) if f in maps else f for f in spec.fields]
    return replace(
        spec,
        version=f"{spec.version}, {how}",
        fields=(*fields, FieldSpec(FIELD, MEASURES, window=window, dtype=width)),
        object_columns=(*spec.object_columns, *(OBJECT_COLUMNS if spec.objects else ())),
    )


@final
class MonteCarlo(Sampling):
    """Samples a model's dropout layers (Gal and Ghahramani 2016), and nothing else of it.

    Norms stay in evaluation mode. What comes before the first dropout layer is computed once for all `samples`.
    Each mask is a function of (`seed`, sample, layer), and for single elements of where they lie in the image, so
    that overlapping tiles share it. `kind` is what is dropped: whole maps (``spatial``; Tompson et al. 2015), single
    elements (``element``), or what each layer was trained with (``dropout``). `rate` replaces the layers' own rates,
    for networks that were trained without.

    Raises UsageError: WSI600, and WSI602 if there is nothing to drop.
    """

    def __init__(
        self,
        model: SampledModel,
        samples: int,
        *,
        seed: int = 0,
        kind: Kind = "dropout",
        rate: float | None = None,
    ) -> None:
        if rate is not None and not 0 <= rate <= 1:
            raise UsageError("WSI602", f"a rate of dropout lies in 0 to 1; got {rate}")
        what = kind if kind == "dropout" else f"{kind} dropout"
        at = "" if rate is None else f" at rate {rate:g}"
        super().__init__(model, samples, f"samples of {what}{at}, seed {seed}")
        self._dropout = DropoutSampler(model.network, seed=seed, kind=kind, rate=rate)
        if not self._dropout.sampled and rate != 0:
            raise UsageError("WSI602", f"{model.spec.name} {_nothing(model.network)}")

    def answers(self, batch: Tensor, starts: Sequence[tuple[int, ...]]) -> Iterable[dict[str, Tensor]]:
        """Yield the outputs under each sample's masks; the prefix is computed once."""
        with self._dropout.deterministic():
            features = self.model.prefix(batch)
        tile = tuple(batch.shape[2:])
        for sample in range(self.samples):
            with self._dropout.sampling(sample, starts, tile):
                outputs = self.model.suffix(features)
            yield outputs


def _nothing(network: nn.Module) -> str:
    """Say why there is nothing to sample, and what to do."""
    if dropout_layers(network):
        return (
            "was trained without dropout (all its rates are 0); give a rate (--dropout 0.1), or ask for another "
            "uncertainty (tta, ensemble)"
        )
    return "has no dropout layers, so there is nothing to sample; ask for another uncertainty (tta, ensemble)"
