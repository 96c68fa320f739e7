"""CellViT as a task for the trainer: crops in, losses of the maps, a folder that `wsitk run` takes out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.models.cellvit.compact import FOLD
from wsitk.models.cellvit.postprocess import HoverSettings
from wsitk.models.cellvit.training import build
from wsitk.models.cellvit.training.augment import RECIPES, Recipe, make_crop
from wsitk.models.cellvit.training.config import TrainConfig
from wsitk.models.cellvit.training.data import IGNORE, Dataset, Example
from wsitk.models.cellvit.training.export import write_folder
from wsitk.models.cellvit.training.lora import merge_lora
from wsitk.models.cellvit.training.losses import LossWeights, branch_losses
from wsitk.models.cellvit.training.pannuke import PANNUKE_CLASSES
from wsitk.models.cellvit.training.sampling import (
    PANNUKE_IMAGES_WITH,
    Sampler,
    cell_weights,
    tissue_weights,
)
from wsitk.models.cellvit.training.targets import make_targets
from wsitk.models.cellvit.training.validate import Validation, normalised
from wsitk.models.cellvit.training.warp import mosaic
from wsitk.training import processes
from wsitk.training.config import from_table
from wsitk.training.fit import PRECISIONS
from wsitk.training.flatness import FlatnessPenalty, RelativeFlatness
from wsitk.training.task import Batch, Group, Task

__all__ = ["CellViTTask", "Memory"]

MEMORY = 2 << 30
"""Bytes of images that are kept, over all workers."""


@final
class CellViTTask(Task):
    """Trains a CellViT network on labelled images; `held_out` is what it is judged on.

    `cells` (images, classes) are the nuclei in each training image; only sampling by cells needs them.
    """

    def __init__(
        self, config: TrainConfig, training: Dataset, held_out: Dataset, cells: np.typing.NDArray[np.int64]
    ) -> None:
        self.config, self.training, self.held_out = config, Memory(training, _budget(config)), held_out
        self.types = build.types_of(config.network, training.classes)
        self.tissues = tuple(sorted({name for name in training.tissues if name}))
        self.network = build.build(config.network, self.types, len(self.tissues), config.fit.seed)
        align = build.align_of(self.network)
        if config.data.crop % align:
            raise UsageError("WSI877", f"data.crop is {config.data.crop}, wanted a multiple of {align}")
        self.mean, self.std = build.normalisation(config.network)
        self.weights, self.recipe = self._loss_weights(), _recipe(config)
        self.sampler = Sampler(_draw_weights(config, training, cells), config.data.batch, config.fit.seed)
        self.validation = Validation(
            types=self.types if training.classes else (),
            spacing_um=config.data.spacing_um,
            mean=self.mean,
            std=self.std,
            align=align,
            settings=HoverSettings(**config.postprocessing),  # type: ignore[arg-type]  # judged by the class
            dtype=PRECISIONS.get(config.fit.precision, torch.float32),
            images=config.data.held_out_images,
        )
        self._flatness, self._shared = _flatness(config, self.network), False

    def _loss_weights(self) -> LossWeights:
        """Return the recipe without the branches that the network or the data lack."""
        outputs = ["nuclei_binary_map", "hv_map"]
        outputs += ["nuclei_type_map"] if self.types else []
        outputs += (
            ["tissue_types"] if len(self.tissues) > 1 and self.config.network.arch != build.COMPACT else []
        )
        return LossWeights.from_mapping(self.config.loss).only(outputs)

    @property
    def epoch_steps(self) -> int:
        crops = self.config.data.epoch_crops or len(self.training)
        return max(1, crops // (self.config.data.batch * self.config.fit.accumulate))

    def batch(self, index: int, rank: int, world: int) -> Batch:
        """Return ``image`` uint8 (N, 3, H, W), and the targets: ``nuclei``, ``hv``, ``types``, ``tissue``."""
        chosen = self.sampler.draw(index, rank, world)
        made = [
            self._crop(int(image), self._chance(index, rank + k * world)) for k, image in enumerate(chosen)
        ]
        targets = [make_targets(example, self.config.data.convention) for example in made]
        types = [t.types if self.training.classes else t.nuclei for t in targets]
        names = {name: number for number, name in enumerate(self.tissues)}
        return {
            "image": torch.from_numpy(np.stack([e.image for e in made])).permute(0, 3, 1, 2),
            "nuclei": torch.from_numpy(np.stack([t.nuclei for t in targets])),
            "hv": torch.from_numpy(np.stack([t.hv for t in targets])),
            "types": torch.from_numpy(np.stack(types)),
            "tissue": torch.tensor([names.get(e.tissue, -1) for e in made]),
        }

    def _chance(self, index: int, slot: int) -> np.random.Generator:
        """Return the source of chance of one crop; unlike the sampler's own, it can be divided."""
        return np.random.default_rng(self.sampler.generator(index, slot).integers(0, 2**32, 4))

    def _crop(self, index: int, rng: np.random.Generator) -> Example:
        """Return an augmented crop of an image: of it alone, or beside three others if mosaics are wanted."""
        data = self.config.data
        if rng.random() >= data.mosaic:
            return make_crop(self.training.read(index), data.crop, data.spacing_um, rng, self.recipe)
        chosen = (index, *self.sampler.pick(rng.random(3)))
        read, half = self.training.read, data.crop // 2
        return mosaic([make_crop(read(int(i)), half, data.spacing_um, rng, self.recipe) for i in chosen])

    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        maps = dict(self.network(normalised(batch["image"], self.mean, self.std)))
        known = batch["nuclei"] != IGNORE
        nuclei = torch.where(known, batch["nuclei"].long(), -1)
        # where nobody looked, the distances are what they are said to be: nothing is learned from them
        maps["hv_map"] = torch.where(known[:, None], maps["hv_map"].float(), batch["hv"])
        targets = {
            "nuclei_binary_map": nuclei,
            "hv_map": batch["hv"],
            "nuclei_type_map": torch.where(batch["types"] != IGNORE, batch["types"].long(), -1),
            "tissue_types": batch["tissue"],
        }
        loss, parts = branch_losses(maps, targets, self.weights)
        if self._flatness is None:
            return loss, parts
        term, kappa = self._flatness(loss)
        self._share_strength(loss.device)
        return loss + term, {**parts, "flatness": kappa}

    def _share_strength(self, device: torch.device) -> None:
        """Take the largest strength of all processes, once each has set its own from its first batch."""
        if self._flatness is not None and not self._shared and self._flatness.strength is not None:
            self._flatness.strength = processes.agreed([self._flatness.strength], device)[0]
            self._shared = True

    def state(self) -> dict[str, Any]:
        return {} if self._flatness is None else dict(self._flatness.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._flatness is not None:
            self._flatness.load_state_dict(state)
            self._shared = True

    def groups(self) -> Sequence[Group]:
        return build.parameter_groups(self.network, self.config.network)

    def validate(self, network: nn.Module) -> dict[str, float]:
        scores = self.validation.scores(network, self.held_out)
        return {name: value for name, value in scores.items() if math.isfinite(value)}

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write ``model.safetensors`` and ``card.toml``: adapters are merged, so the folder runs as any other."""
        if self.config.network.learn == "lora":
            network = copy.deepcopy(network)
            merge_lora(network)
        description = build.description(self.config.network, self.types, len(self.tissues))
        data = (self.training.whole.name, len(self.training))
        write_folder(folder, network, description, self.types, self.config, facts, data)

    def identity(self) -> Mapping[str, Any]:
        data = asdict(self.config.data)
        for free in ("held_out_images", "cache"):
            del data[free]
        return {
            "network": asdict(self.config.network),
            "images": self.training.whole.identity(),
            "classes": list(self.training.classes),
            "held_out": self.held_out.identity(),
            "data": data,
            "augment": asdict(self.recipe),
            "loss": asdict(self.weights),
            "fam": self.config.fam,
        }


@final
class Memory:
    """A set whose images stay in memory once they were read, up to `budget` bytes."""

    def __init__(self, whole: Dataset, budget: int) -> None:
        self.whole, self.classes, self._left = whole, whole.classes, budget
        self._kept: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, index: int) -> Example:
        """Return image `index`."""
        if index in self._kept:
            return self._kept[index]
        example = self.whole.read(index)
        types = 0 if example.types is None else example.types.nbytes
        self._left -= example.image.nbytes + example.inst.nbytes + types
        if self._left > 0:
            self._kept[index] = example
        return example


def _budget(config: TrainConfig) -> int:
    """Return the bytes of images that a process may keep; each worker has its own."""
    return MEMORY // max(1, config.fit.workers) if config.data.cache else 0


def _recipe(config: TrainConfig) -> Recipe:
    """Return the augmentation: a named recipe with changes on top. Raises UsageError WSI861, WSI862."""
    wish = config.data.augment
    changes: dict[str, object] = {"recipe": wish} if isinstance(wish, str) else dict(wish)
    name = changes.pop("recipe", "stain")
    if name not in RECIPES:
        raise UsageError("WSI862", f"data.augment.recipe is {name!r}, wanted one of {', '.join(RECIPES)}")
    return from_table(Recipe, {**asdict(RECIPES[str(name)]), **changes}, "data.augment")


def _draw_weights(
    config: TrainConfig, data: Dataset, cells: np.typing.NDArray[np.int64]
) -> np.typing.NDArray[np.float64]:
    """Return how often each image is drawn: its own weight times its rarity, as the paper adds them up."""
    gamma, by = config.data.gamma, config.data.sampling
    rarity = np.zeros(len(data)) if by != "plain" else np.ones(len(data))
    if "tissue" in by:
        each = tissue_weights(data.tissues, gamma)
        rarity = rarity + each / each.max()
    if "cell" in by:
        each = cell_weights(cells, gamma, _fixed(config, data.classes))
        rarity = rarity + each / each.max()
    return np.asarray(data.weights * rarity, np.float64)


def _fixed(config: TrainConfig, classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the paper's counts of images with each class, if they are wanted and the classes are PanNuke's."""
    return PANNUKE_IMAGES_WITH if config.data.fixed_counts and classes == PANNUKE_CLASSES else None


def _flatness(config: TrainConfig, network: nn.Module) -> FlatnessPenalty | None:
    """Return the penalty on the binary branch's last layer, if one is wanted."""
    if config.fam is None:
        return None
    branch = network.get_submodule("nuclei_binary_map_decoder")
    layers = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    shuffle = FOLD if config.network.arch == build.COMPACT else 1
    return FlatnessPenalty(RelativeFlatness(layers[-1], shuffle=shuffle), config.fam)
