"""What a model must say of itself for its doubt to be measured: where chance begins, and what its answer means."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from wsitk.model import TileModel

if TYPE_CHECKING:
    import torch

__all__ = ["SampledModel"]


class SampledModel(TileModel):
    """A model whose answer can be drawn several times; `predict` is the answer without chance.

    `predict` is cut in two. `prefix` is computed once for a batch, `suffix` once for each sample; all layers that
    are sampled (dropout) are run by `suffix`. A network is never put into training mode for that: the masks come
    from hooks on its dropout layers, see `wsitk.uncertainty.MonteCarlo`.

    Attributes
    ----------
    threshold
        Probability of foreground from which a pixel counts as part of an object.
    vectors
        How outputs turn when the image is mirrored or turned, for test-time augmentation: output's name -> for each
        of its channels the spatial axis (0 is the first) along which that channel points, every axis once. Outputs
        that are not named are plain maps. None says that the model doesn't know, and its image is never turned.
    """

    threshold: float = 0.5
    vectors: Mapping[str, tuple[int, ...]] | None = None

    @abstractmethod
    def prefix(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return everything before the first layer that is sampled, for pixels (N, C, *tile) as for `predict`."""

    @abstractmethod
    def suffix(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what `predict` returns, from what `prefix` returned; `features` must stay as they are.

        Float tensors (N, C, ...) whose mean over samples is an answer, too: probabilities, not logits.
        """

    @abstractmethod
    def probabilities(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return each pixel's distribution over classes, float32 (N, C, *tile), C from 2, background first.

        Sums to one over C; a model of one class gives ``(1 - p, p)``. Measures of uncertainty are taken from it.
        """

    def foreground(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the probability (N, *tile) that a pixel is part of an object: of all but the background."""
        return self.probabilities(outputs)[:, 1:].sum(1)

    @final
    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the answer without chance: `suffix` of `prefix`."""
        return self.suffix(self.prefix(batch))
