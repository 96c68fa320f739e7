"""One interface for whatever finds artifacts: it sees a slide's planes and says where each kind lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from wsitk.artifacts.mask import ArtifactMask, check_kinds
from wsitk.artifacts.planes import GRID_UM, Planes, measure
from wsitk.errors import UsageError
from wsitk.sources.base import Source

__all__ = ["ArtifactDetector", "detector_named", "find_artifacts", "judge"]


class ArtifactDetector(ABC):
    """Finds artifacts in the planes of a whole slide; it reads no pixels itself.

    Subclasses must give the same answer for the same planes. `kinds` is what it can find; `limits_um` says of
    some of them at which pixel size they can't be seen any more.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    limits_um: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def find(self, planes: Planes, kinds: Sequence[str]) -> Mapping[str, NDArray[np.bool_]]:
        """Return a boolean array of the planes' shape for each of `kinds`."""

    @final
    def chosen(self, kinds: Sequence[str] | None, spacing_um: float, name: str) -> tuple[str, ...]:
        """Return the kinds to look for at a pixel size; None takes all that can be seen at it.

        Raises UsageError: WSI660 for an unknown kind, WSI662 for one that needs finer pixels.
        """
        seen = tuple(k for k in self.kinds if spacing_um <= self.limits_um.get(k, inf))
        if kinds is None:
            return seen
        wanted = check_kinds(kinds, self.kinds)
        if not wanted:
            raise UsageError("WSI660", f"no kind of artifact was named; there are {', '.join(self.kinds)}")
        hidden = [k for k in wanted if k not in seen]
        if hidden:
            raise UsageError(
                "WSI662",
                f"{name}: {', '.join(hidden)} can't be seen in pixels of {spacing_um:.3g} µm "
                f"(limit {self.limits_um[hidden[0]]}); give a finer scan, or ask for {', '.join(seen)}",
            )
        return wanted


def find_artifacts(
    source: Source,
    kinds: Sequence[str] | None = None,
    detector: str | ArtifactDetector = "classical",
    spacing_um: float = GRID_UM,
) -> ArtifactMask:
    """Return where a slide's artifacts lie, on a grid of about `spacing_um` micrometres over all of level 0.

    The slide is read once, window by window, at about 1 µm per pixel; what is kept of it is some numbers for
    each pixel of the grid. The grid has at most 2**24 pixels: of a larger slide they are coarser, so that
    memory does not follow the slide. What can't be read is not searched, and `warnings` says how much.

    Parameters
    ----------
    source
        A brightfield slide, (y, x, 3) uint8, of known pixel size.
    kinds
        Out of `KINDS`; None looks for all that the pixel size lets one see, which `mask.kinds` then names.
    detector
        ``classical``, or a detector of your own.

    Raises
    ------
    UsageError
        WSI660 for unknown kinds, WSI662 for those that need finer pixels, WSI663 for an unknown detector,
        WSI664 for an image that is no brightfield slide.
    SpacingError
        WSI201, WSI202 without a usable pixel size.
    """
    return judge(measure(source, spacing_um), kinds, detector)


def judge(
    planes: Planes, kinds: Sequence[str] | None = None, detector: str | ArtifactDetector = "classical"
) -> ArtifactMask:
    """Return what a detector finds in planes that were measured before; as `find_artifacts`."""
    found = detector_named(detector) if isinstance(detector, str) else detector
    wanted = found.chosen(kinds, max(planes.level0_um), planes.name)
    marked = found.find(planes, wanted)
    return ArtifactMask.of_kinds(
        {kind: marked[kind] & planes.seen for kind in wanted},
        planes.scale,
        um=planes.level0_um,
        warnings=planes.warnings,
    )


def detector_named(name: str) -> ArtifactDetector:
    """Return a detector of wsitk; raises UsageError (WSI663) for a name that isn't there."""
    from wsitk.artifacts.classical import ClassicalDetector

    known = {ClassicalDetector.name: ClassicalDetector}
    if name not in known:
        raise UsageError("WSI663", f"no detector {name!r}; there are {', '.join(known)}")
    return known[name]()
