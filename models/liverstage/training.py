"""Liver stages as a task for the project's trainer: made fields, each seen once; Dice and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from wsitk.metrics.counts import Counts
from wsitk.metrics.overlap import dice
from wsitk.metrics.panoptic import panoptic_counts
from wsitk.models.liverstage.data import Crops, Photograph, normalised, read_photographs, sample
from wsitk.models.liverstage.fields import Field, make_field
from wsitk.models.liverstage.network import LiverStageUNet, UNetConfig
from wsitk.models.liverstage.objects import segment
from wsitk.training.fit import Outcome, fit
from wsitk.training.folds import split
from wsitk.training.settings import FitConfig
from wsitk.training.state import write_tensors
from wsitk.training.task import Batch, Group, Task

__all__ = ["FIT", "FieldsConfig", "LiverStageTask", "answer", "loss_parts", "train"]

Event = Callable[[str, Mapping[str, Any]], None]

WEIGHTS = "liverstage.safetensors"

FIT = FitConfig(
    seed=5,
    steps=1200,
    precision="bfloat16",
    learning_rate=2e-3,
    weight_decay=1e-2,
    decay_vectors=False,
    warmup=0.02,
    clip=5.0,
    average=0.99,
    threads=1,
    validate_every=600,
    save_every=100,
    log_every=50,
)
"""What made the weights that ship."""


@dataclass(frozen=True)
class FieldsConfig:
    """What is learned from, and what learns it: `fields` made anew for each step, the crops of all of them a batch.

    `held_out` is the number of made fields that the network is judged on; their seeds are used for nothing else.
    """

    network: UNetConfig = field(default_factory=UNetConfig)
    crops: Crops = field(default_factory=Crops)
    fields: int = 1
    held_out: int = 16


@final
class LiverStageTask(Task):
    """Trains the network on fields that `photographs` of nuclei take part in."""

    def __init__(self, config: FieldsConfig, photographs: Sequence[Photograph], seed: int) -> None:
        self.config, self.photographs, self.seed = config, list(photographs), seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = LiverStageUNet(config.network)
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
            # most pixels are none of a parasite's, and it need not learn that first
            nn.init.constant_(network.head.bias, -2.0)  # type: ignore[arg-type]  # it has one
        self.network: LiverStageUNet = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs

    @property
    def epoch_steps(self) -> int:
        return 100

    def batch(self, index: int, rank: int, world: int) -> Batch:
        """Return ``image`` and ``target`` float32 (N, 2, H, W)."""
        made = []
        for k in range(rank, self.config.fields, world):
            rng = np.random.default_rng((self.seed, 1, index * self.config.fields + k))
            made += sample(rng, self.config.crops, self.photographs)[1]
        return {
            "image": torch.from_numpy(np.stack([s.image for s in made])),
            "target": torch.from_numpy(np.stack([s.target for s in made])),
        }

    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        parts = loss_parts(self.network(image)["logits"].float(), batch["target"])
        return torch.stack(list(parts.values())).sum(), parts

    def groups(self) -> Sequence[Group]:
        return [Group(tuple(name for name, _ in self.network.named_parameters()))]

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the Dice of all pixels, and precision and recall of objects at IoU 0.5, over made fields."""
        total, truth, found = Counts(), [], []
        for made in self.judged():
            foreground, core = answer(network, normalised(made.image))
            total += panoptic_counts(made.parasites, segment(foreground, core))
            truth.append(made.parasites.ravel() > 0)
            found.append(foreground.ravel() > 0.5)
        if not truth:
            return {}
        whole = dice(np.concatenate(truth), np.concatenate(found))
        return {"dice": whole, "f1": total.f1, "precision": total.precision, "recall": total.recall}

    def judged(self) -> list[Field]:
        """Return the fields that it is judged on."""
        side = self.config.crops.side
        seeds = [np.random.default_rng((self.seed, 2, k)) for k in range(self.config.held_out)]
        return [make_field((side, side), rng, self.config.crops.recipe) for rng in seeds]

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the weights in float16, as they ship."""
        half = {n: v.half() if v.is_floating_point() else v for n, v in network.state_dict().items()}
        write_tensors(folder / WEIGHTS, half, {"format": "pt"})

    def identity(self) -> Mapping[str, Any]:
        """Return settings and the names of photographs; their pixels are taken for what the names say."""
        return {"config": asdict(self.config), "photographs": [p.name for p in self.photographs]}


def loss_parts(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return one minus the soft Dice over the batch, the mean of both maps', and the cross-entropy of each.

    `logits` and `target` (N, 2, H, W), see `network.HEADS`. The entropy is what makes probabilities honest; Dice
    alone drives them to 0 and 1.
    """
    share = logits.sigmoid()
    both, sizes = (share * target).sum((0, 2, 3)), (share + target).sum((0, 2, 3))
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((0, 2, 3))
    return {
        "dice": 1 - ((2 * both + 1) / (sizes + 1)).mean(),
        "foreground_entropy": entropy[0],
        "core_entropy": entropy[1],
    }


def answer(network: nn.Module, image: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return foreground and core (H, W), 0 to 1, of a normalised field (C, H, W), seen at once."""
    height, width = image.shape[1:]
    padded = F.pad(torch.from_numpy(image)[None], (0, -width % 16, 0, -height % 16), mode="reflect")
    with torch.inference_mode():
        maps = network(padded)["logits"][0].float().sigmoid().numpy()
    return maps[0, :height, :width], maps[1, :height, :width]


def train(
    photographs: Path | None,
    out: Path,
    config: FieldsConfig | None = None,
    settings: FitConfig = FIT,
    *,
    on_event: Event = lambda kind, facts: None,
) -> Outcome:
    """Train on made fields, with real nuclei from the folder `photographs` but for every fifth; resumes in `out`.

    Raises UsageError WSI621 for a folder without such pictures, and what `fit` raises.
    """
    real = read_photographs(photographs) if photographs is not None else []
    learn = split([p.name for p in real], 5, 0)[0] if real else []
    task = LiverStageTask(config or FieldsConfig(), [real[i] for i in learn], settings.seed)
    return fit(task, settings, out, on_event=on_event)
