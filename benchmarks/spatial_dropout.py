"""Spatial dropout against dropout of elements, none, and an ensemble: what the abstract of 1912.00262 claims.

    WSITK_TEST_DATA=... python benchmarks/spatial_dropout.py FOLDER [--seeds 3] [--steps 200] [--data fields,nuclei]

Two kinds of data with truth: made liver-stage fields (two channels, parasites), and photographs of nuclei (one
channel; the fluorescence part of the Data Science Bowl 2018, every fifth picture by hash held out). Every network is
the same narrow U-Net, trained with the project's trainer on the same crops in the same order, for the same number of
steps, from weights that depend on the seed only; the ensemble is the networks without dropout of all seeds, and so
has had as many trainings. Networks lie in FOLDER and are trained once.

Probability is the mean over samples (10 for dropout, whose masks come from the engine); "one pass" is the network
trained with spatial dropout, asked once without. Figures are pooled over the test images and averaged over seeds;
intervals are 95 % of a bootstrap over images, the same draws for all. They say what other images would do, not what
other trainings would; the spread over seeds is printed beside them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.metrics.bootstrap import bootstrap, pooled_f1
from wsitk.metrics.calibration import calibration_error, equal_width_edges, reliability
from wsitk.metrics.panoptic import panoptic_counts
from wsitk.metrics.selective import aurc, counts_at, error_auroc, levels_of
from wsitk.models.liverstage.data import Crops, Sample, normalised, read_photographs, sample, targets
from wsitk.models.liverstage.fields import FieldRecipe, make_field
from wsitk.models.liverstage.model import LiverStageModel, spec_of
from wsitk.models.liverstage.network import LiverStageUNet, UNetConfig
from wsitk.models.liverstage.objects import CutSettings, segment
from wsitk.models.liverstage.training import loss_parts
from wsitk.training.fit import fit
from wsitk.training.folds import split
from wsitk.training.settings import FitConfig
from wsitk.training.state import write_tensors
from wsitk.training.task import Batch, Group, Task
from wsitk.uncertainty import MEASURES, Ensemble, MonteCarlo, Sampling

CROP, BATCH, SIDE, SAMPLES, RATE = 64, 8, 160, 10, 0.2
WIDTH = UNetConfig(base=8, dropout=(RATE,) * 4)
SETTINGS = FitConfig(
    precision="bfloat16", learning_rate=2e-3, weight_decay=1e-2, decay_vectors=False, warmup=0.02, clip=5.0,
    average=0.98, threads=1,
)  # fmt: skip
CLEAR = FieldRecipe(
    contrast=(6.0, 40.0), median=(8.0, 20.0), look_alikes=(0.0, 6.0), parasites=(4.0, 10.0), empty=0.05
)
"""Clearer fields than those that the shipped model learned from: these networks get few steps."""

LEVELS = 400
ARMS = ("spatial", "spatial, one pass", "element", "none", "ensemble of none")
FIGURES = (
    "Dice",
    "object F1",
    "ECE",
    "AURC, entropy",
    "AURC, mutual inf.",
    "errors found, entropy",
    "map correlation",
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class JudgedImage:
    """A whole image as the network reads it (C, H, W), and its objects (H, W)."""

    image: NDArray[np.float32]
    labels: NDArray[np.int32]


@final
class Fixed(Task):
    """Learns from crops that are made once; arms of a seed see the same ones, turned the same way."""

    def __init__(self, crops: Sequence[Sample], config: UNetConfig, name: str, seed: int) -> None:
        self.crops, self.name, self.seed = crops, name, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout layers have no weights: all arms start alike
            self.network = LiverStageUNet(config).to(memory_format=torch.channels_last)
            nn.init.constant_(self.network.head.bias, -1.5)

    @property
    def epoch_steps(self) -> int:
        return len(self.crops) // BATCH

    def batch(self, index: int, rank: int, world: int) -> Batch:
        images, targets = [], []
        for number in range(index * BATCH, (index + 1) * BATCH):
            lap, place = divmod(number, len(self.crops))
            order = np.random.default_rng((self.seed, 0, lap)).permutation(len(self.crops))
            turn = int(np.random.default_rng((self.seed, 1, number)).integers(8))
            chosen = self.crops[order[place]]
            for values, into in ((chosen.image, images), (chosen.target, targets)):
                turned = np.rot90(values, turn % 4, (1, 2))
                into.append(np.ascontiguousarray(turned[:, :, ::-1] if turn > 3 else turned))
        return {"image": torch.from_numpy(np.stack(images)), "target": torch.from_numpy(np.stack(targets))}

    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        parts = loss_parts(self.network(image)["logits"].float(), batch["target"])
        return torch.stack(list(parts.values())).sum(), parts

    def groups(self) -> Sequence[Group]:
        return [Group(tuple(name for name, _ in self.network.named_parameters()))]

    def validate(self, network: nn.Module) -> dict[str, float]:
        return {}

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        write_tensors(folder / "network.safetensors", network.state_dict(), {"format": "pt"})

    def identity(self) -> Mapping[str, Any]:
        return {"data": self.name, "crops": len(self.crops), "network": str(self.network.config)}


# --- data ----------------------------------------------------------------------------------------------


def made_fields() -> tuple[list[Sample], list[JudgedImage]]:
    """Return crops of 48 made fields, and 24 others to be tested on."""
    crops = Crops(side=224, crop=CROP, each=12, photographed=0, blind=0, recipe=CLEAR)
    learned = [s for k in range(48) for s in sample(np.random.default_rng((1, k)), crops)[1]]
    tests = []
    for k in range(24):
        made = make_field((SIDE, SIDE), np.random.default_rng((2, k)), CLEAR)
        tests.append(JudgedImage(normalised(made.image), made.parasites))
    return learned, tests


def nuclei() -> tuple[list[Sample], list[JudgedImage]]:
    """Return four crops of each photograph that is learned from, and the middles of the others."""
    photographs = read_photographs(
        Path(os.environ["WSITK_TEST_DATA"]) / "data" / "nuclei" / "dsb2018" / "fluo"
    )
    learn, judge = split([p.name for p in photographs], 5, 0)
    rng, crops = np.random.default_rng(3), []
    for number in learn:
        image, labels = normalised(photographs[number].image[None]), photographs[number].nuclei
        target = targets(labels)
        for _ in range(4):
            y, x = (int(rng.integers(0, n - CROP + 1)) for n in labels.shape)
            place = (slice(y, y + CROP), slice(x, x + CROP))
            crops.append(Sample(image[:, *place], target[:, *place], labels[place]))
    tests = []
    for number in judge:
        image, labels = normalised(photographs[number].image[None]), photographs[number].nuclei
        y, x = ((n - SIDE) // 2 for n in labels.shape)
        tests.append(JudgedImage(image[:, y : y + SIDE, x : x + SIDE], labels[y : y + SIDE, x : x + SIDE]))
    return crops, tests


# --- arms ----------------------------------------------------------------------------------------------


def trained(
    folder: Path, crops: Sequence[Sample], data: str, kind: str, seed: int, steps: int
) -> LiverStageModel:
    """Return a network of one kind, trained if it is not in `folder`."""
    channels = len(crops[0].image)
    task = Fixed(crops, replace(WIDTH, channels=channels, kind=kind), data, seed)
    where = folder / f"{data}-{kind}-{seed}-{steps}"
    done = fit(task, replace(SETTINGS, seed=seed, steps=steps, save_every=steps), where)
    print(f"{where.name}: {done.minutes:.1f} min", flush=True)
    from safetensors.torch import load_file

    task.network.load_state_dict(load_file(where / "network.safetensors"))
    names = tuple(map(str, range(channels)))
    spec = replace(spec_of(names), version=where.name)
    return LiverStageModel(task.network.eval(), spec, tuple(range(channels)), CutSettings())


def arms(
    models: Mapping[str, Sequence[LiverStageModel]],
) -> Iterator[tuple[str, list[Sampling | LiverStageModel]]]:
    """Yield each arm with what answers in it, one for each seed."""
    yield ARMS[0], [MonteCarlo(m, SAMPLES) for m in models["spatial"]]
    yield ARMS[1], list(models["spatial"])
    yield ARMS[2], [MonteCarlo(m, SAMPLES) for m in models["element"]]
    yield ARMS[3], list(models["none"])
    yield ARMS[4], [Ensemble(models["none"])]


# --- figures -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What was said of one image: probability, core and doubts (H, W); None where there is no such doubt."""

    foreground: NDArray[np.float32]
    core: NDArray[np.float32]
    entropy: NDArray[np.float32]
    mutual: NDArray[np.float32] | None
    correlation: float


