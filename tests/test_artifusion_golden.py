"""ArtiFusion against vectors recorded from the published code: denoiser, schedules, steps, whole restorations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import detfill
from numpy.typing import NDArray
from PIL import Image

from wsitk.models.artifusion.diffusion import Diffusion
from wsitk.models.artifusion.model import config_of
from wsitk.models.artifusion.network import Denoiser, DenoiserConfig, time_embedding
from wsitk.models.artifusion.repaint import Known, repaint
from wsitk.models.artifusion.schedule import even_times, jump_times, spaced_times

GOLDEN = Path(__file__).parent / "golden" / "artifusion"

CONFIGS = {"tiny64": DenoiserConfig(size=64, width=48), "full256": DenoiserConfig()}

STEPS = {"tiny64": ("tiny", 4), "full256": ("full", 32)}
"""What the draws of the single steps are called, and every how many pixels they were kept."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices: threads that wait for a busy core cost far more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=2)
def filled(name: str) -> Denoiser:
    """Return a network whose weights come from an entry by entry state dict in the recorded order."""
    network = Denoiser(CONFIGS[name])
    rows = json.loads((GOLDEN / f"state_dict_keys_{name}.json").read_text())
    own = network.state_dict()
    state = {
        entry: own[entry]
        if dtype == "int64" or entry.endswith("attn_mask")
        else torch.from_numpy(detfill.fill(entry, shape))
        for entry, shape, dtype in rows
    }
    network.load_state_dict(state, strict=True)
    return network.eval()


def drawn(name: str, side: int) -> torch.Tensor:
    return torch.from_numpy(detfill.normal(name, (1, 3, side, side)))


