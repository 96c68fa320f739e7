"""The training loop: a task and its settings in, weights and a log out, restartable after a kill at any step.

Everything that a step does is a function of the weights and of (seed, step, rank): its batch, its dropout, its
learning rate. On one kind of CPU, with the same number of threads, a resumed run therefore ends with the same
bits as an unbroken one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from wsitk.errors import WorkError
from wsitk.training import processes, state
from wsitk.training.guards import alone, caught_signals, fixed_arithmetic
from wsitk.training.log import Log
from wsitk.training.optimizer import make_optimizer, random_state
from wsitk.training.schedule import factor
from wsitk.training.settings import FitConfig
from wsitk.training.task import Batch, Task

__all__ = ["CHECKPOINT", "FitConfig", "Outcome", "Trainer", "fit"]

CHECKPOINT = "checkpoint.safetensors"

Event = Callable[[str, Mapping[str, Any]], None]

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``done``, ``deadline`` or ``interrupted`` (by `signal`); its last scores."""

    status: Literal["done", "deadline", "interrupted"]
    step: int
    minutes: float
    scores: Mapping[str, float]
    signal: int | None = None


def fit(
    task: Task,
    config: FitConfig,
    folder: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: Event = lambda kind, facts: None,
) -> Outcome:
    """Train `task` in `folder`, from its checkpoint if there is one.

    Writes ``log.csv``, ``checkpoint.safetensors`` and, with every checkpoint, what the task exports. SIGTERM
    and SIGINT end the run at the next step, after a checkpoint.

    Raises OutputError WSI864 (the folder is another run's), WSI865 (its checkpoint is damaged); WorkError
    WSI866 (a loss is not finite).
    """
    own = processes.join(torch.device(device))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder), fixed_arithmetic(config.threads, own):
            return Trainer(task, config, folder, own, overwrite=overwrite, on_event=on_event).run()
    finally:
        processes.leave()


