"""Losses of CellViT's maps (Hörst 2024) and how they add up, after HoVer-Net (Graham 2019).

Maps are (N, C, H, W). Losses of classes take probabilities and a target of the same shape, one-hot or zero
where the class is unknown; all are computed in float32, whatever the network's precision.

Three things in upstream's code differ from what the papers say, and the published weights were trained with
them. `LossWeights.as_upstream` reproduces them; without it they are mended:

- the focal Tversky losses take a softmax of what is a softmax already;
- the gradient loss differentiates the horizontal map vertically and the vertical map horizontally, which is
  not where the maps jump between two nuclei;
- the cross-entropy clamps probabilities at 1e-7, so that a pixel that is utterly wrong has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wsitk.errors import UsageError
from wsitk.models.cellvit.training.data import IGNORE
from wsitk.training.config import from_table

__all__ = [
    "LossWeights",
    "UPSTREAM",
    "MENDED",
    "COMPACT",
    "RECIPES",
    "branch_losses",
    "cross_entropy",
    "dice",
    "focal_tversky",
    "distance_mse",
    "gradient_mse",
]

BINARY, HV, TYPE, TISSUE = "nuclei_binary_map", "hv_map", "nuclei_type_map", "tissue_types"
BRANCHES = {"binary": BINARY, "hv": HV, "type": TYPE, "tissue": TISSUE}


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weight of each loss, named branch_loss, and the few choices in how they are computed.

    Attributes
    ----------
    as_upstream
        Whether to reproduce upstream's three deviations (see the module).
    dice_background
        Whether Dice sums over all classes, as upstream, or over all but the background.
    background_share
        Weight of background pixels in `hv_mse`, beside 1 inside nuclei: the maps are only read inside.
    smooth
        What keeps Dice defined, and nearly silent, for empty crops.
    """

    binary_cross_entropy: float = 0.0
    binary_dice: float = 0.0
    binary_focal_tversky: float = 0.0
    hv_mse: float = 0.0
    hv_gradient: float = 0.0
    type_cross_entropy: float = 0.0
    type_dice: float = 0.0
    type_focal_tversky: float = 0.0
    tissue_cross_entropy: float = 0.0
    as_upstream: bool = False
    dice_background: bool = True
    background_share: float = 1.0
    smooth: float = 1e-3

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a number from 0 on")

    @classmethod
    def from_mapping(cls, table: Mapping[str, object]) -> LossWeights:
        """Return the recipe that a table of a TOML file describes.

        ``recipe`` names one of `RECIPES` to start from (upstream, if there is none); every other key replaces
        one field of it. Raises UsageError WSI890 for an unknown recipe, and as `wsitk.training.config` does.
        """
        changes = dict(table)
        name = changes.pop("recipe", "upstream")
        if name not in RECIPES:
            raise UsageError("WSI890", f"loss recipe is {name!r}, wanted one of {', '.join(RECIPES)}")
        return from_table(cls, asdict(RECIPES[str(name)]) | changes, "loss")

    def parts(self, branch: str) -> dict[str, float]:
        """Return loss -> weight of those losses of a branch (binary, hv, type, tissue) that count."""
        prefix = f"{branch}_"
        names = [f.name for f in fields(self) if f.name.startswith(prefix)]
        named = {name.removeprefix(prefix): getattr(self, name) for name in names}
        return {name: weight for name, weight in named.items() if weight > 0}

    def only(self, outputs: Collection[str]) -> LossWeights:
        """Return these weights, 0 for the branches whose output (`nuclei_type_map`, …) is not in `outputs`."""
        absent = [
            f"{b}_{loss}" for b, output in BRANCHES.items() if output not in outputs for loss in self.parts(b)
        ]
        return replace(self, **dict.fromkeys(absent, 0.0))  # type: ignore[arg-type]  # weights, no switches


UPSTREAM = LossWeights(
    binary_dice=1.0,
    binary_focal_tversky=1.0,
    hv_mse=2.5,
    hv_gradient=8.0,
    type_cross_entropy=0.5,
    type_dice=0.2,
    type_focal_tversky=0.5,
    tissue_cross_entropy=0.1,
    as_upstream=True,
)
"""The runs of the paper, as their code computed them."""

MENDED = replace(UPSTREAM, as_upstream=False)
"""The runs of the paper, as the papers describe them."""

