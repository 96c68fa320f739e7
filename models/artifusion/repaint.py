"""RePaint: ancestral sampling in which known pixels are put back, as noisy as the rest, before every step.

Lugmayr et al. 2022, "RePaint: Inpainting using denoising diffusion probabilistic models", CVPR, algorithm 1, in the
order in which ArtiFusion's published code takes its draws. Images may have any shape after the channels: all that
knows about places is the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from torch import Tensor

from wsitk.models.artifusion.diffusion import Diffusion, Network

__all__ = ["Known", "Noise", "Visit", "begun", "repaint"]

Noise = Callable[[int], Tensor]
"""Draw number k of a restoration (0 is what it starts from), normal, of the image's shape."""


@dataclass(frozen=True)
class Known:
    """What is given: the image (N, 3, ...) in -1..1, and True where it is to stay (N, 1, ...)."""

    image: Tensor
    keep: Tensor

    def kept_in(self, other: Tensor) -> Tensor:
        """Return `other` with the known pixels in their place."""
        return self.image.where(self.keep, other)


@dataclass(frozen=True)
class Visit:
    """The state after a reverse step: the next image, and the clean one that was expected on the way."""

    image: Tensor
    clean: Tensor


def begun(diffusion: Diffusion, times: Sequence[int], noise: Tensor, guess: Tensor | None) -> Tensor:
    """Return what a chain starts from: noise, or a guess of the clean image as noisy as its first time is."""
    return noise if guess is None else diffusion.noised(guess, int(times[0]), noise)


def repaint(
    network: Network,
    diffusion: Diffusion,
    times: Sequence[int],
    known: Known,
    noise: Noise,
    guess: Tensor | None = None,
) -> Iterator[Visit]:
    """Yield what each reverse step leaves, along `times` (see `schedule.jump_times`).

    Known pixels of the last image are near what is given but not equal: the last step predicts them once more.
    """
    draws = count()
    x = begun(diffusion, times, noise(next(draws)), guess)
    clean = None
    for t, following in pairwise(int(t) for t in times):
        if following > t:
            x = diffusion.undone(x, following, noise(next(draws)))
            continue
        # drawn before the known pixels' own noise, as the published code does
        own = noise(next(draws))
        if clean is not None:
            x = diffusion.noised(known.image, t, noise(next(draws))).where(known.keep, x)
        step = diffusion.step(x, t, network(x, diffusion.told(t, len(x), x.device)))
        x = step.mean if t == 0 else step.mean + (0.5 * step.log_variance).exp() * own
        clean = step.clean
        yield Visit(x, clean)
