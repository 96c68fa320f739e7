"""The samplers against Gaussians, whose best denoiser, paths and conditional means are known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from wsitk.errors import UsageError
from wsitk.models.artifusion.diffusion import Diffusion
from wsitk.models.artifusion.repaint import Known, Noise, Visit, repaint
from wsitk.models.artifusion.restore import Sampling
from wsitk.models.artifusion.samplers import ddim, dpm_solver
from wsitk.models.artifusion.schedule import cosine_betas, even_times, jump_times, linear_betas, spaced_times

TIMES = 1000

SPREAD = 0.3
"""Standard deviation of a pixel: small, so that the clean image never leaves -1..1."""

SIGNAL = np.cumprod(1 - linear_betas(TIMES))


def chain(steps: int) -> Diffusion:
    return Diffusion.of("linear", TIMES, spaced_times(TIMES, [steps]))


def pairs_denoiser(correlation: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the best denoiser of images whose pixels come in pairs of neighbours along the last axis."""
    covariance = SPREAD**2 * np.array([[1, correlation], [correlation, 1]])

    def network(x: Tensor, t: Tensor) -> Tensor:
        signal = float(SIGNAL[round(float(t[0]))])
        noisy = signal * covariance + (1 - signal) * np.eye(2)
        gain = torch.from_numpy(np.sqrt(signal) * covariance @ np.linalg.inv(noisy)).to(x.dtype)
        clean = (x.unflatten(-1, (-1, 2)) @ gain.T).flatten(-2)
        noise = (x - np.sqrt(signal) * clean) / np.sqrt(1 - signal)
        return torch.cat([noise, torch.full_like(noise, -1)], dim=1)

    return network


def draws(shape: tuple[int, ...], seed: int = 0) -> Noise:
    def noise(k: int) -> Tensor:
        return torch.randn(
            shape, generator=torch.Generator().manual_seed(1000 * seed + k), dtype=torch.float64
        )

    return noise


def nothing_known(shape: tuple[int, ...]) -> Known:
    return Known(torch.zeros(shape, dtype=torch.float64), torch.zeros((1, 1, *shape[2:]), dtype=torch.bool))


def last(visits: object) -> Visit:
    *_, final = visits  # type: ignore[misc]  # an iterator
    return final


def test_deterministic_samplers_follow_the_exact_path_in_their_orders() -> None:
    """The probability flow of a Gaussian scales its noise; halving the step divides the error by 2, or by 4."""
    shape = (1, 3, 8, 8)
    start = draws(shape)(0)
    exact = SPREAD / np.sqrt(SPREAD**2 * SIGNAL[-1] + 1 - SIGNAL[-1]) * start
    errors = {}
    for name, sampler in (("ddim", ddim), ("dpm", dpm_solver)):
        for steps in (50, 100, 200):
            times = jump_times(steps, steps, 1).tolist()
            common = (pairs_denoiser(), chain(steps), times, nothing_known(shape), draws(shape))
            errors[name, steps] = float((last(sampler(*common)).image - exact).abs().mean())
    for steps in (50, 100):
        assert 0.4 < errors["ddim", 2 * steps] / errors["ddim", steps] < 0.6
        assert 0.2 < errors["dpm", 2 * steps] / errors["dpm", steps] < 0.35


def test_noisy_ddim_is_ancestral_sampling() -> None:
    """With eta 1, and the smaller of both variances, the two are the same formula."""
    shape, steps = (1, 3, 4, 4), 20
    times, noise = jump_times(steps, steps, 1).tolist(), draws(shape)
    # the ancestral sampler draws noise for known pixels in between
    own = [0, 1, *range(2, 2 * steps, 2)]
    common = (pairs_denoiser(0.5), chain(steps), times, nothing_known(shape))
    ours = [v.image for v in ddim(*common, lambda k: noise(own[k]), eta=1.0)]
    theirs = [v.image for v in repaint(*common, noise)]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver, repaint])
def test_samples_have_the_spread_of_the_data(sampler: Callable[..., object]) -> None:
    shape, steps = (1, 3, 64, 64), 200
    times = jump_times(steps, steps, 1).tolist()
    found = last(sampler(pairs_denoiser(), chain(steps), times, nothing_known(shape), draws(shape)))
    assert float(found.image.std()) == pytest.approx(SPREAD, rel=0.07)
    assert abs(float(found.image.mean())) < 0.02


