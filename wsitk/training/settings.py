"""How to train, as data; nothing here knows what is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from wsitk.training.schedule import Kind

__all__ = ["FitConfig"]

FREE = ("minutes", "workers", "save_every", "log_every", "validate_every")
"""Settings that change no weight: a run may be resumed with others."""


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes
    ----------
    seed
        Of batches, augmentation and dropout.
    epochs, steps
        Length; `steps` (optimiser steps), if given, instead of `epochs`.
    accumulate
        Batches whose gradients make one step.
    precision
        Of the network's arithmetic; ``float16`` scales the loss, ``bfloat16`` needs no scaling.
    learning_rate, betas, weight_decay, decay_vectors
        AdamW's; whether parameters of one axis (gains, biases) decay too.
    schedule, warmup, gamma, floor
        See `schedule.factor`; `warmup` is a share of all steps.
    clip
        Largest norm of the gradient; None for no limit.
    average
        Decay of the exponential moving average of the weights, which is then what is validated and exported;
        None for the weights themselves.
    threads
        Threads of torch on the CPU; None for what torch finds. Sums round differently for other numbers.
    workers
        Processes that prepare batches; 0 for none.
    save_every, log_every, validate_every
        Steps between checkpoints, rows of the log, validations; 0 for once an epoch.
    minutes
        Deadline: training ends at the first checkpoint after it, to be resumed or used as it is.
    """

    seed: int = 19
    epochs: int = 130
    steps: int | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_vectors: bool = True
    schedule: Kind = "cosine"
    warmup: float = 0.0
    gamma: float = 0.85
    floor: float = 0.01
    clip: float | None = None
    average: float | None = None
    threads: int | None = None
    workers: int = 0
    save_every: int = 0
    log_every: int = 0
    validate_every: int = 0
    minutes: float | None = None

    def __post_init__(self) -> None:
        least = {
            "epochs": 1,
            "accumulate": 1,
            "workers": 0,
            "save_every": 0,
            "log_every": 0,
            "validate_every": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least {bound}")
        for name in ("steps", "threads", "minutes", "clip", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, wanted more than 0")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average is {self.average}, wanted between 0 and 1, or none")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, wanted a share below 1")

    def key(self) -> dict[str, Any]:
        """Return what the weights after a given step depend on."""
        found = {name: value for name, value in asdict(self).items() if name not in FREE}
        if self.schedule != "cosine" and not self.warmup:
            # the path does not depend on its length, so a finished run may be made longer
            del found["epochs"], found["steps"]
        return found
