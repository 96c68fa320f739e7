"""The training loop, with a task so small that its runs take a second."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from wsitk.errors import OutputError, UsageError, WorkError
from wsitk.training.fit import CHECKPOINT, Outcome, fit
from wsitk.training.schedule import factor
from wsitk.training.settings import FitConfig
from wsitk.training.task import Batch, Group, Task


class Tiny(Task):
    """Learns the sign of a sum, with everything that has a state: batch norm, dropout, a frozen start."""

    def __init__(self, *, seed: int = 3, thaw: int | None = 0, poison: int = -1) -> None:
        torch.manual_seed(seed)
        self.seed, self.thaw, self.poison = seed, thaw, poison
        first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.network = nn.Sequential(first, nn.Dropout2d(0.2), nn.Conv2d(8, 1, 3, padding=1))
        self.asked: list[tuple[int, int, int]] = []

    @property
    def epoch_steps(self) -> int:
        return 4

    def batch(self, index: int, rank: int, world: int) -> Batch:
        self.asked.append((index, rank, world))
        rng = np.random.default_rng([self.seed, index, rank])
        x = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
        if index == self.poison:
            x[0, 0, 0, 0] = np.nan
        return {
            "x": torch.from_numpy(x),
            "y": torch.from_numpy((x.sum(1, keepdims=True) > 0).astype(np.float32)),
        }

    def losses(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = self.network(batch["x"]).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["y"])
        return loss, {"entropy": loss.detach()}

    def groups(self) -> Sequence[Group]:
        names = [n for n, _ in self.network.named_parameters()]
        first = tuple(n for n in names if n.startswith("0."))
        return Group(first, rate=0.5, thaw=self.thaw), Group(tuple(n for n in names if n not in first))

    def validate(self, network: nn.Module) -> dict[str, float]:
        assert not network.training
        torch.rand(3)  # a validation that draws must not disturb the run
        return {"norm": float(sum(p.square().sum() for p in network.parameters()))}

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
        torch.save(network.state_dict(), folder / "model.pt")
        (folder / "facts.json").write_text(json.dumps(dict(facts)))

    def identity(self) -> Mapping[str, Any]:
        return {"task": "tiny", "seed": self.seed}


BASE = FitConfig(
    seed=5, steps=13, accumulate=2, clip=1.0, average=0.9, learning_rate=1e-2, threads=1,
    warmup=0.2, decay_vectors=False, save_every=3, log_every=2, validate_every=4,
)  # fmt: skip


class KilledError(Exception):
    """Stands for the death of the process, at any place of the loop."""


def train(folder: Path, config: FitConfig = BASE, die_at: int | None = None, **options: Any) -> Outcome:
    overwrite = options.pop("overwrite", False)

    def watch(kind: str, facts: Mapping[str, Any]) -> None:
        if kind == "step" and facts["step"] == die_at:
            raise KilledError

    return fit(Tiny(**options), config, folder, on_event=watch, overwrite=overwrite)


def bits(folder: Path) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in load_file(folder / CHECKPOINT).items()}


def record(folder: Path) -> dict[str, Any]:
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return dict(json.loads(file.metadata()["wsitk"]))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_killed_and_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path: Path, precision: Any) -> None:
    config = replace(BASE, precision=precision)
    train(tmp_path / "whole", config)
    for step in (2, 3, 8, 11):  # before the first checkpoint, on one, and between two
        with pytest.raises(KilledError):
            train(tmp_path / "broken", config, die_at=step)
    assert train(tmp_path / "broken", config).status == "done"
    assert bits(tmp_path / "broken") == bits(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


SCRIPT = """
import sys, time
from pathlib import Path
from test_training import BASE, Tiny
from wsitk.training.fit import fit
def say(kind, facts):
    print(kind, facts.get("step"), flush=True)
    if kind == "saved" and facts["step"] == 6:
        sys.stdin.readline()
outcome = fit(Tiny(), BASE, Path(sys.argv[1]), on_event=say)
sys.exit(128 + outcome.signal if outcome.signal else 0)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdin=pipe, stdout=pipe, text=True, env=env
    )


