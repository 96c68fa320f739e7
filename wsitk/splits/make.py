"""Divide whole groups among parts so that sizes and strata come as near to what was asked as groups allow.

Large groups first, each where it mends most, then single groups move as long as that helps. The measure is
the squared distance from each part's share of each stratum, and of everything, over that share, so that a rare
stratum counts as much as a common one. Groups of one order of magnitude come in an order drawn from the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError

__all__ = ["Split", "make_split", "parse_parts"]

PASSES = 5
"""Rounds of moves; the first does nearly all."""


@dataclass(frozen=True)
class Split:
    """The part of each item, and what that achieved.

    Attributes
    ----------
    part
        Name of the part of each item.
    wanted
        Share that was asked for, by part.
    items, groups
        Number of items and of groups, by part.
    strata
        Number of items by part and stratum; empty without strata.
    """

    part: tuple[str, ...]
    wanted: Mapping[str, float]
    items: Mapping[str, int]
    groups: Mapping[str, int]
    strata: Mapping[str, Mapping[str, int]]


def parse_parts(text: str) -> dict[str, float]:
    """Return ``train=.7,val=.15,test=.15`` as shares by name. Raises UsageError (WSI930)."""
    parts: dict[str, float] = {}
    for piece in text.split(","):
        name, _, share = (word.strip() for word in piece.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not name or name in parts or not 0 < value < 1:
            raise UsageError(
                "WSI930", f"--parts has {piece.strip()!r}, wanted NAME=SHARE between 0 and 1, each name once"
            )
        parts[name] = value
    _check_parts(parts)
    return parts


def _check_parts(parts: Mapping[str, float]) -> None:
    total = sum(parts.values())
    if len(parts) < 2 or abs(total - 1) > 1e-6 or min(parts.values()) <= 0:
        raise UsageError(
            "WSI930", f"{len(parts)} parts with shares that add up to {total:g}, wanted two or more and 1"
        )


def make_split(
    groups: Sequence[str],
    parts: Mapping[str, float],
    strata: Sequence[str] | None = None,
    seed: int = 0,
) -> Split:
    """Return a division of items into `parts`, given each item's group, that divides no group.

    The same groups, shares, strata and seed give the same split, whatever the order of the items. Every part
    gets a group at least. Raises UsageError: WSI930 (shares), WSI933 (fewer groups than parts, or lists of
    different lengths).
    """
    _check_parts(parts)
    if strata is not None and len(strata) != len(groups):
        raise UsageError("WSI933", f"{len(groups)} groups but {len(strata)} strata; give one for each item")
    names, of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < len(parts):
        raise UsageError(
            "WSI933",
            f"{len(names)} groups can't fill {len(parts)} parts; ask for fewer, or bring more slides",
        )
    kinds, kind = np.unique(
        np.asarray(strata if strata is not None else [""] * len(groups), dtype=str), return_inverse=True
    )
    counts = np.zeros((len(names), len(kinds)))
    np.add.at(counts, (of, kind), 1)
    part = _assign(counts, np.array(list(parts.values())), _order(names, counts.sum(axis=1), seed))
    return _described(part, of, parts, kinds if strata is not None else None, kind)


def _order(names: NDArray[np.str_], sizes: NDArray[np.float64], seed: int) -> list[int]:
    """Return the groups, large ones first; those within a factor of two in an order drawn from the seed."""
    drawn = [hashlib.sha256(f"{seed}\0{name}".encode()).digest() for name in names.tolist()]
    bucket = np.frexp(sizes)[1]
    return sorted(range(len(names)), key=lambda i: (-int(bucket[i]), drawn[i]))


def _assign(
    counts: NDArray[np.float64], shares: NDArray[np.float64], order: Sequence[int]
) -> NDArray[np.intp]:
    """Return the part of each group; `counts` is (groups, strata)."""
    # All items together are one more stratum: parts keep their size even where the strata say little.
    counts = np.concatenate([counts, counts.sum(axis=1, keepdims=True)], axis=1)
    wanted = shares[:, None] * counts.sum(axis=0) / shares.sum()
    state = _Parts(counts, wanted)
    for group in order:
        state.put(group, int(np.argmin(state.cost_of_adding(group))))
    for part in range(len(shares)):
        if state.groups[part] == 0:
            movable = [g for g in order if state.groups[state.part[g]] > 1]
            state.put(min(movable, key=lambda g: state.cost_of_moving(g)[part]), part)
    for _ in range(PASSES):
        if not sum(state.improve(group) for group in order):
            break
    return state.part


class _Parts:
    """Parts while they are being filled."""

    def __init__(self, counts: NDArray[np.float64], wanted: NDArray[np.float64]) -> None:
        self.part = np.full(len(counts), -1)
        self.groups = np.zeros(len(wanted), int)
        self._counts, self._wanted = counts, wanted
        self._over = -wanted
        """What each part holds of each stratum, less what it should."""

    def put(self, group: int, part: int) -> None:
        """Put a group into a part, out of the one where it was."""
        before = self.part[group]
        if before >= 0:
            self._over[before] -= self._counts[group]
            self.groups[before] -= 1
        self._over[part] += self._counts[group]
        self.groups[part] += 1
        self.part[group] = part

    def cost_of_adding(self, group: int) -> NDArray[np.float64]:
        """Return, for each part, by how much the sum of squares grows with this group in it."""
        size = self._counts[group]
        cost: NDArray[np.float64] = ((2 * size * self._over + size * size) / self._wanted).sum(axis=1)
        return cost

    def cost_of_moving(self, group: int) -> NDArray[np.float64]:
        """Return, for each part, by how much the sum of squares grows if this group moves there."""
        size, here = self._counts[group], self.part[group]
        leaving = ((size * size - 2 * size * self._over[here]) / self._wanted[here]).sum()
        cost: NDArray[np.float64] = self.cost_of_adding(group) + leaving
        cost[here] = 0
        return cost

    def improve(self, group: int) -> bool:
        """Move a group to where it mends most, unless its part would be empty; return whether it moved."""
        cost = self.cost_of_moving(group)
        best = int(np.argmin(cost))
        # Not for the last bits: two parts could pass a group to and fro.
        if cost[best] > -1e-9 or self.groups[self.part[group]] == 1:
            return False
        self.put(group, best)
        return True


def _described(
    part: NDArray[np.intp],
    of: NDArray[np.intp],
    parts: Mapping[str, float],
    kinds: NDArray[np.str_] | None,
    kind: NDArray[np.intp],
) -> Split:
    names = list(parts)
    of_item = part[of]
    items = np.bincount(of_item, minlength=len(names))
    groups = np.bincount(part, minlength=len(names))
    table: dict[str, dict[str, int]] = {}
    if kinds is not None:
        for p, name in enumerate(names):
            each = np.bincount(kind[of_item == p], minlength=len(kinds))
            table[name] = dict(zip(kinds.tolist(), each.tolist(), strict=True))
    return Split(
        tuple(names[p] for p in of_item),
        dict(parts),
        dict(zip(names, items.tolist(), strict=True)),
        dict(zip(names, groups.tolist(), strict=True)),
        table,
    )
