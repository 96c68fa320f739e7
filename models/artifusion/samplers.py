"""Samplers of few steps: DDIM and DPM-Solver++ (2M), with known pixels held in the expected clean image.

Song et al. 2021 (DDIM, eq. 12 and 16); Lu et al. 2022 (DPM-Solver++, algorithm 2). Where the clean image that a
network expects is overwritten by what is known, a known pixel follows its own path exactly, from the noise that it
started with; nothing has to be put back, and several steps' expectations may be combined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, pairwise

import numpy as np
from torch import Tensor

from wsitk.models.artifusion.diffusion import Diffusion, Network
from wsitk.models.artifusion.repaint import Known, Noise, Visit, begun

__all__ = ["ddim", "dpm_solver"]


def ddim(
    network: Network,
    diffusion: Diffusion,
    times: Sequence[int],
    known: Known,
    noise: Noise,
    guess: Tensor | None = None,
    eta: float = 0.0,
) -> Iterator[Visit]:
    """Yield what each reverse step leaves; steps up in `times` add noise again, as RePaint's do.

    `eta` is the noise of a step down: 0 for none, 1 for as much as the ancestral sampler adds.
    """
    draws = count()
    x = begun(diffusion, times, noise(next(draws)), guess)
    for t, following in pairwise(int(t) for t in times):
        if following > t:
            x = diffusion.undone(x, following, noise(next(draws)))
            continue
        clean = _expected(network, diffusion, known, x, t)
        signal, after = _signal(diffusion, t), _signal(diffusion, following)
        held = (x - math.sqrt(signal) * clean) / math.sqrt(1 - signal)
        # eta is 0 or the step is the last: nothing to draw
        spread = eta * math.sqrt((1 - after) / (1 - signal) * (1 - signal / after))
        x = math.sqrt(after) * clean + math.sqrt(max(0.0, 1 - after - spread**2)) * held
        if spread:
            x = x + spread * noise(next(draws))
        yield Visit(x, clean)


def dpm_solver(
    network: Network,
    diffusion: Diffusion,
    times: Sequence[int],
    known: Known,
    noise: Noise,
    guess: Tensor | None = None,
) -> Iterator[Visit]:
    """Yield what each step of the second-order multistep solver leaves; the first and the last are of order one.

    Steps up in `times` add noise again; the step after one is of order one too, since its past is another path's.
    """
    draws = count()
    x = begun(diffusion, times, noise(next(draws)), guess)
    last: tuple[Tensor, float] | None = None
    for t, following in pairwise(int(t) for t in times):
        if following > t:
            x, last = diffusion.undone(x, following, noise(next(draws))), None
            continue
        clean = _expected(network, diffusion, known, x, t)
        if following < 0:
            # at the clean image the step is infinite, and leaves what is expected
            yield Visit(clean, clean)
            continue
        signal, after = _signal(diffusion, t), _signal(diffusion, following)
        step = _half_log_ratio(after) - _half_log_ratio(signal)
        direction = clean
        if last is not None:
            before, length = last
            direction = clean + (step / (2 * length)) * (clean - before)
        x = math.sqrt((1 - after) / (1 - signal)) * x - math.sqrt(after) * math.expm1(-step) * direction
        last = clean, step
        yield Visit(x, clean)


def _expected(network: Network, diffusion: Diffusion, known: Known, x: Tensor, t: int) -> Tensor:
    """Return the clean image that the network expects, and what is known where it is known."""
    return known.kept_in(diffusion.step(x, t, network(x, diffusion.told(t, len(x), x.device))).clean)


def _signal(diffusion: Diffusion, t: int) -> float:
    return float(diffusion.signal[t]) if t >= 0 else 1.0


def _half_log_ratio(signal: float) -> float:
    """Return the logarithm of the ratio of the clean image's scale to the noise's."""
    return 0.5 * float(np.log(signal / (1 - signal)))
