"""Gaussian diffusion whose reverse steps have a learned variance, over all times or some of them.

Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (learned variance, the hybrid loss). Images lie in -1..1; a network
predicts the noise and, in three more channels, where between its two bounds the log variance of a step lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.models.artifusion.schedule import cosine_betas, linear_betas

__all__ = ["Diffusion", "Network", "Step", "hybrid_loss"]

Network = Callable[[Tensor, Tensor], Tensor]
"""(x (N, 3, H, W), times (N,) on the scale of 0 to 1000) -> (N, 6, H, W)."""

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """What is known of a reverse step: mean and log variance of the next image, and the clean image expected."""

    mean: Tensor
    log_variance: Tensor
    clean: Tensor


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A chain of times.

    Attributes
    ----------
    betas
        Variance that each step adds, (T,), of the times that are kept.
    times
        What the network is told at each of them: (T,), on the scale of 0 to 1000.
    """

    betas: Curve
    times: Curve

    @classmethod
    def of(
        cls,
        kind: Literal["linear", "cosine"] = "linear",
        steps: int = 1000,
        kept: NDArray[np.int64] | None = None,
    ) -> Diffusion:
        """Return the chain of `steps` times, or of those `kept`, with the signal that each has there."""
        betas = linear_betas(steps) if kind == "linear" else cosine_betas(steps)
        kept = np.arange(steps) if kept is None else kept
        signal = np.asarray(np.cumprod(1 - betas)[kept], np.float64)
        spaced = 1 - signal / np.concatenate([[1.0], signal[:-1]])
        return cls(spaced, np.asarray(kept * (1000 / steps), np.float64))

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def signal(self) -> Curve:
        """Return the share of the clean image's variance that is left at each time (alpha bar)."""
        return np.asarray(np.cumprod(1 - self.betas), np.float64)

    @cached_property
    def before(self) -> Curve:
        """Return `signal` one step earlier; 1 before the first."""
        return np.concatenate([[1.0], self.signal[:-1]])

    @cached_property
    def variance(self) -> Curve:
        """Return the variance of a step back, given the clean image; 0 at the first time (DDPM, eq. 7)."""
        return self.betas * (1 - self.before) / (1 - self.signal)

    @cached_property
    def log_variance(self) -> Curve:
        """Return the logarithm of `variance`, at the first time that of the second, which is finite."""
        return np.asarray(np.log(np.append(self.variance[1], self.variance[1:])))

    @cached_property
    def of_clean(self) -> Curve:
        """Return the clean image's weight in a step's mean."""
        return self.betas * np.sqrt(self.before) / (1 - self.signal)

    @cached_property
    def of_noisy(self) -> Curve:
        """Return the noisy image's weight in a step's mean."""
        return (1 - self.before) * np.sqrt(1 - self.betas) / (1 - self.signal)

    def noised(self, clean: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return `clean` as it is at index `t`, with this noise."""
        return (
            self._at(np.sqrt(self.signal), t, clean) * clean
            + self._at(np.sqrt(1 - self.signal), t, clean) * noise
        )

    def undone(self, x: Tensor, t: int, noise: Tensor) -> Tensor:
        """Return `x`, of index `t - 1`, one step noisier."""
        return self._at(np.sqrt(1 - self.betas), t, x) * x + self._at(np.sqrt(self.betas), t, x) * noise

    def clean(self, x: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return the clean image that `x` at index `t` comes from if it holds this noise."""
        return (
            self._at(np.sqrt(1 / self.signal), t, x) * x
            - self._at(np.sqrt(1 / self.signal - 1), t, x) * noise
        )

    def step(self, x: Tensor, t: int | Tensor, predicted: Tensor) -> Step:
        """Return the reverse step from index `t` that the network's output (N, 6, H, W) stands for.

        The clean image is held within -1..1.
        """
        noise, share = predicted.chunk(2, dim=1)
        clean = self.clean(x, t, noise).clamp(-1, 1)
        return Step(self._mean(clean, x, t), self._log_variance(share, x, t), clean)

    def told(self, t: int | Tensor, count: int, device: torch.device) -> Tensor:
        """Return what the network is told at index `t`, for `count` images."""
        index = t.cpu().numpy() if isinstance(t, Tensor) else np.full(count, t)
        return torch.from_numpy(self.times[index]).to(device, torch.float32)

    def _mean(self, clean: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        return self._at(self.of_clean, t, x) * clean + self._at(self.of_noisy, t, x) * x

    def _log_variance(self, share: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """Return the log variance between its bounds, at the place that the network says (eq. 15 of 2021)."""
        least, most = self._at(self.log_variance, t, x), self._at(np.log(self.betas), t, x)
        share = (share + 1) / 2
        return share * most + (1 - share) * least

    def _at(self, curve: Curve, t: int | Tensor, like: Tensor) -> Tensor:
        """Return a curve's value at each image's time, to be multiplied with images."""
        index = t.cpu().numpy() if isinstance(t, Tensor) else np.array([t])
        return torch.from_numpy(curve[index]).to(like.device, like.dtype).view(-1, 1, 1, 1)


def hybrid_loss(
    diffusion: Diffusion,
    network: Network,
    clean: Tensor,
    t: Tensor,
    noise: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the two parts of Nichol and Dhariwal's loss, each a mean over the batch (their sum is minimised).

    First the mean squared error of the noise, times `weights` (N,) if there are some. Then the variational bound of
    step `t` in bits per value, times T / 1000 (their code's rescaling), which teaches the variance alone: the noise
    that it sees is detached.
    """
    x = diffusion.noised(clean, t, noise)
    predicted = network(x, diffusion.told(t, len(x), x.device)).float()
    errors = (predicted[:, :3] - noise).square().mean(dim=(1, 2, 3))
    simple = (errors if weights is None else errors * weights).mean()
    held = torch.cat([predicted[:, :3].detach(), predicted[:, 3:]], dim=1)
    return simple, _bound(diffusion, clean, x, t, held).mean() * (len(diffusion) / 1000)


def _bound(diffusion: Diffusion, clean: Tensor, x: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
    """Return each image's bound at its time: a divergence of Gaussians, at time 0 the likelihood of its bytes."""
    noise, share = predicted.chunk(2, dim=1)
    # in training the clean image is not held within -1..1: a step's mean must follow the noise everywhere
    mean = diffusion._mean(diffusion.clean(x, t, noise), x, t)
    log_variance = diffusion._log_variance(share, x, t)
    true_mean = diffusion._mean(clean, x, t)
    true_log = diffusion._at(diffusion.log_variance, t, x)
    divergence = 0.5 * (
        log_variance - true_log - 1 + (true_log - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )  # fmt: skip
    likelihood = -_log_likelihood(clean, mean, 0.5 * log_variance)
    each = torch.where((t == 0).view(-1, 1, 1, 1), likelihood, divergence)
    return each.mean(dim=(1, 2, 3)) / math.log(2)


def _log_likelihood(clean: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the logarithm of the probability of bytes, spread over -1..1, under a Gaussian cut at their borders."""
    inverse = (-log_scale).exp()
    above = _cumulative((clean - mean + 1 / 255) * inverse)
    below = _cumulative((clean - mean - 1 / 255) * inverse)
    mass = torch.where(clean < -0.999, above, torch.where(clean > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _cumulative(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
