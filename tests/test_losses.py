"""Losses of the maps: upstream's recorded values and gradients, and what their mended forms must do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import detfill
from torch import Tensor

from wsitk.errors import UsageError
from wsitk.models.cellvit.training.losses import (
    COMPACT,
    MENDED,
    RECIPES,
    UPSTREAM,
    LossWeights,
    branch_losses,
    cross_entropy,
    dice,
    distance_mse,
    distance_sobel,
    focal_tversky,
    gradient_mse,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cellvit" / "losses_metrics.json").read_text())
B, H, W = 2, 48, 40

LOGITS = {
    "nuclei_binary_map": torch.from_numpy(detfill.normal("loss/bin", (B, 2, H, W))),
    "hv_map": torch.from_numpy(detfill.symmetric("loss/hvp", (B, 2, H, W), 0.5)),
    "nuclei_type_map": torch.from_numpy(detfill.normal("loss/type", (B, 6, H, W))),
    "tissue_types": torch.from_numpy(detfill.normal("loss/tissue", (B, 19))),
}
TARGETS = {
    "nuclei_binary_map": torch.from_numpy(detfill.uniform01("loss/tb", (B, H, W)) > 0.6).long(),
    "hv_map": torch.from_numpy(detfill.symmetric("loss/hvt", (B, 2, H, W), 0.5)),
    "nuclei_type_map": torch.from_numpy((detfill.uniform01("loss/tt", (B, H, W)) * 6).astype(np.int64)),
    "tissue_types": torch.tensor([3, 11]),
}


def one_hot(name: str) -> Tensor:
    return F.one_hot(TARGETS[name], LOGITS[name].shape[1]).movedim(-1, 1).float()


BINARY, TYPES = one_hot("nuclei_binary_map"), one_hot("nuclei_type_map")
P_BINARY, P_TYPES = LOGITS["nuclei_binary_map"].softmax(1), LOGITS["nuclei_type_map"].softmax(1)
MASK = TARGETS["nuclei_binary_map"].float()

# What upstream's trainer hands to each loss, and our function of it.
CASES: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "binary.focaltversky": (P_BINARY, lambda p: focal_tversky(p.softmax(1), BINARY)),
    "binary.dice": (P_BINARY, lambda p: dice(p, BINARY)),
    "binary.xentropy": (P_BINARY, lambda p: cross_entropy(p, BINARY)),
    "hv.mse": (LOGITS["hv_map"], lambda x: distance_mse(x, TARGETS["hv_map"], torch.ones_like(MASK))),
    "hv.msge": (LOGITS["hv_map"], lambda x: gradient_mse(x, TARGETS["hv_map"], MASK, crossed=True)),
    "type.bce": (P_TYPES, lambda p: cross_entropy(p, TYPES)),
    "type.dice": (P_TYPES, lambda p: dice(p, TYPES)),
    "type.mcfocaltversky": (P_TYPES, lambda p: focal_tversky(p.softmax(1), TYPES, per_class=True)),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_value_and_gradient_are_those_recorded(name: str) -> None:
    handed, loss = CASES[name]
    leaf = handed.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    wide = gradient.double()
    assert value.item() == pytest.approx(GOLDEN[name]["value"], rel=1e-6)
    assert wide.norm().item() == pytest.approx(GOLDEN[name]["grad_l2"], rel=1e-6)
    # A sum of thousands of terms that nearly cancel is exact to the terms' own rounding, not to its size.
    assert wide.sum().item() == pytest.approx(GOLDEN[name]["grad_sum"], rel=1e-6, abs=1e-7)


def test_the_upstream_recipe_adds_up_to_the_recorded_total() -> None:
    outputs = {name: value.clone().requires_grad_() for name, value in LOGITS.items()}
    total, parts = branch_losses(outputs, TARGETS, UPSTREAM)
    assert total.item() == pytest.approx(GOLDEN["total_paper_weights"]["value"], rel=1e-6)
    theirs = {
        "binary_focal_tversky": "binary.focaltversky",
        "binary_dice": "binary.dice",
        "hv_mse": "hv.mse",
        "hv_gradient": "hv.msge",
        "type_cross_entropy": "type.bce",
        "type_dice": "type.dice",
        "type_focal_tversky": "type.mcfocaltversky",
        "tissue_cross_entropy": "tissue.ce",
    }
    assert set(parts) == set(theirs)
    for ours, name in theirs.items():
        weight = GOLDEN["total_paper_weights"]["weights"][name]
        assert parts[ours].item() == pytest.approx(weight * GOLDEN[name]["value"], rel=1e-6), name
        assert not parts[ours].requires_grad
    # The tissue loss takes logits, so its recorded gradient can be read off the recipe's.
    (gradient,) = torch.autograd.grad(total, outputs["tissue_types"])
    assert gradient.double().norm().item() == pytest.approx(0.1 * GOLDEN["tissue.ce"]["grad_l2"], rel=1e-6)


def test_the_recipes_gradient_is_that_of_the_single_losses() -> None:
    outputs = {name: value.clone().requires_grad_() for name, value in LOGITS.items()}
    branch_losses(outputs, TARGETS, UPSTREAM)[0].backward()
    leaf = LOGITS["nuclei_type_map"].clone().requires_grad_()
    p = leaf.softmax(1)
    by_hand = 0.5 * cross_entropy(p, TYPES) + 0.2 * dice(p, TYPES)
    (by_hand + 0.5 * focal_tversky(p.softmax(1), TYPES, per_class=True)).backward()
    torch.testing.assert_close(outputs["nuclei_type_map"].grad, leaf.grad, rtol=1e-5, atol=1e-9)


def test_the_compact_recipe_is_what_the_first_weights_were_trained_with() -> None:
    maps = {name: LOGITS[name] for name in ("nuclei_binary_map", "hv_map")}
    _, parts = branch_losses(maps, TARGETS, COMPACT)
    p, t, mask = P_BINARY[:, 1], MASK, MASK.unsqueeze(1)
    error, weight = maps["hv_map"] - TARGETS["hv_map"], mask + 0.1 * (1 - mask)
    kernel = distance_sobel(5, error)
    along = torch.cat([F.conv2d(error[:, :1], kernel[None, None], padding=2),
                       F.conv2d(error[:, 1:], kernel.T[None, None], padding=2)], dim=1)  # fmt: skip
    first = {
        "binary_cross_entropy": 1.5
        * F.cross_entropy(maps["nuclei_binary_map"], TARGETS["nuclei_binary_map"]),
        "binary_dice": 0.25 * (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)),
        "hv_mse": 2.5 * (error**2 * weight).sum() / (2 * weight.sum() + 1),
        "hv_gradient": 2.0 * (along**2 * mask).sum() / (2 * mask.sum() + 1),
    }
    assert set(parts) == set(first)
    for name, value in first.items():
        # The first form added 1 to the number of pixels.
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-3), name


def test_the_mended_gradient_loss_sees_the_jump_between_two_nuclei_and_upstreams_does_not() -> None:
    """Two nuclei side by side: the horizontal map falls from 1 to -1 where they touch."""
    ramp = torch.linspace(-1, 1, 12)
    target = torch.zeros(1, 2, 24, 24)
    target[0, 0] = torch.cat([ramp, ramp])
    blurred = F.avg_pool2d(F.pad(target, (4, 4, 4, 4), mode="replicate"), 9, 1)
    mask = torch.zeros(1, 24, 24)
    mask[:, 2:-2, 2:-2] = 1  # away from the border, whose zeros are an edge of their own
    assert gradient_mse(blurred, target, mask) > 0.5
    assert gradient_mse(blurred, target, mask, crossed=True) < 1e-10


def test_derivative_kernel_is_the_offset_over_the_squared_distance() -> None:
    kernel = distance_sobel(5, torch.zeros(1))
    assert kernel[2].tolist() == pytest.approx([-0.5, -1, 0, 1, 0.5])
    assert kernel[0, 1].item() == pytest.approx(-1 / 5)
    assert torch.equal(kernel, -kernel.flip(1))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("fill", [0, -1, 255], ids=["empty", "-1", "ignore"])
def test_empty_and_unlabelled_crops_have_finite_losses_and_gradients(recipe: str, fill: int) -> None:
    targets = {name: torch.full_like(value, fill) for name, value in TARGETS.items()}
    targets["hv_map"] = torch.zeros_like(TARGETS["hv_map"])
    outputs = {name: value.clone().requires_grad_() for name, value in LOGITS.items()}
    total, _ = branch_losses(outputs, targets, RECIPES[recipe])
    total.backward()
    assert torch.isfinite(total)
    for name, value in outputs.items():
        assert value.grad is None or torch.isfinite(value.grad).all(), name
        # Nothing is learned of what nobody labelled.
        assert fill == 0 or value.grad is None or value.grad.abs().max() == 0, name


@pytest.mark.parametrize("recipe", [UPSTREAM, MENDED], ids=["upstream", "mended"])
@pytest.mark.parametrize("unknown", [-1, 255])
def test_unknown_pixels_count_in_no_loss(recipe: LossWeights, unknown: int) -> None:
    """A crop whose upper half nobody labelled has the losses of the lower half alone."""
    names = ("nuclei_binary_map", "hv_map", "nuclei_type_map")
    half, targets = H // 2, {name: TARGETS[name].clone() for name in names}
    targets["nuclei_binary_map"][:, :half] = unknown
    targets["nuclei_type_map"][:, :half] = unknown
    only = recipe.only(names)
    outputs = {name: LOGITS[name].clone().requires_grad_() for name in names}
    total, parts = branch_losses(outputs, targets, only)
    total.backward()
    for name in names:
        gradient = outputs[name].grad
        assert gradient is not None
        assert gradient[:, :, :half].abs().max() == 0, name
        assert gradient[:, :, half:].abs().max() > 0, name
    below = {name: LOGITS[name][:, :, half:] for name in names}
    rest = {name: TARGETS[name][:, half:] for name in names} | {"hv_map": TARGETS["hv_map"][:, :, half:]}
    _, alone = branch_losses(below, rest, only)
    for name, value in parts.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-7)


def test_a_class_that_the_network_does_not_have_is_an_error_not_an_unknown() -> None:
    with pytest.raises(RuntimeError, match="Class values must be smaller"):
        branch_losses(LOGITS, TARGETS | {"nuclei_type_map": TARGETS["nuclei_type_map"] + 1}, UPSTREAM)


def test_a_perfect_prediction_costs_nothing_once_mended_but_not_as_upstream() -> None:
    sure = {name: 60.0 * one_hot(name) for name in ("nuclei_binary_map", "nuclei_type_map")}
    sure |= {
        "hv_map": TARGETS["hv_map"],
        "tissue_types": 60.0 * F.one_hot(TARGETS["tissue_types"], 19).float(),
    }
    assert branch_losses(sure, TARGETS, MENDED)[0] < 1e-4
    # A softmax of probabilities never says more than e / (e + 5).
    assert branch_losses(sure, TARGETS, UPSTREAM)[0] > 0.5


def test_an_utterly_wrong_pixel_has_a_gradient_once_mended_but_not_as_upstream() -> None:
    wrong = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1).requires_grad_()
    targets = {"nuclei_binary_map": torch.ones(1, 1, 1, dtype=torch.int64)}
    for as_upstream, slope in ((True, 0.0), (False, 1.0)):
        recipe = LossWeights(binary_cross_entropy=1.0, as_upstream=as_upstream)
        (gradient,) = torch.autograd.grad(
            branch_losses({"nuclei_binary_map": wrong}, targets, recipe)[0], wrong
        )
        assert gradient.abs().max().item() == pytest.approx(slope, abs=1e-6)


def test_half_precision_outputs_are_judged_in_float32() -> None:
    halves = {name: value.half() for name, value in LOGITS.items()}
    total, _ = branch_losses(halves, TARGETS, UPSTREAM)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(GOLDEN["total_paper_weights"]["value"], rel=1e-3)


def test_a_recipe_can_be_written_in_a_config() -> None:
    assert LossWeights.from_mapping({}) == UPSTREAM
    assert LossWeights.from_mapping({"recipe": "compact"}) == COMPACT
    changed = LossWeights.from_mapping({"recipe": "mended", "hv_gradient": 4, "dice_background": False})
    assert changed == replace(MENDED, hv_gradient=4.0, dice_background=False)
    assert isinstance(changed.hv_gradient, float)


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ({"recipe": "papers"}, "WSI890"),
        ({"hv_gradients": 4}, "WSI861"),
        ({"hv_mse": "much"}, "WSI862"),
        ({"hv_mse": -1.0}, "WSI863"),
        ({"hv_mse": float("nan")}, "WSI863"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(table: dict[str, object], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        LossWeights.from_mapping(table)
    assert caught.value.code == code


@pytest.mark.parametrize("side", ["network", "data"])
@pytest.mark.parametrize("lacking", sorted(LOGITS))
def test_a_branch_that_is_weighed_but_absent_is_refused(side: str, lacking: str) -> None:
    outputs, targets = dict(LOGITS), dict(TARGETS)
    del {"network": outputs, "data": targets}[side][lacking]
    with pytest.raises(UsageError, match=f"the {side} has no {lacking}") as caught:
        branch_losses(outputs, targets, UPSTREAM)
    assert caught.value.code == "WSI891"
    present = [n for n in LOGITS if n != lacking and (n != "hv_map" or lacking != "nuclei_binary_map")]
    branch_losses(outputs, targets, UPSTREAM.only(present))


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="WSI891"):
        branch_losses(LOGITS, TARGETS, LossWeights())


def test_every_weight_belongs_to_a_branch() -> None:
    """A field that no branch reads would be a weight without effect."""
    counted = {f"{b}_{loss}" for b in ("binary", "hv", "type", "tissue") for loss in UPSTREAM.parts(b)}
    counted |= {"binary_cross_entropy", "as_upstream", "dice_background", "background_share", "smooth"}
    assert counted == {f.name for f in fields(LossWeights)}