def ask(model: Sampling | LiverStageModel, image: NDArray[np.float32]) -> Answer:
    """Return the answer to a whole image, whose sides are multiples of the network's stride."""
    network = (model.model if isinstance(model, Sampling) else model).network
    with torch.inference_mode():
        batch = torch.from_numpy(image)[None]
        outputs = {k: v[0].float().numpy() for k, v in model.predict(batch).items()}
        correlation = map_correlation(network, batch)
    p = outputs["foreground"][0]
    certain = np.clip(p.astype(np.float64), 1e-12, 1 - 1e-12)
    entropy = -(certain * np.log2(certain) + (1 - certain) * np.log2(1 - certain))
    measures = outputs.get("uncertainty")
    mutual = None if measures is None else measures[MEASURES.index("mutual_information")]
    return Answer(p, outputs["core"][0], entropy.astype(np.float32), mutual, correlation)


def map_correlation(network: nn.Module, batch: Tensor) -> float:
    """Return the mean absolute Pearson correlation between the maps of the last double convolution.

    The network is asked without chance. Maps that are constant over the image are left out.
    """
    caught: list[Tensor] = []
    layer = network.get_submodule("join.0")
    handle = layer.register_forward_hook(lambda module, given, output: caught.append(output))
    network(batch)
    handle.remove()
    maps = caught[0][0].flatten(1).double().numpy()
    alive = maps[maps.std(axis=1) > 1e-6]
    if len(alive) < 2:
        return float("nan")
    between = np.abs(np.corrcoef(alive))[np.triu_indices(len(alive), 1)]
    return float(between.mean())


