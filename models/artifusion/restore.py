"""Restoring the masked pixels of a region of any size: the one interface that the engine calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.models.artifusion.canvas import Canvas, Patch
from wsitk.models.artifusion.diffusion import Diffusion
from wsitk.models.artifusion.repaint import Visit, repaint
from wsitk.models.artifusion.samplers import ddim, dpm_solver
from wsitk.models.artifusion.schedule import jump_times, spaced_times
from wsitk.models.artifusion.windows import Lattice

__all__ = ["UPSTREAM", "Chain", "Damaged", "Restored", "Restorer", "Sampling"]

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Chain:
    """The noise that a network was trained with: how it grows, over how many times."""

    schedule: Literal["linear", "cosine"] = "linear"
    times: int = 1000


@dataclass(frozen=True)
class Sampling:
    """How noise becomes tissue.

    Attributes
    ----------
    sampler
        ``repaint`` (ancestral sampling, known pixels put back before each step), ``ddim`` or ``dpm++``.
    steps
        Times of the chain that are kept.
    jump_length, jump_n_sample
        At every so many steps the chain goes back up and comes down again, so many times in all, so that what is
        painted comes to fit what is known; 1 goes straight down.
    eta
        DDIM's noise: 0 for none, 1 for as much as the ancestral sampler's.
    start
        How much of the chain is gone through: 1 from pure noise, as published; less from a smooth fill of the mask
        (`fill.membrane`) that is as noisy as the chain is there. Saves evaluations, and helps where a network has
        seen too little to tell large forms from noise.
    average
        Samples that each result is the mean of. Pairs have opposite noise, so that 2 already come near to what is
        expected of the clean image: least error, and less texture than tissue has.
    """

    sampler: Literal["repaint", "ddim", "dpm++"] = "repaint"
    steps: int = 250
    jump_length: int = 10
    jump_n_sample: int = 10
    eta: float = 0.0
    start: float = 1.0
    average: int = 1

    def __post_init__(self) -> None:
        least = {"steps": 2, "jump_length": 1, "jump_n_sample": 1}
        wrong = [name for name, bound in least.items() if getattr(self, name) < bound]
        if (
            self.sampler not in ("repaint", "ddim", "dpm++")
            or wrong
            or not (0 <= self.eta <= 1 and 0 < self.start <= 1)
        ):
            raise UsageError(
                "WSI644",
                f"no such sampling: {self}; wanted repaint, ddim or dpm++, 2 steps or more, jumps of 1 or more, "
                "eta in 0..1, start above 0 and up to 1",
            )

    @property
    def times(self) -> NDArray[np.int64]:
        """Return the times that are visited, as indices of those that are kept; the last is -1, the clean image."""
        return jump_times(ceil(self.start * self.steps), self.jump_length, self.jump_n_sample)

    @property
    def evaluations(self) -> int:
        """Return how often the network looks at each window."""
        return self.average * int((np.diff(self.times) < 0).sum())


UPSTREAM = Sampling()
"""What the published code does: 2,410 evaluations."""


@dataclass(frozen=True)
class Damaged:
    """A region: uint8 (H, W, 3), the mask (H, W) of what to paint, and where its first pixel lies in the image."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    start_yx: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Restored:
    """Mean over samples and their standard deviation, float32 (H, W, 3) in 0..255; the latter 0 outside the mask."""

    image: Pixels
    deviation: Pixels