@final
class Trainer:
    """One run; see `fit`."""

    def __init__(
        self,
        task: Task,
        config: FitConfig,
        folder: Path,
        device: torch.device,
        *,
        overwrite: bool,
        on_event: Event,
    ) -> None:
        self.task, self.config, self.device, self.folder = task, config, device, folder
        self.network = task.network.to(device)
        processes.same_start(self.network)
        self.steps = config.steps or config.epochs * task.epoch_steps
        self.groups = list(task.groups())
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.network.named_parameters()
        }
        self.optimizer = make_optimizer(self.network, self.groups, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.average: nn.Module | None = None
        if config.average is not None:
            self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.step, self.spent = 0, 0.0
        self.sums: dict[str, Tensor] = {}
        self.counted = 0
        self.scores: dict[str, float] = {}
        self._validated = -1
        self._say = on_event if processes.rank() == 0 else lambda kind, facts: None
        self._epoch: int | None = None
        if overwrite and processes.rank() == 0:
            for name in (CHECKPOINT, "log.csv"):
                (folder / name).unlink(missing_ok=True)
        processes.agreed([0.0], device)  # nobody looks before the first process has tidied up
        self._resume()

    def run(self) -> Outcome:
        """Take the steps that are left."""
        self._say("started", {"step": self.step, "steps": self.steps, "epoch_steps": self.task.epoch_steps})
        started, spent = time.monotonic(), self.spent
        log = Log(self.folder, self.step) if processes.rank() == 0 else None
        status: Literal["done", "deadline", "interrupted"] = "done"
        caught = 0
        with caught_signals() as signals:
            batches = self._batches()
            while self.step < self.steps:
                self._take_step(batches)
                self.spent = spent + time.monotonic() - started
                over = (
                    self.config.minutes is not None and time.monotonic() - started > 60 * self.config.minutes
                )
                caught, late = map(int, processes.agreed([signals[0] if signals else 0, over], self.device))
                last = self.step == self.steps
                if last or self._due(self.config.validate_every):
                    self._validate()
                if log is not None and (last or self._due(self.config.log_every)):
                    self._write_row(log)
                self._say("step", {"step": self.step, "steps": self.steps, "minutes": self.spent / 60})
                if last or caught or self._due(self.config.save_every):
                    self._save()
                    status = "done" if last else "interrupted" if caught else "deadline" if late else "done"
                    if status != "done":
                        break
        if log is not None:
            log.close()
        return Outcome(status, self.step, self.spent / 60, self.scores, caught or None)

    def _due(self, every: int) -> bool:
        return self.step % (every or self.task.epoch_steps) == 0

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches from the current step on."""
        many = self.config.accumulate
        loader: torch.utils.data.DataLoader[Batch] = torch.utils.data.DataLoader(
            _Numbered(self.task, processes.rank(), processes.world()),
            batch_size=None,
            sampler=range(self.step * many, self.steps * many),
            num_workers=self.config.workers,
            # a copy of this process: what it holds need not be pickled
            multiprocessing_context="fork" if self.config.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _take_step(self, batches: Iterator[Batch]) -> None:
        config = self.config
        self._enter_epoch(self.step // self.task.epoch_steps)
        self._set_rates()
        dtype = PRECISIONS.get(config.precision, torch.float32)
        for micro in range(config.accumulate):
            batch = next(batches)
            random_state(config.seed, self.step, processes.rank(), micro)
            with torch.autocast(self.device.type, dtype, enabled=config.precision != "float32"):
                loss, parts = self.task.losses(batch)
            self.scaler.scale(loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
            self._count({"loss": loss, **parts})
        learning = [p for p in self.names if p.requires_grad]
        processes.average_gradients(learning)  # before they are unscaled: all must find the same overflow
        if config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for p in learning if p.grad is not None], config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()

    def _enter_epoch(self, epoch: int) -> None:
        """Freeze what does not learn yet: no gradient, no dropout, no new statistics."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self.network.requires_grad_(False)
        parameters = dict(self.network.named_parameters())
        for group in self.groups:
            if group.thaw is not None and epoch >= group.thaw:
                for name in group.names:
                    parameters[name].requires_grad_(True)
        self._train_mode()

    def _train_mode(self) -> None:
        self.network.train()
        for module in self.network.modules():
            inside = list(module.parameters())
            if inside and not any(p.requires_grad for p in inside):
                module.eval()

    def _set_rates(self) -> None:
        c = self.config
        now = c.learning_rate * factor(
            c.schedule, self.step, steps=self.steps, epoch_steps=self.task.epoch_steps,
            warmup=c.warmup, gamma=c.gamma, floor=c.floor,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = now * group["rate"]

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the weights; early on faster, so that it forgets the start."""
        if self.average is None or self.config.average is None:
            return
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        own = self.average.state_dict()
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                own[name].lerp_(value, 1 - decay)
            else:
                own[name].copy_(value)

    def _count(self, parts: Mapping[str, Tensor]) -> None:
        """Add to the sums of the log; they stay on the device until a row is due."""
        for name, value in parts.items():
            term = value.detach().double() if self.device.type != "mps" else value.detach().float()
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.counted += 1

    def _means(self) -> dict[str, float]:
        means = {name: float(total) / self.counted for name, total in self.sums.items()}
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise WorkError(
                "WSI866",
                f"{', '.join(bad)} is not finite before step {self.step}; lower fit.learning_rate or set "
                "fit.clip; the last checkpoint is sound",
            )
        return means

    def _write_row(self, log: Log) -> None:
        means = self._means()
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["rate"]
        row = {"epoch": self.step / self.task.epoch_steps, "learning_rate": rate, **means}
        scored = {f"held_out_{k}": v for k, v in self.scores.items()} if self._validated == self.step else {}
        log.write(self.step, {**row, **scored, "minutes": self.spent / 60})
        self._say("log", {"step": self.step, **row, **scored})
        self.sums, self.counted = {}, 0

    def _validate(self) -> None:
        """Score on the first process; the others wait at their next message."""
        if processes.rank() == 0:
            self._say("validating", {"step": self.step})
            with torch.inference_mode():
                self.scores = self.task.validate(self._delivered())
            self._validated = self.step
            self._train_mode()

    def _delivered(self) -> nn.Module:
        """Return the network to be judged and exported, in evaluation mode."""
        return (self.average or self.network).eval()

    def _key(self) -> dict[str, Any]:
        return {
            "fit": self.config.key() | {"threads": torch.get_num_threads()},
            "task": dict(self.task.identity()),
            "processes": processes.world(),
            "device": self.device.type,
        }

    def _save(self) -> None:
        if self.counted:
            self._means()  # a checkpoint with a poisoned weight would be worse than none
        if processes.rank() != 0:
            return
        tensors = {f"network|{k}": v for k, v in self.network.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average|{k}": v for k, v in self.average.state_dict().items()}
        memory = state.optimizer_tensors(self.optimizer, self.names)
        tensors |= {f"optimizer|{k}": v for k, v in memory.items()}
        record = {
            "step": self.step,
            "seconds": self.spent,
            "sums": {k: float(v) for k, v in self.sums.items()},
            "counted": self.counted,
            "scores": self.scores,
            "scaler": self.scaler.state_dict(),
            "task": self.task.state(),
        }
        state.save(self.folder / CHECKPOINT, tensors, self._key(), record)
        facts = {
            "steps": self.step,
            "of": self.steps,
            "minutes": round(self.spent / 60, 1),
            "held_out": self.scores,
        }
        self.task.export(self._delivered(), self.folder, facts)
        self._train_mode()
        self._say("saved", {"step": self.step})

    def _resume(self) -> None:
        found = state.load(self.folder / CHECKPOINT, self._key())
        if found is None:
            return
        tensors, record = found
        state.load_into(self.network, tensors, "network|")
        if self.average is not None:
            state.load_into(self.average, tensors, "average|")
        state.restore_optimizer(self.optimizer, self.names, tensors, "optimizer|")
        self.scaler.load_state_dict(record["scaler"])
        self.task.load_state(record["task"])
        self.step, self.spent = int(record["step"]), float(record["seconds"])
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = {k: torch.tensor(v, dtype=kind, device=self.device) for k, v in record["sums"].items()}
        self.counted, self.scores = int(record["counted"]), dict(record["scores"])


@final
class _Numbered(torch.utils.data.Dataset[Batch]):
    """A task's batches by number."""

    def __init__(self, task: Task, rank: int, world: int) -> None:
        self._task, self._rank, self._world = task, rank, world

    def __getitem__(self, index: int) -> Batch:
        return self._task.batch(index, self._rank, self._world)
