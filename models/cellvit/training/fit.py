"""The training loop: one configuration, a log, and a checkpoint that it resumes from."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from wsitk.models.cellvit.compact import LATTICE, MEAN, STD, CompactCellViT, compact_cellvit, encoder_state
from wsitk.models.cellvit.training import losses
from wsitk.models.cellvit.training.augment import Image, Labels
from wsitk.models.cellvit.training.data import (
    SPACING,
    CropSampler,
    Item,
    load,
    resample,
    split,
)
from wsitk.models.cellvit.training.state import Average, Log, checkpoint, export, resume
from wsitk.models.cellvit.training.targets import hv_target


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on, besides its data."""

    steps: int = 4000
    minutes: float = 70.0
    batch: int = 4
    crop: int = 256
    learning_rate: float = 1.5e-3
    encoder_learning_rate: float = 3e-4
    weight_decay: float = 0.02
    warmup: float = 0.03
    average: float = 0.998
    seed: int = 19
    threads: int = 1
    save_every: int = 100


def fit(data: Path, out: Path, encoder: Path | None, config: Config) -> None:
    """Train on the prepared folder `data`; write `out` (safetensors) and, beside it, `.csv` and `.resume`.

    Under `torchrun`, each process computes the gradient of its own crops, and the first one writes.
    """
    rank = join_processes()
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    training, held_out = split(load(data))
    network = compact_cellvit().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if encoder is not None:
        saved = torch.load(encoder, map_location="cpu", weights_only=True)
        network.encoder.load_state_dict(encoder_state(saved))
    optimiser = make_optimiser(network, config)
    average = Average(network, config.average)
    step, spent = resume(out.with_suffix(".resume"), network, optimiser, average)
    # A resumed run must not draw the same crops again.
    crops = CropSampler(training, config.crop, config.seed + 2 * step + rank)
    log = Log(out.with_suffix(".csv"))
    started = time.monotonic() - spent
    progress = 0.0
    while progress < 1:
        minutes = (time.monotonic() - started) / 60
        progress = agree(max(step / config.steps, minutes / config.minutes))
        schedule(optimiser, config, progress)
        parts = train_step(network, optimiser, *batch(crops, config.batch))
        step += 1
        average.update(network, step)
        log.add(parts)
        if rank == 0 and (step % config.save_every == 0 or progress >= 1):
            score = validate(average.state, held_out)
            log.write(step, minutes, score)
            export(average.state, out)
            checkpoint(
                out.with_suffix(".resume"), network, optimiser, average, step, time.monotonic() - started
            )


def join_processes() -> int:
    """Join the group that `torchrun` describes, if any; the rank of this process."""
    if "RANK" not in os.environ:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def agree(progress: float) -> float:
    """The first process's progress: clocks differ, and all must stop at the same step."""
    if not dist.is_initialized():
        return progress
    shared = torch.tensor([progress], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def average_gradients(network: nn.Module) -> None:
    """Mean over processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [g.numel() for g in gradients]
    for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(part.view(gradient.shape))


def make_optimiser(network: CompactCellViT, config: Config) -> torch.optim.AdamW:
    """Four groups: encoder or not, and weights that decay (matrices) or not (gains, biases)."""
    groups = []
    for inside, rate in ((True, config.encoder_learning_rate), (False, config.learning_rate)):
        named = [p for n, p in network.named_parameters() if n.startswith("encoder.") == inside]
        for decays, decay in ((True, config.weight_decay), (False, 0.0)):
            chosen = [p for p in named if (p.ndim > 1) == decays]
            groups.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def schedule(optimiser: torch.optim.Optimizer, config: Config, progress: float) -> None:
    """Linear warm-up, then half a cosine to 1 % of the peak.

    `progress` runs from 0 to 1, in steps or, if they take too long, in time.
    """
    if progress < config.warmup:
        factor = 0.02 + 0.98 * progress / config.warmup
    else:
        done = min(1.0, (progress - config.warmup) / (1 - config.warmup))
        factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def batch(crops: CropSampler, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3, H, W) normalised images, (N, H, W) nuclei, (N, 2, H, W) distances."""
    drawn = [crops.draw() for _ in range(size)]
    images = torch.cat([to_input(image) for image, _ in drawn])
    nuclei = torch.stack([torch.from_numpy(inst > 0) for _, inst in drawn])
    distances = torch.stack([torch.from_numpy(hv_target(inst)) for _, inst in drawn])
    return images, nuclei, distances


def to_input(image: Image) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) normalised, channels last in memory."""
    scaled = (image.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(scaled).permute(2, 0, 1)[None]


def train_step(
    network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, nuclei: Tensor, distances: Tensor
) -> dict[str, float]:
    """One step; bfloat16 where the processor gains from it, losses in float32."""
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = network(images.contiguous(memory_format=torch.channels_last))
    loss, parts = losses.total(maps, nuclei, distances)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    average_gradients(network)
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimiser.step()
    return parts


@torch.inference_mode()
def validate(state: dict[str, Tensor], held_out: list[Item]) -> dict[str, float]:
    """Mean losses of the averaged weights over whole held-out images, shrunk to the network's spacing."""
    network = compact_cellvit().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    network.load_state_dict(state)
    scores: list[dict[str, float]] = []
    for item in held_out:
        image, inst = at_spacing(item)
        with torch.autocast("cpu", torch.bfloat16):
            maps = network(to_input(image).contiguous(memory_format=torch.channels_last))
        targets = torch.from_numpy(inst > 0)[None], torch.from_numpy(hv_target(inst))[None]
        scores.append(losses.total(maps, *targets)[1])
    keys = scores[0] if scores else ()
    return {f"held_out_{key}": float(np.mean([s[key] for s in scores])) for key in keys}


def at_spacing(item: Item) -> tuple[Image, Labels]:
    """A whole image at SPACING, cut to the largest size that the network takes."""
    size = [round(n * item.spacing / SPACING) for n in item.inst.shape]
    image, inst = resample(item.image, item.inst, (size[0], size[1]))
    height, width = (n // LATTICE * LATTICE for n in size)
    return image[:height, :width], inst[:height, :width]