@final
class Restorer:
    """A denoiser and a way of sampling.

    Parameters
    ----------
    network
        Takes (N, 3, window, window) and times (N,) on the scale of 0 to 1000; see `network.Denoiser`.
    window, overlap
        Side of the network's images, and how much neighbouring ones share (by default three eighths); pixels.
    chain
        The noise that the network was trained with.
    spacing_um
        Pixel size that the weights were trained at; None if nobody says.
    compute_batch, precision
        How many windows are computed at once, and in which arithmetic (None: the caller's); both change last bits.

    Attributes
    ----------
    size
        Side of a window: a region has this many rows and columns or more.
    margin
        Pixels of surroundings on each side of a mask that all of its windows lie in. With these, a restoration
        is the same whatever region it was asked for.
    """

    def __init__(
        self,
        network: nn.Module,
        sampling: Sampling,
        seed: int,
        window: int = 256,
        overlap: int | None = None,
        *,
        chain: Chain | None = None,
        spacing_um: float | None = None,
        compute_batch: int = 1,
        precision: str | None = None,
    ) -> None:
        self.network, self.sampling, self.seed = network.eval(), sampling, seed
        self.size, self.spacing_um = window, spacing_um
        self.lattice = Lattice(window, window * 3 // 8 if overlap is None else overlap)
        self.margin = window - self.lattice.rim - 1
        self.compute_batch, self.precision = compute_batch, precision
        self.chain = chain or Chain()
        kept = spaced_times(self.chain.times, [sampling.steps])
        self.diffusion = Diffusion.of(self.chain.schedule, self.chain.times, kept)

    def restore(
        self, image: NDArray[np.uint8], mask: NDArray[np.bool_], start_yx: tuple[int, int], sample: int = 0
    ) -> Pixels:
        """Return float32 (H, W, 3) in 0..255: `image` uint8 (H, W, 3), but for `mask` (H, W), which is painted.

        `start_yx` is where the region's first pixel lies in the working grid: noise and windows belong to that.
        Pixels outside the mask are returned as they are. A mask that reaches the region's border is cut there:
        give whole masks with `margin` pixels around them.

        Raises UsageError: WSI640 if nothing is known, WSI645 if the region is smaller than a window, or its parts
        don't fit each other.
        """
        return self.restore_many([Damaged(image, mask, start_yx)], sample)[0]

    def restore_many(self, regions: Sequence[Damaged], sample: int = 0) -> list[Pixels]:
        """Return each region restored, as `restore` does one by one; their windows share batches."""
        for region in regions:
            self._check(region)
        found = [region.image.astype(np.float32) for region in regions]
        patches = [
            (k, patch)
            for k, region in enumerate(regions)
            for patch in Patch.over(region.image, region.mask, region.start_yx, self.lattice)
        ]
        if patches:
            painted = self._painted([patch for _, patch in patches], sample)
            for (k, patch), pixels in zip(patches, painted, strict=True):
                _put(found[k], regions[k].mask, patch, pixels, self.size)
        return found

    def restore_mean(
        self, image: NDArray[np.uint8], mask: NDArray[np.bool_], start_yx: tuple[int, int], samples: int
    ) -> Restored:
        """Return the mean of samples 0 .. `samples` - 1, and how much they differ.

        The mean has the least squared error that these samples allow, and less texture than tissue has: look at
        single samples, measure with the mean.
        """
        total = np.zeros(image.shape, np.float64)
        squares = np.zeros(image.shape, np.float64)
        for sample in range(samples):
            # in this order, whatever else is asked for: sums round
            one = self.restore(image, mask, start_yx, sample).astype(np.float64)
            total += one
            squares += one * one
        mean = total / samples
        spread = np.sqrt((squares / samples - mean * mean).clip(0)) * mask[..., None]
        return Restored(mean.astype(np.float32), spread.astype(np.float32))

    def _painted(self, patches: Sequence[Patch], sample: int) -> list[Pixels]:
        """Return all patches after the chain's last step; the mean of several chains, if so many are wanted."""
        device = next(self.network.parameters()).device
        count = self.sampling.average
        with torch.inference_mode():
            canvas = Canvas(self.network, patches, self.lattice, device, self.compute_batch, self.precision)
            total = torch.zeros_like(canvas.known.image)
            for number in range(count * sample, count * (sample + 1)):
                *_, last = self._visits(canvas, number)
                total += last.image.clamp(-1, 1)
            return canvas.images(total / count)

    def _visits(self, canvas: Canvas, sample: int) -> Iterator[Visit]:
        def noise(draw: int) -> Tensor:
            return canvas.noise(self.seed, sample, draw)

        times, how = self.sampling.times.tolist(), self.sampling
        guess = canvas.guess() if how.start < 1 else None
        common = (canvas, self.diffusion, times, canvas.known, noise, guess)
        if how.sampler == "repaint":
            return repaint(*common)
        return ddim(*common, how.eta) if how.sampler == "ddim" else dpm_solver(*common)

    def _check(self, region: Damaged) -> None:
        image, mask = region.image, region.mask
        fits = image.dtype == np.uint8 and mask.dtype == np.bool_ and image.shape == (*mask.shape, 3)
        if not fits or min(mask.shape) < self.size:
            raise UsageError(
                "WSI645",
                f"image {image.shape} {image.dtype}, mask {mask.shape} {mask.dtype}; wanted uint8 (H, W, 3) and bool "
                f"(H, W), both sides {self.size} px or more: read more of the surroundings",
            )
        if mask.all():
            raise UsageError(
                "WSI640",
                f"the mask covers all of the {mask.shape[0]} x {mask.shape[1]} px: there is nothing to restore from; "
                "mark the artifact alone, or read more of the surroundings",
            )


def _put(image: Pixels, mask: NDArray[np.bool_], patch: Patch, painted: Pixels, size: int) -> None:
    """Put the masked pixels of a patch into the region that it was cut from, or grown from."""
    (height, width), (top, left) = patch.shape, patch.grown
    rows = slice(max(0, -top), max(0, height - top))
    columns = slice(max(0, -left), max(0, width - left))
    part = image[rows, columns]
    inside = (
        slice(max(0, top), max(0, top) + part.shape[0]),
        slice(max(0, left), max(0, left) + part.shape[1]),
    )
    chosen = mask[rows, columns] & patch.seen(size)[inside]
    part[chosen] = painted[inside][chosen]