COMPACT = LossWeights(
    binary_cross_entropy=1.5,
    binary_dice=0.25,
    hv_mse=2.5,
    hv_gradient=2.0,
    dice_background=False,
    background_share=0.1,
    smooth=1.0,
)
"""What the compact network's first weights were trained with."""

RECIPES: dict[str, LossWeights] = {"upstream": UPSTREAM, "mended": MENDED, "compact": COMPACT}


def branch_losses(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all losses, and each weighted part by its name (`hv_mse`, …), detached.

    `outputs` are the network's: logits for classes, plain numbers for `hv_map`. `targets` hold
    `nuclei_binary_map` (N, H, W) of 0 and 1, `hv_map` (N, 2, H, W) float, and where the recipe weighs them
    `nuclei_type_map` (N, H, W) and `tissue_types` (N,), classes from 0. Pixels and images whose class is
    `IGNORE` or -1 count in no loss. Raises UsageError WSI891 if the recipe weighs a branch that `outputs` or
    `targets` lack; `weights.only(...)` is the recipe without it.
    """
    parts: dict[str, Tensor] = {}
    for branch, output in BRANCHES.items():
        wanted = weights.parts(branch)
        if not wanted:
            continue
        _check_present(branch, output, outputs, targets)
        values = _LOSSES[branch](outputs[output].float(), targets, wanted, weights)
        parts |= {f"{branch}_{name}": wanted[name] * value for name, value in values.items()}
    if not parts:
        raise UsageError("WSI891", "no loss has a weight above 0; name a recipe, or set one")
    return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}


def cross_entropy(probabilities: Tensor, target: Tensor, clamp: float = 1e-7) -> Tensor:
    """Return -sum(target * log p) over classes, mean over pixels of a known class; p clamped as upstream."""
    scaled = probabilities / probabilities.sum(dim=1, keepdim=True)
    entropy = -(target * scaled.clamp(clamp, 1 - clamp).log()).sum()
    return entropy / target.sum().clamp(min=1)


def dice(probabilities: Tensor, target: Tensor, smooth: float = 1e-3) -> Tensor:
    """Return one minus the soft Dice overlap of each class over the whole batch, summed over classes."""
    over = (0, 2, 3)
    overlap = (probabilities * target).sum(over)
    both = probabilities.sum(over) + target.sum(over)
    return (1 - (2 * overlap + smooth) / (both + smooth)).sum()


def focal_tversky(
    probabilities: Tensor,
    target: Tensor,
    per_class: bool = False,
    missed: float = 0.7,
    false: float = 0.3,
    gamma: float = 4 / 3,
    smooth: float = 1e-6,
) -> Tensor:
    """Return (1 - Tversky index)^gamma, with weights of what is missed and what is false (Abraham 2019).

    The index is over all classes together, or with `per_class` over each; then the losses are summed.
    """
    over = (0, 2, 3) if per_class else (0, 1, 2, 3)
    hit = (probabilities * target).sum(over)
    weighted = missed * ((1 - probabilities) * target).sum(over) + false * (probabilities * (1 - target)).sum(
        over
    )
    index = (hit + smooth) / (hit + weighted + smooth)
    # The power's derivative at 0 is 0, but autograd's is a division by it.
    loss: Tensor = ((1 - index).clamp(min=0) ** gamma).sum()
    return loss


def distance_mse(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the mean squared error of the distances (N, 2, H, W), pixels weighed by `weight` (N, H, W)."""
    squared = (predicted - target) ** 2 * weight.unsqueeze(1)
    return squared.sum() / (2 * weight.sum()).clamp(min=1e-8)


def gradient_mse(predicted: Tensor, target: Tensor, mask: Tensor, crossed: bool = False) -> Tensor:
    """Return the mean squared error of d/dx of the horizontal and d/dy of the vertical distances, in nuclei.

    It is what makes the maps jump where two nuclei touch, and that jump is what separates them. `mask`
    (N, H, W) is 1 in nuclei. `crossed` takes d/dy of the horizontal and d/dx of the vertical ones, as
    HoVer-Net's and CellViT's code does.
    """
    kernel = distance_sobel(5, predicted)
    first, second = (kernel.T, kernel) if crossed else (kernel, kernel.T)
    kernels = torch.stack([first, second]).unsqueeze(1)
    slopes = F.conv2d(predicted - target, kernels, padding=2, groups=2)
    return (slopes**2 * mask.unsqueeze(1)).sum() / (2 * mask.sum() + 1e-8)


def distance_sobel(size: int, like: Tensor) -> Tensor:
    """Return HoVer-Net's derivative kernel along x, (size, size): each offset over its squared distance."""
    reach = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    y, x = torch.meshgrid(reach, reach, indexing="ij")
    return x / (x**2 + y**2 + 1e-15)


def _check_present(
    branch: str, output: str, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> None:
    lacking = [side for side, values in (("network", outputs), ("data", targets)) if output not in values]
    # The distances are judged inside nuclei, so their loss needs both targets.
    if branch == "hv" and BINARY not in targets:
        lacking, output = ["data"], BINARY
    if lacking:
        raise UsageError(
            "WSI891",
            f"the recipe weighs the {branch} losses, but the {lacking[0]} has no {output}; "
            f"set the {branch}_* weights to 0, or take a {lacking[0]} that has it",
        )


def _classes(
    logits: Tensor, labels: Tensor, wanted: Mapping[str, float], weights: LossWeights, per_class: bool
) -> dict[str, Tensor]:
    """Return the named losses of a map of classes; `labels` are (N, H, W)."""
    known = _known(labels)
    one_hot = F.one_hot(labels.long() * known, logits.shape[1]).movedim(-1, 1).float()
    known = known.unsqueeze(1)
    one_hot = one_hot * known
    probabilities = logits.softmax(dim=1)
    again = probabilities.softmax(dim=1) if weights.as_upstream else probabilities
    first = 0 if weights.dice_background else 1

    def entropy() -> Tensor:
        if weights.as_upstream:
            return cross_entropy(probabilities, one_hot)
        return -(one_hot * logits.log_softmax(dim=1)).sum() / known.sum().clamp(min=1)

    losses: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": entropy,
        "dice": lambda: dice((probabilities * known)[:, first:], one_hot[:, first:], weights.smooth),
        "focal_tversky": lambda: focal_tversky(again * known, one_hot, per_class),
    }
    return {name: losses[name]() for name in wanted}


def _binary(
    logits: Tensor, targets: Mapping[str, Tensor], wanted: Mapping[str, float], weights: LossWeights
) -> dict[str, Tensor]:
    return _classes(logits, targets[BINARY], wanted, weights, per_class=False)


def _type(
    logits: Tensor, targets: Mapping[str, Tensor], wanted: Mapping[str, float], weights: LossWeights
) -> dict[str, Tensor]:
    return _classes(logits, targets[TYPE], wanted, weights, per_class=True)


def _hv(
    predicted: Tensor, targets: Mapping[str, Tensor], wanted: Mapping[str, float], weights: LossWeights
) -> dict[str, Tensor]:
    nuclei = targets[BINARY]
    known, mask = _known(nuclei), (nuclei == 1).float()
    target = targets[HV].float()
    # Where nobody looked the answer counts as right, so that the kernel beside such a pixel learns nothing of it.
    predicted = torch.where(known.unsqueeze(1), predicted, target)
    weight = known * (mask + weights.background_share * (1 - mask))
    losses: dict[str, Callable[[], Tensor]] = {
        "mse": lambda: distance_mse(predicted, target, weight),
        "gradient": lambda: gradient_mse(predicted, target, mask, crossed=weights.as_upstream),
    }
    return {name: losses[name]() for name in wanted}


def _tissue(
    logits: Tensor, targets: Mapping[str, Tensor], wanted: Mapping[str, float], weights: LossWeights
) -> dict[str, Tensor]:
    labels = targets[TISSUE].long()
    known = _known(labels)
    each = F.cross_entropy(logits, labels * known, reduction="none")
    # Not the mean: over no image at all it would be no number.
    return {"cross_entropy": (each * known).sum() / known.sum().clamp(min=1)}


def _known(labels: Tensor) -> Tensor:
    """Return where a class is stated. Not simply `labels < classes`: a wrong number shall be an error."""
    return (labels != IGNORE) & (labels != -1)


_LOSSES = {"binary": _binary, "hv": _hv, "type": _type, "tissue": _tissue}
