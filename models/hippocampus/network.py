"""A STU-Net that is narrow and shallow: the published family's blocks, fewer of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from wsitk.models.stunet.network import STUNet, STUNetConfig
from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["CLASSES", "NORMALISE", "ShallowConfig", "narrow_stunet"]

CLASSES = ("Background", "Anterior", "Posterior")

NORMALISE = IntensityRule("zscore")
"""By the whole crop's own mean and deviation: what the engine does to an input of this model."""


@final
@dataclass(frozen=True)
class ShallowConfig(STUNetConfig):
    """As the family's, but with as many stages as `pools` asks for: the crops are too small for six."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Return the channels of each stage, finest first."""
        return super().dims[: len(self.pools) + 1]


def narrow_stunet(base: int = 12, levels: int = 3) -> STUNet:
    """Return the network for `CLASSES`, untrained: sides of its input are multiples of ``2 ** levels``."""
    if not (0 < base <= 64 and 0 < levels <= 5):
        raise ValueError(f"base {base} and levels {levels}, wanted 1 to 64 and 1 to 5")
    return STUNet(ShallowConfig(base, classes=len(CLASSES), pools=((2, 2, 2),) * levels))
