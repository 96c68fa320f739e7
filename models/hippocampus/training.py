"""The hippocampus as a task for the project's trainer: crops in three dimensions, Dice and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsitk.metrics.overlap import dice
from wsitk.models.hippocampus.augment import Recipe, random_crop
from wsitk.models.hippocampus.cases import Case, find_cases, read_case
from wsitk.models.hippocampus.network import CLASSES, narrow_stunet
from wsitk.models.stunet.network import STUNet
from wsitk.training.fit import Outcome, fit
from wsitk.training.folds import split
from wsitk.training.settings import FitConfig
from wsitk.training.state import write_tensors
from wsitk.training.task import Batch, Group, Task

__all__ = ["FIT", "HippocampusTask", "VolumeConfig", "segmentation_loss", "train"]

Event = Callable[[str, Mapping[str, Any]], None]

WEIGHTS = "hippocampus.safetensors"

FIT = FitConfig(
    seed=7,
    steps=2000,
    precision="bfloat16",
    learning_rate=2e-3,
    weight_decay=1e-2,
    decay_vectors=False,
    warmup=0.02,
    clip=5.0,
    average=0.99,
    threads=1,
    validate_every=250,
    save_every=250,
    log_every=50,
)
"""What made the weights that ship: a quarter of an hour of one CPU core."""


@dataclass(frozen=True)
class VolumeConfig:
    """What is learned from: crops of `shape` voxels, `batch` at a time; `parts` and `part` say what is held out."""

    base: int = 12
    levels: int = 3
    shape: tuple[int, int, int] = (40, 56, 40)
    batch: int = 2
    parts: int = 5
    part: int = 0
    augment: Recipe = field(default_factory=Recipe)


@final
class HippocampusTask(Task):
    """Trains the narrow STU-Net on `training`; `held_out` is what it is judged on."""

    def __init__(
        self, config: VolumeConfig, training: Sequence[Case], held_out: Sequence[Case], seed: int
    ) -> None:
        self.config, self.training, self.held_out, self.seed = config, training, held_out, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = narrow_stunet(config.base, config.levels)
            for module in network.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.kaiming_normal_(module.weight, 0.01)
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all have one
        # channels last: a third faster on a CPU, the numbers are the same
        self.network: STUNet = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # not in the stubs

    @property
    def epoch_steps(self) -> int:
        return max(1, len(self.training) // self.config.batch)

    def batch(self, index: int, rank: int, world: int) -> Batch:
        """Return ``image`` float32 (N, 1, Z, Y, X) and ``labels`` uint8 (N, Z, Y, X)."""
        size = self.config.batch
        made = [self._crop(index * size + k) for k in range(rank, size, world)]
        images, labels = (np.stack(each) for each in zip(*made, strict=True))
        return {"image": torch.from_numpy(images)[:, None], "labels": torch.from_numpy(labels)}

    def _crop(self, number: int) -> tuple[np.typing.NDArray[np.float32], np.typing.NDArray[np.uint8]]:
        """Return crop `number` of the run: every case once, in another order each time."""
        lap, place = divmod(number, len(self.training))
        order = np.random.default_rng((self.seed, 0, lap)).permutation(len(self.training))
        rng = np.random.default_rng((self.seed, 1, number))
        return random_crop(self.training[order[place]], self.config.shape, rng, self.config.augment)

    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss over the three finest resolutions, each of half the weight of the one before."""
        image = batch["image"].contiguous(memory_format=torch.channels_last_3d)
        found = []
        for k, logits in enumerate(self.network.supervised(image)[:3]):
            step = 2**k
            labels = batch["labels"][:, ::step, ::step, ::step].long()
            found.append(segmentation_loss(logits.float(), labels))
        shares = [0.5**k for k in range(len(found))]
        each = [share * (overlap + entropy) for share, (overlap, entropy) in zip(shares, found, strict=True)]
        overlap, entropy = found[0]
        return torch.stack(each).sum() / sum(shares), {"dice": overlap, "cross_entropy": entropy}

    def groups(self) -> Sequence[Group]:
        return [Group(tuple(name for name, _ in self.network.named_parameters()))]

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the mean Dice of each part over whole held-out volumes, and the mean of both."""
        each = np.array([_dices(network, case) for case in self.held_out])
        if not each.size:
            return {}
        means = each.mean(axis=0)
        named = {f"dice_{n.lower()}": float(m) for n, m in zip(CLASSES[1:], means, strict=True)}
        return {"dice": float(means.mean()), **named}

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the weights in float16, as they ship."""
        half = {name: value.half() for name, value in network.state_dict().items()}
        write_tensors(folder / WEIGHTS, half, {"format": "pt"})

    def identity(self) -> Mapping[str, Any]:
        """Return settings and the names of cases; their pixels are taken for what the names say."""
        return {
            "config": asdict(self.config),
            "training": [c.name for c in self.training],
            "held_out": [c.name for c in self.held_out],
        }


def segmentation_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return one minus the soft Dice of the foreground classes, over the batch as a whole, and the cross-entropy.

    `logits` (N, K, Z, Y, X), `labels` (N, Z, Y, X) with 0 for background.
    """
    share = logits.softmax(1)[:, 1:]
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(share.dtype)
    axes = (0, 2, 3, 4)
    both = (share * truth).sum(axes)
    overlap = (2 * both + 1) / (share.sum(axes) + truth.sum(axes) + 1)
    return 1 - overlap.mean(), F.cross_entropy(logits, labels)


def _dices(network: nn.Module, case: Case) -> list[float]:
    """Return the Dice of each class; the network sees the volume at once, padded to a multiple of its stride."""
    padded = [-n % 8 for n in case.image.shape]
    pads = [p for n in reversed(padded) for p in (0, n)]
    image = F.pad(torch.from_numpy(case.image)[None, None], pads)
    logits = network(image)["logits"]
    found = logits[0].argmax(0)[tuple(slice(n) for n in case.image.shape)].numpy()
    return [dice(case.labels == k, found == k) for k in range(1, len(CLASSES))]


def train(
    data: Path,
    out: Path,
    config: VolumeConfig | None = None,
    settings: FitConfig = FIT,
    *,
    on_event: Event = lambda kind, facts: None,
) -> Outcome:
    """Train on the cases in the folder `data`, but for the held-out part; resumes in `out`.

    Raises UsageError WSI885 for data that are not such cases, and what `fit` raises.
    """
    config = config or VolumeConfig()
    cases = [read_case(*pair) for pair in find_cases(data)]
    learn, judge = split([c.name for c in cases], config.parts, config.part)
    task = HippocampusTask(config, [cases[i] for i in learn], [cases[i] for i in judge], settings.seed)
    return fit(task, settings, out, on_event=on_event)
