"""Deep ensembles: several trainings of one architecture, asked one after the other (Lakshminarayanan et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import final

from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.model import ModelSpec
from wsitk.uncertainty.interface import SampledModel
from wsitk.uncertainty.sampling import Sampling

__all__ = ["Ensemble"]


@final
class Ensemble(Sampling):
    """The mean of several models, which differ in their weights only; the first post-processes for all.

    Raises UsageError: WSI600 for fewer than two, WSI608 for models that see or say different things.
    """

    def __init__(self, models: Sequence[SampledModel]) -> None:
        first = models[0]
        super().__init__(first, len(models), "models")
        for number, other in enumerate(models[1:], start=2):
            odd = _difference(first, other)
            if odd:
                raise UsageError(
                    "WSI608",
                    f"model {number} of the ensemble, {other.spec.name} {other.spec.version}, differs from the first "
                    f"in {odd}; take trainings of one architecture on one set of classes",
                )
        self._models = tuple(models)
        self._networks = nn.ModuleList([model.network for model in models])
        # the first one's version alone would not tell two ensembles apart
        named = "+".join(m.spec.weights_sha256 or m.spec.version for m in models)
        self.spec = replace(self.spec, weights_sha256=named)

    @property
    def network(self) -> nn.Module:
        return self._networks

    def answers(self, batch: Tensor, starts: Sequence[tuple[int, ...]]) -> Iterable[dict[str, Tensor]]:
        """Yield the outputs of each model."""
        for model in self._models:
            yield model.predict(batch)


_SAME = (
    "spacing", "tile", "halo", "align", "channels", "dtype", "border", "fill", "step", "interpolation", "crop",
    "normalise", "normalise_first", "fields", "objects", "classes", "object_columns", "compute_batch",
)  # fmt: skip


def _difference(first: SampledModel, other: SampledModel) -> str:
    """Return the first thing that two models differ in, apart from name, version and weights; empty if nothing."""
    if type(first) is not type(other) or type(first.network) is not type(other.network):
        return "architecture"
    a: ModelSpec = first.spec
    return next((name for name in _SAME if getattr(a, name) != getattr(other.spec, name)), "")