@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
@pytest.mark.parametrize("jumps", [1, 3])
def test_known_pixels_stay_on_their_path(sampler: Callable[..., object], jumps: int) -> None:
    """What is known comes out as it went in, though nothing puts it back, and also after going up again."""
    shape, steps = (1, 3, 8, 8), 20
    image = draws(shape, seed=5)(0) * SPREAD
    keep = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    keep[..., :4] = True
    times = jump_times(steps, 5, jumps).tolist()
    visits = list(sampler(pairs_denoiser(0.8), chain(steps), times, Known(image, keep), draws(shape)))  # type: ignore[call-overload]  # any sampler
    np.testing.assert_allclose(visits[-1].image[..., :4], image[..., :4], atol=1e-12)
    assert all(torch.equal(v.clean[..., :4], image[..., :4]) for v in visits)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver, repaint])
def test_resampling_brings_what_is_painted_to_what_is_known(sampler: Callable[..., object]) -> None:
    """Of pairs that correlate by 0.9 one is known: the other's regression on it is 0.9 in the data."""
    shape, steps = (1, 3, 24, 64), 200
    image = torch.zeros(shape, dtype=torch.float64)
    image[..., ::2] = SPREAD * draws((1, 3, 24, 32), seed=3)(0)
    keep = torch.zeros(1, 1, 24, 64, dtype=torch.bool)
    keep[..., ::2] = True
    slopes = []
    for visits in (1, 4):
        times = jump_times(steps, 10, visits).tolist()
        common = (pairs_denoiser(0.9), chain(steps), times, Known(image, keep), draws(shape))
        found = last(sampler(*common)).image
        a, b = image[..., ::2].flatten(), found[..., 1::2].flatten()
        slopes.append(float((a * b).sum() / (a * a).sum()))
    assert slopes[0] + 0.1 < slopes[1] < 0.95
    assert slopes[1] > 0.7


def test_a_chain_may_start_from_a_guess() -> None:
    """The first step sees the guess with the noise of that time, and nothing else."""
    shape, seen = (1, 3, 4, 4), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.clone(), float(t[0])))
        return torch.zeros(1, 6, 4, 4, dtype=x.dtype)

    guess = 0.3 * torch.ones(shape, dtype=torch.float64)
    for sampler in (ddim, dpm_solver, repaint):
        seen.clear()
        list(
            sampler(
                network, chain(20), jump_times(10, 10, 1).tolist(), nothing_known(shape), draws(shape), guess
            )
        )
        x, told = seen[0]
        assert len(seen) == 10
        assert told == chain(20).times[9]
        np.testing.assert_allclose(x, chain(20).noised(guess, 9, draws(shape)(0)))


def test_a_schedules_signal_is_that_of_the_whole_chain_at_the_kept_times() -> None:
    for kind, betas in (("linear", linear_betas(400)), ("cosine", cosine_betas(400))):
        whole = np.cumprod(1 - betas)
        kept = spaced_times(400, [37])
        shorter = Diffusion.of(kind, 400, kept)  # type: ignore[arg-type]  # both are kinds
        np.testing.assert_allclose(shorter.signal, whole[kept], rtol=1e-10)
        np.testing.assert_allclose(shorter.times, kept * 2.5)
        assert kept[0] == 0
        assert kept[-1] == 399


def test_times_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match="11 times of a section of 10"):
        spaced_times(10, [11])
    with pytest.raises(ValueError, match="no whole stride"):
        even_times(10, 7)


def test_a_sampling_counts_its_evaluations() -> None:
    assert Sampling().evaluations == 2410
    assert Sampling("dpm++", steps=25, jump_n_sample=1).evaluations == 25
    assert Sampling("dpm++", steps=20, jump_n_sample=1, start=0.5).evaluations == 10
    for wrong in ({"steps": 1}, {"eta": 2.0}, {"jump_length": 0}, {"start": 0.0}, {"sampler": "euler"}):
        with pytest.raises(UsageError, match="WSI644"):
            Sampling(**wrong)  # type: ignore[arg-type]  # that is the test
