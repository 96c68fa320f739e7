"""Measures of uncertainty, as running sums over samples: T samples need the memory of one.

All lie in 0 to 1. Entropies are in units of log C, the entropy of complete ignorance among C classes: for two
classes these are bits. With p_t a pixel's distribution in sample t, and p their mean:

- ``variance``: of the probability over samples, averaged over classes (with two, that of either);
- ``predictive_entropy`` H[p]: all uncertainty;
- ``expected_entropy`` E[H[p_t]]: what stays whichever sample is true; blurred borders, mixed classes;
- ``mutual_information`` H[p] - E[H[p_t]]: what samples disagree about, which more data could teach (BALD; Houlsby
  et al. 2011, eq. 2; Gal and Ghahramani 2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

__all__ = ["MEASURES", "Running", "entropy"]

MEASURES = ("variance", "predictive_entropy", "expected_entropy", "mutual_information")
"""The channels of `Running.measures`, in their order."""


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy (N, ...) of distributions (N, C, ...) in units of log C: 0 to 1, exactly 0 if certain."""
    nats: Tensor = torch.special.entr(probabilities).sum(1)
    return nats.div_(math.log(probabilities.shape[1])).clamp_(0, 1)


@final
class Running:
    """Means over samples and their spread, updated by Welford's rule (1962).

    Samples that are all the same leave every mean at that value to the last bit, and the spread at zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.outputs: dict[str, Tensor] = {}
        self._mean = torch.empty(0)
        self._squares = torch.empty(0)
        self._entropy = torch.empty(0)

    def add(self, outputs: Mapping[str, Tensor], probabilities: Tensor) -> None:
        """Take one sample: its outputs, and each pixel's distribution (N, C, ...); both stay as they are."""
        self.count += 1
        probabilities = probabilities.float()
        if self.count == 1:
            self.outputs = {name: value.float().clone() for name, value in outputs.items()}
            self._mean = probabilities.clone()
            self._squares = torch.zeros_like(self._mean)
            self._entropy = entropy(probabilities)
            return
        for name, value in outputs.items():
            self._move(self.outputs[name], value.float())
        change = probabilities - self._mean
        self._mean.add_(change, alpha=1 / self.count)
        self._squares.addcmul_(change, probabilities - self._mean)
        self._move(self._entropy, entropy(probabilities))

    def _move(self, mean: Tensor, value: Tensor) -> None:
        mean.add_(value - mean, alpha=1 / self.count)

    def measures(self) -> Tensor:
        """Return `MEASURES` of the samples so far: float32 (N, 4, ...).

        Mutual information is at least 0 and at most the predictive entropy, whatever was rounded.
        """
        total = entropy(self._mean)
        variance = self._squares.mean(1) / self.count
        mutual = (total - self._entropy).clamp_(min=0)
        return torch.stack([variance, total, self._entropy, mutual], dim=1)
