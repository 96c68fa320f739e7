"""What a network is trained on: labelled images, sets of them, and sets made of sets.

Labels say three things of a pixel, and a fourth: that nobody looked. Nothing is learned from the fourth.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError

__all__ = ["UNLABELLED", "IGNORE", "Image", "Labels", "Types", "Example", "Dataset", "Joined", "Subset"]

Image = NDArray[np.uint8]
Labels = NDArray[np.int32]
Types = NDArray[np.uint8]

UNLABELLED = -1
"""In an instance map: a pixel that nobody labelled. It may be anything."""

IGNORE = 255
"""In a type map and in targets: no statement; no loss is taken there."""


@dataclass(frozen=True, eq=False)
class Example:
    """One labelled image.

    Attributes
    ----------
    image : uint8 (H, W, 3)
    inst : int32 (H, W)
        Number of the nucleus, 0 for background, `UNLABELLED` where nobody looked.
    types : uint8 (H, W) or None
        0 for background, k for ``classes[k - 1]`` of the set, `IGNORE` where the type is not known; None if
        the set names no types.
    spacing_um
        Micrometres per pixel.
    tissue, group
        Kind of tissue (empty if unknown), and the slide or patient: what a split must not cut in two.
    weight
        Factor of how often it is drawn.
    """

    image: Image
    inst: Labels
    types: Types | None
    spacing_um: float
    tissue: str = ""
    group: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        shape = self.inst.shape
        right = self.image.shape == (*shape, 3) and (self.types is None or self.types.shape == shape)
        if not right or len(shape) != 2:
            types = None if self.types is None else self.types.shape
            raise UsageError(
                "WSI900",
                f"{self.group or 'example'}: image {self.image.shape}, instances {shape}, types {types}; "
                "wanted (H, W, 3), (H, W) and (H, W)",
            )

    def count(self, classes: int) -> NDArray[np.int64]:
        """Return how many nuclei of each of `classes` types there are, by the type of most of their pixels."""
        if self.types is None or not classes:
            return np.zeros(classes, np.int64)
        inside = self.inst > 0
        _, nucleus = np.unique(self.inst[inside], return_inverse=True)
        votes = np.zeros((int(nucleus.max(initial=-1)) + 1, IGNORE + 1), np.int32)
        np.add.at(votes, (nucleus, self.types[inside]), 1)
        return np.bincount(votes.argmax(1), minlength=IGNORE + 1)[1 : classes + 1].astype(np.int64)


class Dataset(ABC):
    """Labelled images in a fixed order. Reading is thread-safe and the object can be pickled.

    Attributes
    ----------
    name
        What a person calls it.
    classes
        Type k of an `Example` is ``classes[k - 1]``; empty if the set names none.
    warnings
        What a reader of the results should know, one line each.
    """

    name: str
    classes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def read(self, index: int) -> Example:
        """Return image `index`; the same one every time. Raises SourceError or UsageError, naming the file."""

    @property
    @abstractmethod
    def tissues(self) -> tuple[str, ...]:
        """Return the tissue of each image, without reading it."""

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Return the slide or patient of each image, without reading it."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """Return the factor of how often each image is drawn, float64 (N,)."""
        return np.ones(len(self))

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells these data from others, as plain JSON: names and sizes of files, no paths."""

    def count(self, index: int) -> NDArray[np.int64]:
        """Return the number of nuclei of each class in image `index`."""
        return self.read(index).count(len(self.classes))

    @final
    def cells(self, cache: Path | None = None) -> NDArray[np.int64]:
        """Return the number of nuclei of each class in each image, int64 (images, classes).

        Counting reads everything once. `cache` is a folder of the run, where the answer is kept under a name
        made from `identity`, so that it is never another set's.
        """
        text = json.dumps([self.identity(), self.classes], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        file = None if cache is None else cache / f"cells-{digest}.npz"
        if file is not None and file.exists():
            with np.load(file, allow_pickle=False) as stored:
                return np.asarray(stored["cells"], np.int64)
        counted = np.zeros((len(self), len(self.classes)), np.int64)
        for index in range(len(self)) if self.classes else ():
            counted[index] = self.count(index)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, cells=counted)
            partial.replace(file)
        return counted


