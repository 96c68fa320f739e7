"""How good a network is on held-out images: by the nuclei that come out, not by its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.metrics.contingency import Contingency
from wsitk.metrics.counts import Counts
from wsitk.metrics.panoptic import count_matches
from wsitk.models.cellvit.postprocess import HoverSettings, classify_objects, segment
from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Dataset, Example, Labels, Types
from wsitk.models.cellvit.training.warp import resized

__all__ = ["Validation", "at_spacing", "normalised", "spread"]


@dataclass(frozen=True)
class Validation:
    """How to judge: at which spacing, with which post-processing, in which arithmetic.

    `images` bounds the number of images, taken evenly from the set; 0 for all. `align` is what sides must be
    multiples of.
    """

    types: tuple[str, ...]
    spacing_um: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    align: int
    settings: HoverSettings = field(default_factory=HoverSettings)
    dtype: torch.dtype = torch.float32
    images: int = 0

    @torch.inference_mode()
    def scores(self, network: nn.Module, held_out: Dataset) -> dict[str, float]:
        """Return ``pq``, ``dq``, ``sq`` pooled over images, ``bpq`` as their mean, and ``pq_NAME`` of each type.

        Panoptic quality as in Kirillov 2019, at the network's spacing; empty for an empty set. Types are judged
        where the truth names them.
        """
        chosen = spread(len(held_out), self.images)
        pooled, each = Counts(), []
        typed = {name: Counts() for name in self.types}
        for index in chosen:
            example = at_spacing(held_out.read(index), self.spacing_um)
            found, kinds = self._objects(network, example)
            truth = np.where(example.inst == UNLABELLED, 0, example.inst)
            counts = count_matches(Contingency.of(truth, found))
            pooled += counts
            each.append(counts.pq)
            if example.types is not None and self.types:
                for number, name in enumerate(self.types):
                    typed[name] += _of_type(truth, example.types, found, kinds, number)
        if not chosen:
            return {}
        scores = {"pq": pooled.pq, "dq": pooled.f1, "sq": pooled.sq, "bpq": _mean(each)}
        return scores | {f"pq_{name}": counts.pq for name, counts in typed.items() if counts.truth}

    def _objects(self, network: nn.Module, example: Example) -> tuple[Labels, NDArray[np.int16] | None]:
        """Return the label map that the network gives, and the type of each label from 1 on."""
        height, width = example.inst.shape
        tall, wide = (-n % self.align for n in (height, width))
        image = np.pad(example.image, ((0, tall), (0, wide), (0, 0)), mode="symmetric")
        device = next(network.parameters()).device
        pixels = normalised(torch.from_numpy(image).permute(2, 0, 1)[None].to(device), self.mean, self.std)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            maps = network(pixels)
        here = (slice(None), slice(0, height), slice(0, width))
        prob = maps["nuclei_binary_map"].float().softmax(1)[0, 1:2][here].cpu().numpy()[0]
        hv = np.ascontiguousarray(maps["hv_map"].float()[0][here].cpu().numpy())
        labels = segment(np.ascontiguousarray(prob), hv, self.spacing_um, self.settings)
        # what lies where nobody looked is neither right nor wrong
        labels = _without(labels, example.inst == UNLABELLED)
        if not self.types or "nuclei_type_map" not in maps:
            return labels, None
        types = maps["nuclei_type_map"].float().softmax(1)[0][here].cpu().numpy()
        return labels, classify_objects(labels, np.ascontiguousarray(types))[0]


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 (N, 3, H, W) as the network wants it, channels last in memory."""
    shift, scale = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    scaled = pixels.float().div(255).sub(shift).div(scale)
    return scaled.contiguous(memory_format=torch.channels_last)


def at_spacing(example: Example, spacing_um: float) -> Example:
    """Return a whole image at another spacing."""
    factor = example.spacing_um / spacing_um
    height, width = (max(1, round(n * factor)) for n in example.inst.shape)
    return example if abs(factor - 1) < 0.01 else resized(example, height, width)


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` numbers below `count`, evenly spread; all of them if `most` is 0."""
    if not most or count <= most:
        return list(range(count))
    return [k * count // most for k in range(most)]


def _without(labels: Labels, unknown: NDArray[np.bool_]) -> Labels:
    """Return labels without the objects that lie mostly where nobody looked, numbered again from 1."""
    if not unknown.any():
        return labels
    total = np.bincount(labels.ravel())
    hidden = np.bincount(labels[unknown], minlength=len(total))
    keep = 2 * hidden <= total
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]


def _of_type(
    truth: Labels, types: Types, found: Labels, kinds: NDArray[np.int16] | None, number: int
) -> Counts:
    """Return the counts of one type (from 0), as if the others were background; unknown ones are left out."""
    if kinds is None:
        return Counts()
    mine = np.where(types == number + 1, truth, 0)
    of_type = np.append(False, kinds == number)[found]
    sure = np.where(of_type & (types != IGNORE), found, 0)
    return count_matches(Contingency.of(mine, sure))


def _mean(values: Sequence[float]) -> float:
    """Return the mean over images that have something to find or found something."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else 0.0