def sums_of(
    answers: Sequence[Answer], tests: Sequence[JudgedImage], levels: Mapping[str, Floats]
) -> dict[str, Floats]:
    """Return for each figure the sums (images, columns) that it is made of."""
    rows: dict[str, list[Floats]] = {name: [] for name in FIGURES}
    edges = equal_width_edges(15)
    for answer, test in zip(answers, tests, strict=True):
        truth, found = test.labels > 0, answer.foreground > 0.5
        wrong = (truth != found).ravel()
        both = float((truth & found).sum())
        rows["Dice"].append(np.array([both, float(truth.sum() + found.sum())]))
        counts = panoptic_counts(test.labels, segment(answer.foreground, answer.core))
        rows["object F1"].append(np.array([counts.tp, counts.fp, counts.fn], np.float64))
        sure = np.maximum(answer.foreground, 1 - answer.foreground)
        rows["ECE"].append(reliability(sure.ravel(), ~wrong, edges).sums)
        doubts = {"entropy": answer.entropy, "mutual inf.": answer.mutual}
        for name, doubt in doubts.items():
            if doubt is None:
                continue
            place = np.minimum(np.searchsorted(levels[name], doubt.ravel()), len(levels[name]) - 1)
            graded = np.concatenate(counts_at(place, wrong, len(levels[name])))
            rows[f"AURC, {name}"].append(graded)
            if name == "entropy":
                rows["errors found, entropy"].append(graded)
        rows["map correlation"].append(
            np.array([np.nan_to_num(answer.correlation), float(not np.isnan(answer.correlation))])
        )
    return {name: np.stack(each) for name, each in rows.items() if each}


def halves(statistic: Any) -> Any:
    """Return a statistic of rows whose first half are right items and whose second half are wrong ones."""
    return lambda sums: statistic(*np.split(sums, 2, axis=1))


STATISTICS: dict[str, Any] = {
    "Dice": lambda sums: 2 * sums[:, 0] / sums[:, 1],
    "object F1": lambda sums: pooled_f1(sums),
    "ECE": calibration_error,
    "AURC, entropy": halves(aurc),
    "AURC, mutual inf.": halves(aurc),
    "errors found, entropy": halves(error_auroc),
    "map correlation": lambda sums: sums[:, 0] / sums[:, 1],
}


def averaged(statistic: Any, seeds: int) -> Any:
    """Return the mean over seeds of a statistic of sums that stand side by side."""
    return lambda sums: np.mean([statistic(part) for part in np.split(sums, seeds, axis=1)], axis=0)


def cells(models: Sequence[Sampling | LiverStageModel], tests: Sequence[JudgedImage]) -> dict[str, str]:
    """Return each figure as text: mean over seeds, interval over images, and each seed's own."""
    asked = [[ask(model, test.image) for test in tests] for model in models]
    pooled = {
        "entropy": np.concatenate([a.entropy.ravel() for each in asked for a in each]),
        "mutual inf.": np.concatenate(
            [a.mutual.ravel() for each in asked for a in each if a.mutual is not None] or [np.zeros(1)]
        ),
    }
    levels = {name: levels_of(values[::7], LEVELS) for name, values in pooled.items()}
    each = [sums_of(answers, tests, levels) for answers in asked]
    found = {}
    for name in FIGURES:
        if name not in each[0]:
            found[name] = "–"
            continue
        whole = np.concatenate([sums[name] for sums in each], axis=1)
        interval = bootstrap(whole, list(range(len(tests))), averaged(STATISTICS[name], len(each)))
        own = [float(STATISTICS[name](sums[name].sum(axis=0, keepdims=True))[0]) for sums in each]
        spread = f"; {min(own):.4g}–{max(own):.4g}" if len(own) > 1 else ""
        found[name] = f"{interval.value:.4f} ({interval.low:.4f}–{interval.high:.4f}{spread})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--data", default="fields,nuclei")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = {"fields": made_fields, "nuclei": nuclei}
    for data in options.data.split(","):
        crops, tests = sources[data]()
        models = {
            kind: [
                trained(options.folder, crops, data, kind, seed, options.steps)
                for seed in range(options.seeds)
            ]
            for kind in ("none", "spatial", "element")
        }
        print(
            f"\n{data}: {len(crops)} crops, {len(tests)} test images, {options.seeds} seeds, {options.steps} steps\n"
        )
        print("| | " + " | ".join(FIGURES) + " |\n|---|" + "---|" * len(FIGURES))
        for name, asked in arms(models):
            row = cells(asked, tests)
            print(f"| {name} | " + " | ".join(row[figure] for figure in FIGURES) + " |", flush=True)


if __name__ == "__main__":
    main()