@final
class Subset(Dataset):
    """Some images of a set, in the order given: a fold, or one side of a split."""

    def __init__(self, whole: Dataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, tuple(int(i) for i in indices)
        self.name, self.classes, self.warnings = whole.name, whole.classes, whole.warnings
        tissues, groups = whole.tissues, whole.groups
        self._tissues = tuple(tissues[i] for i in self.indices)
        self._groups = tuple(groups[i] for i in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Example:
        return self.whole.read(self.indices[index])

    def count(self, index: int) -> NDArray[np.int64]:
        return self.whole.count(self.indices[index])

    @property
    def tissues(self) -> tuple[str, ...]:
        return self._tissues

    @property
    def groups(self) -> tuple[str, ...]:
        return self._groups

    @property
    def weights(self) -> NDArray[np.float64]:
        return self.whole.weights[list(self.indices)]

    def identity(self) -> dict[str, Any]:
        return {"subset": self.whole.identity(), "indices": list(self.indices)}


@final
class Joined(Dataset):
    """Several sets as one, with one list of classes.

    Parameters
    ----------
    classes
        Those to learn; by default all names that occur, in the order of the sets.
    rename
        Other names of the same thing: ``{"Tumor": "Neoplastic"}``. A nucleus of a class that is not to be
        learned keeps its outline and loses its type.
    shares
        How often each set is drawn, whatever its number of images; by default each image counts the same.

    Raises UsageError: WSI901 for no sets at all, or another number of shares.
    """

    def __init__(
        self,
        parts: Sequence[Dataset],
        *,
        classes: Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        if not parts or (shares is not None and len(shares) != len(parts)):
            raise UsageError(
                "WSI901", f"{len(parts)} sets and {len(shares or ())} shares; give a share for each set"
            )
        names = [[(rename or {}).get(c, c) for c in part.classes] for part in parts]
        self.parts, self.shares = tuple(parts), shares
        self.name = " + ".join(part.name for part in parts)
        self.classes = tuple(
            classes if classes is not None else dict.fromkeys(n for own in names for n in own)
        )
        self.warnings = tuple(w for part in parts for w in part.warnings)
        self._tables = [_table(own, self.classes) for own in names]
        self._first = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return part, index - int(self._first[part])

    def read(self, index: int) -> Example:
        part, own = self._place(index)
        example = self.parts[part].read(own)
        # without a class of its own, a set says nothing of types, not even of the background's
        silent = example.types is None or not self.parts[part].classes
        return replace(example, types=None if silent else self._tables[part][example.types])

    def count(self, index: int) -> NDArray[np.int64]:
        part, own = self._place(index)
        counts = np.zeros(len(self.classes), np.int64)
        to = self._tables[part][1 : len(self.parts[part].classes) + 1]
        known = to != IGNORE
        np.add.at(counts, to[known].astype(np.int64) - 1, self.parts[part].count(own)[known])
        return counts

    @property
    def tissues(self) -> tuple[str, ...]:
        return tuple(t for part in self.parts for t in part.tissues)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(g for part in self.parts for g in part.groups)

    @property
    def weights(self) -> NDArray[np.float64]:
        each = [part.weights for part in self.parts]
        if self.shares is not None:
            # as if every set had the mean number of images
            each = [s * w / w.sum() * len(self) for s, w in zip(self.shares, each, strict=True)]
        return np.concatenate(each)

    def identity(self) -> dict[str, Any]:
        return {"joined": [part.identity() for part in self.parts], "shares": list(self.shares or ())}


def _table(own: Sequence[str], common: Sequence[str]) -> Types:
    """Return the look-up from a set's own type numbers to the common ones, uint8 (256,)."""
    table = np.full(IGNORE + 1, IGNORE, np.uint8)
    table[0] = 0
    for number, name in enumerate(own, 1):
        if name in common:
            table[number] = list(common).index(name) + 1
    return table
