"""Losses of the two maps, after CellViT and HoVer-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BINARY_WEIGHT, DICE_WEIGHT, MSE_WEIGHT, GRADIENT_WEIGHT = 1.5, 0.25, 2.5, 2.0
BACKGROUND_SHARE = 0.1
"""Weight of background pixels in the distance loss: the maps are only read inside nuclei."""


def total(maps: dict[str, Tensor], nuclei: Tensor, hv: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Sum of all losses and each of them. `nuclei` is (N, H, W) of 0 and 1, `hv` (N, 2, H, W)."""
    logits, predicted = maps["nuclei_binary_map"].float(), maps["hv_map"].float()
    mask = nuclei.unsqueeze(1).float()
    parts = {
        "entropy": BINARY_WEIGHT * F.cross_entropy(logits, nuclei.long()),
        "dice": DICE_WEIGHT * dice(logits.softmax(1)[:, 1], nuclei.float()),
        "distance": MSE_WEIGHT * weighted_mse(predicted, hv, mask + BACKGROUND_SHARE * (1 - mask)),
        "gradient": GRADIENT_WEIGHT * gradient_mse(predicted, hv, mask),
    }
    return torch.stack(list(parts.values())).sum(), {k: float(v.detach()) for k, v in parts.items()}


def dice(probability: Tensor, target: Tensor) -> Tensor:
    """One minus the soft Dice overlap, over the whole batch, so that empty crops do no harm."""
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)


def weighted_mse(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error with a weight per pixel, (N, 1, H, W)."""
    return ((predicted - target) ** 2 * weight).sum() / (2 * weight.sum() + 1)


def gradient_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error of d/dx of the horizontal and d/dy of the vertical map, inside nuclei.

    It is what makes the maps jump where two nuclei touch, and that jump is what separates them.
    """
    kernel = distance_sobel(5, predicted)
    error = predicted - target
    along_x = F.conv2d(error[:, :1], kernel[None, None], padding=2)
    along_y = F.conv2d(error[:, 1:], kernel.T[None, None], padding=2)
    squared = along_x**2 + along_y**2
    return (squared * mask).sum() / (2 * mask.sum() + 1)


def distance_sobel(size: int, like: Tensor) -> Tensor:
    """HoVer-Net's derivative kernel: each weight is its offset over the squared distance."""
    reach = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    y, x = torch.meshgrid(reach, reach, indexing="ij")
    return x / (x**2 + y**2 + 1e-15)
