"""What models share that are told their task by examples: options, pixels to 0..1, the support on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from wsitk.errors import ModelError, UsageError
from wsitk.model import FieldSpec, Licences, ModelSpec
from wsitk.models.universeg.blocks import STEPS
from wsitk.models.universeg.support import LUMINANCE, Support, examples_at, read_support
from wsitk.settings import home
from wsitk.torchfile import TensorFile, checked_state, read_tensors

__all__ = ["Task", "TaskOptions", "load_network", "make_task", "official_weights", "task_spec"]

Network = TypeVar("Network", bound=nn.Module)

DIVISOR = 2**STEPS


@dataclass(frozen=True)
class TaskOptions:
    """What a user may say of a task besides its examples.

    Attributes
    ----------
    size
        Side of the tile and of the examples in pixels, a multiple of 8; the networks were trained at 128.
    label
        Value of the masks that is meant; None takes whatever isn't zero.
    target
        Name of what is found, as the map's channel says it.
    spacing_um
        Pixel size at which the network works: one number, or one for each axis; None takes the input's own.
        Choose it so that a tile shows as much as an example does.
    slices
        Take a volume slice by slice, along its first axis.
    intensity
        Values that become 0 and 1; None takes smallest and largest of each image and each tile, as upstream.
    """

    size: int = 128
    label: int | None = None
    target: str = "Target"
    spacing_um: float | Sequence[float] | None = None
    slices: bool = False
    intensity: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.size < 4 * DIVISOR or self.size % DIVISOR:
            raise UsageError(
                "WSI074", f"size is {self.size}, wanted a multiple of {DIVISOR}, {4 * DIVISOR} or more"
            )
        if self.intensity is not None and not (
            len(self.intensity) == 2 and self.intensity[0] < self.intensity[1]
        ):
            raise UsageError("WSI074", f"intensity is {self.intensity}, wanted two numbers, low and high")
        if len(self.spacing or self.tile) != len(self.tile):
            raise UsageError(
                "WSI074",
                f"spacing_um is {self.spacing_um}, wanted {len(self.tile)} numbers: {len(self.tile)} axes",
            )

    @property
    def tile(self) -> tuple[int, ...]:
        """Return what the network reads: one slice of a volume, or a square."""
        return (1, self.size, self.size) if self.slices else (self.size, self.size)

    @property
    def halo(self) -> tuple[int, ...]:
        """Return a quarter of the tile, on the lattice of the network's coarsest pixels."""
        quarter = max(DIVISOR, self.size // 4 // DIVISOR * DIVISOR)
        return (0, quarter, quarter) if self.slices else (quarter, quarter)

    @property
    def align(self) -> tuple[int, ...]:
        """Return the period of the network's poolings."""
        return (1, DIVISOR, DIVISOR) if self.slices else (DIVISOR, DIVISOR)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Return the pixel size for each axis, micrometres; None takes any."""
        if self.spacing_um is None:
            return None
        if isinstance(self.spacing_um, int | float):
            return (float(self.spacing_um),) * len(self.tile)
        return tuple(float(s) for s in self.spacing_um)


@final
class Task:
    """A support at any size, and pixels in the range that the networks want."""

    def __init__(self, support: Support, intensity: Sequence[float] | None) -> None:
        self.support = support
        self._intensity = None if intensity is None else (float(intensity[0]), float(intensity[1]))
        self._made: dict[tuple[tuple[int, ...], str], tuple[Tensor, Tensor]] = {}

    @property
    def channels(self) -> int:
        """Return how many channels an input has: those that the examples have."""
        return 3 if self.support.colour else 1

    @property
    def identity(self) -> str:
        """Return a hash of what changes results: the examples, and the range that was fixed."""
        fixed = "" if self._intensity is None else f"@{self._intensity[0]:g}:{self._intensity[1]:g}"
        return self.support.sha256 + fixed

    def examples(self, size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the support's images and masks (1, S, 1, H, W), made once for each size."""
        key = (tuple(size), str(device))
        if key not in self._made:
            images, masks = examples_at(self.support, size, self._intensity)
            self._made = {key: (_batch(images, device), _batch(masks, device))}
        return self._made[key]

    def pixels(self, batch: Tensor) -> Tensor:
        """Return (N, 1, H, W) in 0..1 for tiles (N, 1 or 3, [1,] H, W) as the source gave them."""
        x = batch.float()
        x = x[:, :, 0] if x.ndim == 5 else x
        if x.shape[1] == 3:
            weights = torch.tensor(LUMINANCE, device=x.device).view(1, 3, 1, 1)
            x = (x * weights).sum(dim=1, keepdim=True)
        if self._intensity is None:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        else:
            low, high = (torch.full_like(x[:, :1, :1, :1], v) for v in self._intensity)
        return torch.where(high > low, (x - low) / (high - low), 0).clamp(0, 1)


def _batch(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(values)[None].to(device)


def make_task(name: str, support: str | Path | Support | None, options: TaskOptions) -> Task:
    """Return the task that a folder of examples tells. Raises UsageError: WSI070 to WSI073."""
    if support is None:
        raise UsageError(
            "WSI070", f"{name} learns its task from examples; name a folder with them: --support DIR"
        )
    if not isinstance(support, Support):
        support = read_support(support, label=options.label)
    return Task(support, options.intensity)


def load_network(make: Callable[[], Network], path: str | Path) -> tuple[Network, TensorFile]:
    """Return a network with a checkpoint's weights, in evaluation mode, and what was read.

    Raises ModelError as `read_tensors` and `checked_state` do.
    """
    file = read_tensors(path)
    with torch.device("meta"):
        network = make()
    network.load_state_dict(checked_state(file, network.state_dict()), strict=True, assign=True)
    return network.eval(), file


def task_spec(
    name: str,
    version: str,
    task: Task,
    options: TaskOptions,
    file: TensorFile,
    fields: tuple[FieldSpec, ...],
    licences: Licences,
) -> ModelSpec:
    """Return the spec of a model for a task; `version` is put after the file and the number of examples."""
    return ModelSpec(
        name=name,
        version=f"{file.path.name}, {len(task.support.examples)} examples{version}",
        spacing=options.spacing,
        tile=options.tile,
        halo=options.halo,
        align=options.align,
        channels=task.channels,
        dtype="",
        fields=fields,
        weights_sha256=f"{file.sha256}+{task.identity}",
        licences=licences,
    )


def official_weights(path: str | Path | None, name: str, origin: str) -> Path:
    """Return the file of weights: `path`, or `name` in the weights folder. Raises ModelError (WSI312)."""
    found = home() / "weights" / name if path is None else Path(path)
    if not found.is_file():
        raise ModelError(
            "WSI312", f"{found.name} is not in {found.parent}; download it from {origin} and put it there"
        )
    return found
