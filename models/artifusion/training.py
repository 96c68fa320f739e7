"""ArtiFusion as a task for the project's trainer: clean crops, noise, and how much of which is which.

The paper's recipe (its published script's numbers) is the default: 4000 linear times, the hybrid loss, AdamW at
1e-4 without decay, one crop at a time, a moving average of 0.9999. `DEMONSTRATION` is what an hour or two of one
CPU core could teach: fewer times and a cosine, larger steps, and losses weighted for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.models.artifusion.data import Crops
from wsitk.models.artifusion.diffusion import Diffusion, hybrid_loss
from wsitk.models.artifusion.network import Denoiser, DenoiserConfig
from wsitk.training.fit import Outcome, fit
from wsitk.training.settings import FitConfig
from wsitk.training.state import write_tensors
from wsitk.training.task import Batch, Group, Task

__all__ = [
    "DEMONSTRATION",
    "DEMONSTRATION_FIT",
    "FIT",
    "ArtiFusionTask",
    "Event",
    "LearnConfig",
    "train",
]

Event = Callable[[str, Mapping[str, Any]], None]

WEIGHTS = "artifusion.safetensors"

VALIDATED_TIMES = 8
"""Held-out crops are noised to so many times, evenly, with noise that never changes."""


@dataclass(frozen=True)
class LearnConfig:
    """What is learned, and how it is weighed.

    Attributes
    ----------
    network
        The denoiser's shape.
    schedule, times
        How noise grows, and over how many times.
    batch
        Crops to a step.
    weighting
        ``none``: every time alike, as in the paper. ``min-snr``: a time's squared error counts no more than 5
        times what it would as an error of the clean image (Hang et al. 2023, arXiv:2303.09556), so that short
        runs don't spend themselves on the last grain.
    epoch_steps
        Steps that are called an epoch.
    """

    network: DenoiserConfig = field(default_factory=DenoiserConfig)
    schedule: Literal["linear", "cosine"] = "linear"
    times: int = 4000
    batch: int = 1
    weighting: Literal["none", "min-snr"] = "none"
    epoch_steps: int = 1000


FIT = FitConfig(
    steps=1_000_000,
    learning_rate=1e-4,
    weight_decay=0.0,
    schedule="constant",
    average=0.9999,
    save_every=5000,
    log_every=100,
)

DEMONSTRATION = LearnConfig(
    DenoiserConfig(size=64, width=64, depths=(1, 2, 2), heads=(2, 4, 8), drop_path=0.0),
    schedule="cosine",
    times=1000,
    batch=8,
    weighting="min-snr",
    epoch_steps=500,
)

DEMONSTRATION_FIT = FitConfig(
    seed=23,
    steps=20_000,
    precision="bfloat16",
    learning_rate=1e-3,
    weight_decay=0.01,
    decay_vectors=False,
    schedule="exponential",
    gamma=0.88,
    clip=1.0,
    average=0.998,
    threads=1,
    validate_every=500,
    save_every=250,
    log_every=50,
)
"""Ended by hand where the time was up: its rate falls by itself, so every checkpoint can be used."""


@final
class ArtiFusionTask(Task):
    """Trains a denoiser on `training`; the losses of `held_out` are logged on the way."""

    def __init__(self, config: LearnConfig, training: Crops, held_out: Crops, seed: int) -> None:
        sides = {*training.pixels.shape[1:3], *held_out.pixels.shape[1:3]}
        if min(sides) < config.network.size:
            raise UsageError(
                "WSI643",
                f"crops of {min(sides)} px for a network of {config.network.size}; write crops of that side or more",
            )
        self.config, self.training, self.held_out, self.seed = config, training, held_out, seed
        self.diffusion = Diffusion.of(config.schedule, config.times)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = Denoiser(config.network)

    @property
    def epoch_steps(self) -> int:
        return self.config.epoch_steps

    def batch(self, index: int, rank: int, world: int) -> Batch:
        """Return ``image`` float32 (N, 3, S, S) in -1..1 and ``place`` (N,) in 0..1: where in the chain it is."""
        size = self.config.batch
        numbers = [index * size + k for k in range(rank, size, world)]
        images = torch.stack([self._crop(number) for number in numbers])
        rng = np.random.default_rng((self.seed, 2, index))
        # a time from each of `size` equal parts: the loss varies less than with times drawn alone
        places = (np.arange(size) + rng.random(size)) / size
        return {"image": images, "place": torch.from_numpy(places[rank::world])}

    def _crop(self, number: int) -> Tensor:
        """Return a part of crop `number` of the run, turned or mirrored: every crop once, then in another order."""
        lap, place = divmod(number, len(self.training))
        order = np.random.default_rng((self.seed, 0, lap)).permutation(len(self.training))
        pixels = self.training.pixels[order[place]]
        rng = np.random.default_rng((self.seed, 1, number))
        pose = int(rng.integers(8))
        y, x = (int(rng.integers(n - self.config.network.size + 1)) for n in pixels.shape[:2])
        pixels = np.rot90(self._part(pixels, y, x), pose % 4)
        return _scaled(pixels[:, ::-1] if pose >= 4 else pixels)

    def _part(self, pixels: NDArray[np.uint8], y: int, x: int) -> NDArray[np.uint8]:
        size = self.config.network.size
        return pixels[y : y + size, x : x + size]

    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the hybrid loss at one time for each crop; the noise is the trainer's random state."""
        clean = batch["image"]
        t = (batch["place"] * len(self.diffusion)).long().clamp(max=len(self.diffusion) - 1)
        simple, bound = hybrid_loss(
            self.diffusion, self.network, clean, t, torch.randn_like(clean), self._weights(t, clean)
        )
        return simple + bound, {"simple": simple, "bound": bound}

    def _weights(self, t: Tensor, like: Tensor) -> Tensor | None:
        if self.config.weighting == "none":
            return None
        signal = torch.from_numpy(self.diffusion.signal)[t.cpu()]
        ratio = signal / (1 - signal)
        return (ratio.clamp(max=5) / ratio).to(like.device, like.dtype)

    def groups(self) -> Sequence[Group]:
        return [Group(tuple(name for name, _ in self.network.named_parameters()))]

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the mean errors, of noise and of the clean image, over held-out crops at fixed times and noise."""
        noise_errors, clean_errors = [], []
        places = np.linspace(0.1, 0.9, VALIDATED_TIMES)
        for k in range(min(len(self.held_out), 4 * VALIDATED_TIMES)):
            clean = _scaled(self._part(self.held_out.pixels[k], 0, 0))[None]
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
            t = int(places[k % VALIDATED_TIMES] * len(self.diffusion))
            device = next(network.parameters()).device
            x = self.diffusion.noised(clean, t, noise).to(device)
            predicted = network(x, self.diffusion.told(t, 1, device)).cpu()
            noise_errors.append(float((predicted[:, :3] - noise).square().mean()))
            guess = self.diffusion.step(x.cpu(), t, predicted).clean
            clean_errors.append(float((guess - clean).square().mean()))
        if not noise_errors:
            return {}
        return {"simple": float(np.mean(noise_errors)), "clean": float(np.mean(clean_errors))}

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the weights in float16, as they ship; what the network computes by itself is left out."""
        learned = dict(network.named_parameters())
        half = {name: value.detach().half() for name, value in learned.items()}
        write_tensors(folder / WEIGHTS, half, {"format": "pt"})

    def identity(self) -> Mapping[str, Any]:
        """Return settings and how many crops of which images there are; pixels are taken for what these say."""
        return {
            "config": asdict(self.config),
            "training": _counts(self.training),
            "held_out": _counts(self.held_out),
        }


def _scaled(pixels: NDArray[np.uint8]) -> Tensor:
    """Return (3, S, S) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1


def _counts(crops: Crops) -> dict[str, int]:
    names = [place.image for place in crops.places]
    return {name: names.count(name) for name in sorted(set(names))}


def train(
    training: Crops,
    held_out: Crops,
    out: Path,
    config: LearnConfig | None = None,
    settings: FitConfig = FIT,
    *,
    device: str = "cpu",
    on_event: Event = lambda kind, facts: None,
) -> Outcome:
    """Train on clean crops; resumes in `out`. Raises UsageError WSI643 and what `fit` raises."""
    task = ArtiFusionTask(config or LearnConfig(), training, held_out, settings.seed)
    return fit(task, settings, out, device=device, on_event=on_event)