def vectors(name: str) -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_has_the_published_names_shapes_types_and_order(name: str) -> None:
    state = filled(name).state_dict()
    ours = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]
    assert ours == json.loads((GOLDEN / f"state_dict_keys_{name}.json").read_text())
    assert sum(p.numel() for p in filled(name).parameters()) == {"tiny64": 8227044, "full256": 29671620}[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_of_a_network_is_told_by_its_tensors(name: str) -> None:
    assert config_of(filled(name).state_dict()) == CONFIGS[name]


@pytest.mark.parametrize("t", [0, 17, 999])
@pytest.mark.parametrize("name", CONFIGS)
def test_denoiser(name: str, t: int) -> None:
    side = CONFIGS[name].size
    found = filled(name)(drawn(f"af/{name}/x{t}", side), torch.tensor([float(t)])).numpy()
    wanted = vectors("denoiser_thin")[f"{name}_t{t}"]
    step = side // wanted.shape[-1]
    np.testing.assert_allclose(found[:, :, ::step, ::step], wanted, atol=1e-4)


def test_time_embedding() -> None:
    recorded = vectors("denoiser_thin")
    found = time_embedding(torch.from_numpy(recorded["timestep_embedding_t"]), 128)
    np.testing.assert_allclose(found.numpy(), recorded["timestep_embedding"], atol=1e-6)


def test_schedules() -> None:
    recorded = vectors("schedules")
    for steps, count in ((1000, 250), (1000, 10), (1000, 20), (4000, 250)):
        np.testing.assert_array_equal(spaced_times(steps, [count]), recorded[f"space_{steps}_{count}"])
    np.testing.assert_array_equal(even_times(1000, 25), recorded["space_1000_ddim25"])
    for name, jumps in (("250_10_10", (250, 10, 10)), ("10_2_2", (10, 2, 2)), ("20_5_3", (20, 5, 3))):
        np.testing.assert_array_equal(jump_times(*jumps), recorded[f"jump_{name}"])
    np.testing.assert_array_equal(jump_times(10, 10, 1), recorded["jump_10_none"])


def test_the_curves_of_a_shortened_chain() -> None:
    chain, recorded = Diffusion.of("linear", 1000, spaced_times(1000, [250])), vectors("schedules")
    for ours, name in (
        (chain.betas, "betas"),
        (chain.signal, "alphas_cumprod"),
        (chain.variance, "posterior_variance"),
        (chain.log_variance, "posterior_log_variance_clipped"),
        (chain.of_clean, "posterior_mean_coef1"),
        (chain.of_noisy, "posterior_mean_coef2"),
        (chain.times, "timestep_map"),
    ):
        np.testing.assert_allclose(ours, recorded[f"sp250_{name}"], rtol=1e-12)


@pytest.mark.parametrize("t", [249, 120, 1, 0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reverse_step(name: str, t: int) -> None:
    recorded, side = vectors(f"single_step_{name}_thin"), CONFIGS[name].size
    tag, stride = STEPS[name]
    chain = Diffusion.of("linear", 1000, spaced_times(1000, [250]))
    x = drawn(f"af/{tag}/xt", side)
    step = chain.step(x, t, filled(name)(x, chain.told(t, 1, x.device)))

    undone = chain.undone(x, min(t + 1, 249), drawn(f"af/{tag}/u{t}/noise0", side))
    # the clean image is the noise times up to 120: so are its last bits
    coarse = 1e-4 * max(1.0, float(np.sqrt(1 / chain.signal[t] - 1)) / 10)
    for found, what, tolerance in (
        (step.mean, f"pmv_t{t}_mean", 1e-4),
        (step.log_variance, f"pmv_t{t}_log_variance", 1e-4),
        (step.clean, f"pmv_t{t}_pred_xstart", coarse),
        (undone, f"undo_t{t}", 1e-4),
    ):
        np.testing.assert_allclose(
            found.numpy()[:, :, ::stride, ::stride], recorded[what], atol=tolerance, err_msg=what
        )


@pytest.mark.parametrize("t", [249, 120, 1, 0])
def test_a_reverse_step_with_known_pixels(t: int) -> None:
    recorded = vectors("single_step_tiny64_thin")
    with Image.open(GOLDEN.parent / "he_256.png") as image:
        corner = np.asarray(image.convert("RGB"))[:64, :64]
    known = torch.from_numpy(corner.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    keep = torch.from_numpy(vectors("restore_tiny64_10_plain")["keep_u8"])[None, None] > 0
    chain = Diffusion.of("linear", 1000, spaced_times(1000, [250]))
    own, put = (drawn(f"af/tiny/s{t}/noise{k}", 64) for k in (0, 1))
    x = chain.noised(known, t, put).where(keep, drawn("af/tiny/xt", 64))
    step = chain.step(x, t, filled("tiny64")(x, chain.told(t, 1, x.device)))
    found = step.mean + (t > 0) * (0.5 * step.log_variance).exp() * own
    np.testing.assert_allclose(found.numpy()[:, :, ::4, ::4], recorded[f"psample_t{t}"], atol=1e-4)


@pytest.mark.parametrize(("case", "jumps"), [("plain", (10, 10, 1)), ("jump2x2", (10, 2, 2))])
def test_a_whole_restoration(case: str, jumps: tuple[int, int, int]) -> None:
    recorded = vectors(f"restore_tiny64_10_{case}")
    image = torch.from_numpy(recorded["gt_u8"]).permute(2, 0, 1)[None].float() / 127.5 - 1
    known = Known(image, torch.from_numpy(recorded["keep_u8"])[None, None] > 0)
    asked: list[int] = []

    def noise(k: int) -> torch.Tensor:
        asked.append(k)
        return drawn(f"af/r10{case[0]}/noise{k}", 64)

    times = jump_times(*jumps)
    np.testing.assert_array_equal(times, recorded["times"])
    chain = Diffusion.of("linear", 1000, spaced_times(1000, [10]))
    visits = list(repaint(filled("tiny64"), chain, times.tolist(), known, noise))
    assert asked == list(range(int(recorded["noise_calls"])))
    path = [[float(v.image.mean()), float(v.image.std()), float(v.clean.mean())] for v in visits]
    np.testing.assert_allclose(path, recorded["trajectory(sample mean,sample std,x0 mean)"], atol=1e-4)
    np.testing.assert_allclose(visits[-1].image.numpy(), recorded["final"], atol=1e-4)
    np.testing.assert_allclose(visits[-1].clean.numpy(), recorded["final_pred_xstart"], atol=1e-4)


@pytest.mark.parametrize("name", ["tiny64", pytest.param("full256", marks=pytest.mark.slow)])
def test_all_recorded_pixels(name: str, data: Path) -> None:
    side, tag = CONFIGS[name].size, STEPS[name][0]
    with np.load(data / "golden" / "artifusion" / "denoiser.npz") as whole:
        for t in (0, 17, 999):
            wanted = whole[f"{name}_t{t}"]
            step = side // wanted.shape[-1]
            found = filled(name)(drawn(f"af/{name}/x{t}", side), torch.tensor([float(t)])).numpy()
            np.testing.assert_allclose(found[:, :, ::step, ::step], wanted, atol=1e-4)
            mean, spread, low, high, size = whole[f"{name}_t{t}_stats"]
            stats = [found.mean(), found.std(), found.min(), found.max(), np.abs(found).mean()]
            np.testing.assert_allclose(stats, [mean, spread, low, high, size], atol=1e-4)
    chain, x = Diffusion.of("linear", 1000, spaced_times(1000, [250])), drawn(f"af/{tag}/xt", side)
    with np.load(data / "golden" / "artifusion" / f"single_step_{name}.npz") as whole:
        for t in (120, 1, 0):
            step = chain.step(x, t, filled(name)(x, chain.told(t, 1, x.device)))
            found = step.mean.numpy()[:, :, :: side // 32, :: side // 32]
            np.testing.assert_allclose(found, whole[f"{name}_pmv_t{t}_mean"], atol=1e-4)