@pytest.mark.parametrize(("number", "code", "kept"), [(signal.SIGKILL, -9, 6), (signal.SIGTERM, 143, 7)])
def test_a_signal_at_step_6_and_resuming_changes_nothing(
    tmp_path: Path, number: signal.Signals, code: int, kept: int
) -> None:
    with start(tmp_path / "broken") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            if line == "saved 6\n":
                break
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.stdin.write("go on\n")
            process.stdin.flush()
        process.stdout.read()
        assert process.wait() == code
    assert record(tmp_path / "broken")["step"] == kept
    train(tmp_path / "broken")
    train(tmp_path / "whole")
    assert bits(tmp_path / "broken") == bits(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_batches_are_asked_for_by_number_and_seeded_apart_from_the_task(tmp_path: Path) -> None:
    task = Tiny()
    fit(task, replace(BASE, steps=3), tmp_path)
    assert task.asked == [(n, 0, 1) for n in range(6)]


def test_workers_change_nothing(tmp_path: Path) -> None:
    train(tmp_path / "none")
    train(tmp_path / "two", replace(BASE, workers=2))
    assert bits(tmp_path / "none") == bits(tmp_path / "two")


def test_a_folder_of_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(OutputError, match=r"WSI864 .*fit\.learning_rate is 0\.01 there, 0\.02 now"):
        train(tmp_path, replace(BASE, learning_rate=0.02))
    with pytest.raises(OutputError, match=r"WSI864 .*task\.seed is 3 there, 4 now"):
        train(tmp_path, seed=4)
    train(tmp_path, replace(BASE, save_every=5, minutes=30.0))  # changes no weight
    assert train(tmp_path, replace(BASE, learning_rate=0.02), overwrite=True).step == 13
    assert len(rows(tmp_path)) == 7


def test_a_finished_run_may_be_made_longer_where_its_path_does_not_depend_on_its_length(
    tmp_path: Path,
) -> None:
    config = replace(BASE, schedule="exponential", warmup=0.0)
    train(tmp_path / "longer", replace(config, steps=5))
    train(tmp_path / "longer", config)
    train(tmp_path / "whole", config)
    assert bits(tmp_path / "longer") == bits(tmp_path / "whole")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    data = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(OutputError, match="WSI865"):
        train(tmp_path)


def test_a_deadline_ends_the_run_at_a_checkpoint_only(tmp_path: Path) -> None:
    late = train(tmp_path, replace(BASE, minutes=1e-9))
    assert (late.status, late.step) == ("deadline", 3)
    assert (tmp_path / "model.pt").is_file()
    assert json.loads((tmp_path / "facts.json").read_text())["steps"] == 3


def test_what_is_frozen_keeps_weights_and_statistics_until_it_thaws(tmp_path: Path) -> None:
    config = replace(BASE, average=None, weight_decay=0.1)
    start = Tiny().network.state_dict()
    train(tmp_path / "frozen", replace(config, steps=4), thaw=1)
    train(tmp_path / "thawed", replace(config, steps=5), thaw=1)
    train(tmp_path / "never", config, thaw=None)
    for folder, still in (("frozen", True), ("thawed", False), ("never", True)):
        after = torch.load(tmp_path / folder / "model.pt", weights_only=True)
        same = [torch.equal(start[n], after[n]) for n in start if n.startswith("0.")]
        assert all(same) == still, folder
        assert not torch.equal(start["2.weight"], after["2.weight"])


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"WSI866 loss, entropy is not finite"):
        train(tmp_path, poison=9)  # in step 4
    assert record(tmp_path)["step"] == 3
    assert all(v.isfinite().all() for v in load_file(tmp_path / CHECKPOINT).values())


def test_nothing_to_learn_is_a_mistake(tmp_path: Path) -> None:
    class Still(Tiny):
        def groups(self) -> Sequence[Group]:
            return ()

    with pytest.raises(UsageError, match="WSI868"):
        fit(Still(), BASE, tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    def watch(kind: str, facts: Mapping[str, Any]) -> None:
        with pytest.raises(OutputError, match="WSI503"):
            train(tmp_path)
        raise KilledError

    with pytest.raises(KilledError):
        fit(Tiny(), BASE, tmp_path, on_event=watch)


def test_accumulated_batches_have_the_gradient_of_one_large_one(tmp_path: Path) -> None:
    """Without batch norm and dropout, two batches of 2 make the same step as one batch of 4."""

    class Plain(Tiny):
        def __init__(self, joined: bool) -> None:
            super().__init__()
            self.joined = joined
            torch.manual_seed(0)
            self.network = nn.Conv2d(3, 1, 3, padding=1)

        def batch(self, index: int, rank: int, world: int) -> Batch:
            if not self.joined:
                return super().batch(index, rank, world)
            parts = [super(Plain, self).batch(2 * index + k, rank, world) for k in range(2)]
            return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

        def groups(self) -> Sequence[Group]:
            return (Group(("weight", "bias")),)

    config = replace(BASE, steps=1, average=None)
    after = []
    for joined in (True, False):
        task = Plain(joined)
        fit(task, replace(config, accumulate=1 if joined else 2), tmp_path / str(joined))
        after.append(task.network.state_dict())
    torch.testing.assert_close(after[0], after[1])


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    """Two processes under torchrun's variables end with the same weights, those of neither alone."""
    script = SCRIPT.replace("sys.stdin.readline()", "pass")
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    env = {**os.environ, **ports, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "both")]
    runs = [subprocess.Popen(command, env={**env, "RANK": str(r)}, stdout=subprocess.DEVNULL) for r in (0, 1)]
    assert [run.wait() for run in runs] == [0, 0]
    train(tmp_path / "alone")
    both, alone = bits(tmp_path / "both"), bits(tmp_path / "alone")
    assert both.keys() == alone.keys()
    assert both["network|2.weight"] != alone["network|2.weight"]
    assert record(tmp_path / "both")["key"]["processes"] == 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@given(
    step=st.integers(0, 999),
    warmup=st.floats(0, 0.9),
    kind=st.sampled_from(["constant", "exponential", "cosine"]),
)
def test_rates_stay_between_0_and_1(step: int, warmup: float, kind: Any) -> None:
    value = factor(kind, step, steps=1000, epoch_steps=10, warmup=warmup, gamma=0.85, floor=0.01)
    assert 0 < value <= 1


def test_rates_at_the_ends() -> None:
    def at(step: int, kind: Any, warmup: float = 0.0) -> float:
        return factor(kind, step, steps=101, epoch_steps=10, warmup=warmup, gamma=0.5, floor=0.1)

    assert [at(s, "exponential") for s in (0, 9, 10, 29)] == [1, 1, 0.5, 0.25]
    assert [at(s, "cosine") for s in (0, 50, 100)] == pytest.approx([1, 0.55, 0.1])
    assert [at(s, "cosine", 0.0297) for s in (0, 1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75, 1])


def test_exponential_is_torchs(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.85)
    for epoch in range(5):
        ours = factor("exponential", 7 * epoch, steps=99, epoch_steps=7, warmup=0, gamma=0.85, floor=0)
        assert 3e-4 * ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"steps": 0},
        {"average": 1.0},
        {"warmup": 1.0},
        {"learning_rate": -1.0},
        {"workers": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FitConfig(**wrong)
    assert next(iter(wrong)) in asdict(FitConfig())
