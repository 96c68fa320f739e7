"""Mirror U-Net: one U-Net for CT, one for PET, which share a part of their layers.

Marinov et al. 2023, "Mirror U-Net: Marrying multimodal fission with multi-task learning for semantic
segmentation in medical imaging", ICCV workshops. Layers and their names are those of MONAI's residual U-Net, as
upstream's are, so that its checkpoints load unchanged; MONAI itself isn't needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from wsitk.errors import ModelError

__all__ = ["CHANNELS", "CLASSIFIED_SIDE", "MirrorConfig", "MirrorUNet", "Task", "config_of"]

Task = Literal["segmentation", "transference", "fission", "fission_classification"]

CHANNELS = (16, 32, 64, 128, 256)
"""Channels of the four stages, each half the size of the one before, and of the bottleneck."""

CLASSIFIED_SIDE = 96
"""Side of the cube whose bottleneck has the 216 voxels that the classifier of lesions reads."""

DEEPEST = len(CHANNELS) - 2


@dataclass(frozen=True)
class MirrorConfig:
    """What a Mirror U-Net is for, and what its two halves share.

    Attributes
    ----------
    task
        ``segmentation``: both halves see lesions, and are mixed. ``transference``: the CT half restores the CT.
        ``fission``: and a third decoder, on both bottlenecks, restores the PET. ``fission_classification``: and
        the PET's bottleneck says whether there is a lesion.
    depth, level
        How many stages are shared, and (of one) which: 3 is the bottleneck; 2, 1, 0 the encoder's stages upwards
        from the deepest; 4, 5, 6 the decoder's. At depth 2 the bottleneck and both deepest stages are shared, at
        depth 3 the two deepest of either side; `level` says nothing then.
    ct_share
        Weight of the CT half where both are mixed; None takes the trained one.
    classes
        Channels of the segmentation.
    """

    task: Task = "segmentation"
    depth: int = 1
    level: int = 3
    ct_share: float | None = 0.1
    classes: int = 2

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise _odd(f"task {self.task!r}", ", ".join(get_args(Task)))
        if self.depth not in (1, 2, 3):
            raise _odd(f"depth {self.depth}", "1, 2 or 3")
        if self.depth == 1 and not 0 <= self.level <= 6:
            raise _odd(f"level {self.level}", "0 to 6: 0-2 encoder, 3 bottleneck, 4-6 decoder")
        if self.ct_share is not None and not 0 <= self.ct_share <= 1:
            raise _odd(f"ct_share {self.ct_share}", "0 to 1, or None for the trained one")

    @property
    def shared_down(self) -> frozenset[int]:
        """Return the encoder's stages (0 the finest) that both halves use."""
        if self.depth > 1:
            return frozenset(range(DEEPEST + 2 - self.depth, DEEPEST + 1))
        return frozenset({self.level + 1} if self.level < 3 else ())

    @property
    def shared_up(self) -> frozenset[int]:
        """Return the decoder's stages that both halves use."""
        if self.depth > 1:
            return self.shared_down
        return frozenset({DEEPEST + 4 - self.level} if self.level > 3 else ())

    @property
    def shared_bottom(self) -> bool:
        """Tell whether there is one bottleneck."""
        return self.depth > 1 or self.level == 3

    @property
    def restores(self) -> bool:
        """Tell whether the CT half ends in a CT."""
        return self.task != "segmentation"


def _odd(got: str, wanted: str) -> ModelError:
    return ModelError("WSI352", f"a Mirror U-Net has no {got}; wanted {wanted}")


def _unit(conv: nn.Module, out: int, *, bare: bool = False) -> nn.Module:
    """Return a convolution, with batch norm and PReLU unless it is bare, under MONAI's names."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if not bare:
        parts["adn"] = nn.Sequential(OrderedDict(N=nn.BatchNorm3d(out), A=nn.PReLU()))
    return nn.Sequential(parts)


@final
class Residual(nn.Module):
    """`units` convolutions, the first with a stride, beside a projection where shapes differ."""

    def __init__(self, inside: int, out: int, *, stride: int = 1, units: int = 2, bare: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for k in range(units):
            first = k == 0
            conv = nn.Conv3d(inside if first else out, out, 3, stride=stride if first else 1, padding=1)
            self.conv.add_module(f"unit{k}", _unit(conv, out, bare=bare and k == units - 1))
        self.residual: nn.Module = nn.Identity()
        if stride > 1:
            self.residual = nn.Conv3d(inside, out, 3, stride=stride, padding=1)
        elif inside != out:
            self.residual = nn.Conv3d(inside, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.residual(x)
        return out


def _down(inside: int, out: int) -> nn.Module:
    return Residual(inside, out, stride=2)


def _up(inside: int, out: int, *, top: bool) -> nn.Module:
    """Return a stage that doubles the size; at the top it ends in a convolution alone."""
    enlarged = nn.ConvTranspose3d(inside, out, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(_unit(enlarged, out), Residual(out, out, units=1, bare=top))


@final
class MirrorUNet(nn.Module):
    """Maps (N, 2, X, Y, Z), CT then PET, to ``output``, upstream's channels in upstream's order, and its parts.

    ``segmentation`` (N, classes, …) are logits; where the task has them ``ct`` and ``pet`` (N, 1, …) are the
    restored images and ``lesion`` (N, 1) the probability of any lesion. Sides are multiples of 16; with a
    classifier all are 96.
    """

    def __init__(self, config: MirrorConfig) -> None:
        super().__init__()
        self.config = config
        inside = (1, *CHANNELS)
        joined = [2 * CHANNELS[i] for i in range(DEEPEST)] + [CHANNELS[-2] + CHANNELS[-1]]
        out = (config.classes, *CHANNELS)
        self.learnable_th = nn.Parameter(torch.tensor(0.5))
        own_down = [i for i in range(DEEPEST + 1) if i not in config.shared_down]
        own_up = [i for i in range(DEEPEST + 1) if i not in config.shared_up]
        first = {0: 1} if config.restores else {}

        def downs(stages: list[int]) -> nn.ModuleList:
            return nn.ModuleList(_down(inside[i], inside[i + 1]) for i in stages)

        def ups(stages: list[int], other: Mapping[int, int]) -> nn.ModuleList:
            return nn.ModuleList(_up(joined[i], other.get(i, out[i]), top=i == 0) for i in stages)

        # in upstream's order, which is that of the names in its checkpoints
        self.down_1, self.up_1 = downs(own_down), ups(own_up, first)
        self.common_downs, self.common_ups = (
            downs(sorted(config.shared_down)),
            ups(sorted(config.shared_up), {}),
        )
        self.down_2, self.up_2 = downs(own_down), ups(own_up, {})
        if config.task.startswith("fission"):
            widths = (2 * CHANNELS[-1], *CHANNELS[-3::-1], 1)
            pairs = pairwise(widths)
            self.dec = nn.ModuleList(_up(a, b, top=False) for a, b in pairs)
        if config.shared_bottom:
            self.bottom_layer = Residual(CHANNELS[-2], CHANNELS[-1])
        else:
            self.bottom_layer_1 = Residual(CHANNELS[-2], CHANNELS[-1])
            self.bottom_layer_2 = Residual(CHANNELS[-2], CHANNELS[-1])
        if config.task == "fission_classification":
            self.flatten_channels = _unit(nn.Conv3d(CHANNELS[-1], 1, 1), 1)
            voxels = (CLASSIFIED_SIDE // 2 ** len(CHANNELS[:-1])) ** 3
            head = [nn.Linear(voxels, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 1), nn.Sigmoid()]
            self.fc = nn.Sequential(nn.Flatten(), *head)

    def _stages(self, own: nn.ModuleList, common: nn.ModuleList, shared: frozenset[int]) -> list[nn.Module]:
        """Return a half's stages, finest first, its own and the common ones in their places."""
        mine, ours = iter(own), iter(common)
        return [next(ours if i in shared else mine) for i in range(DEEPEST + 1)]

    def _half(
        self, x: Tensor, down: nn.ModuleList, up: nn.ModuleList, bottom: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Return a half's result, and its bottleneck."""
        skips = []
        for stage in self._stages(down, self.common_downs, self.config.shared_down):
            x = stage(x)
            skips.append(x)
        x = deep = bottom(x)
        ups = self._stages(up, self.common_ups, self.config.shared_up)
        for stage, skip in zip(reversed(ups), reversed(skips), strict=True):
            x = stage(torch.cat([x, skip], dim=1))
        return x, deep

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        bottoms = [getattr(self, "bottom_layer", None) or getattr(self, f"bottom_layer_{k}") for k in (1, 2)]
        ct, deep_ct = self._half(x[:, :1], self.down_1, self.up_1, bottoms[0])
        pet, deep_pet = self._half(x[:, 1:2], self.down_2, self.up_2, bottoms[1])
        if not self.config.restores:
            share = self.config.ct_share
            weight = self.learnable_th.clamp(0, 1) if share is None else share
            mixed = weight * ct + (1 - weight) * pet
            return {"output": mixed, "segmentation": mixed}
        found = {"ct": ct}
        if self.config.task.startswith("fission"):
            restored = torch.cat([deep_ct, deep_pet], dim=1)
            for stage in self.dec:
                restored = stage(restored)
            found["pet"] = restored
        found["segmentation"] = pet
        parts = list(found.values())
        if self.config.task == "fission_classification":
            found["lesion"] = self.fc(self.flatten_channels(deep_pet))
            parts.append(found["lesion"][..., None, None, None].expand_as(ct))
        return {"output": torch.cat(parts, dim=1), **found}


def config_of(state: Mapping[str, Tensor]) -> MirrorConfig | None:
    """Return what a checkpoint's tensors are of, judged by names and shapes; None if they are no Mirror U-Net's.

    Every choice leaves its trace there but `ct_share`, which is a setting.
    """
    halves = [state.get(f"up_{k}.0.1.conv.unit0.conv.weight") for k in (1, 2)]
    if halves[0] is None or halves[1] is None:
        return None
    classes, first = int(halves[1].shape[0]), int(halves[0].shape[0])
    sharing = _sharing(state)
    if sharing is None or classes < 2:
        return None
    task: Task = "segmentation" if first == classes else "transference"
    if "dec.0.0.conv.weight" in state:
        task = "fission_classification" if "fc.1.weight" in state else "fission"
    config = MirrorConfig(task, *sharing, classes=classes)
    with torch.device("meta"):
        wanted = MirrorUNet(config).state_dict()
    same = wanted.keys() == state.keys() and all(state[k].shape == v.shape for k, v in wanted.items())
    return config if same else None


def _sharing(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return depth and level: how many stages are common, and by their widths, which."""
    downs = [w for k in range(4) if (w := state.get(f"common_downs.{k}.residual.weight")) is not None]
    ups = [w for k in range(4) if (w := state.get(f"common_ups.{k}.0.conv.weight")) is not None]
    if len(downs) == len(ups):
        return (len(downs) + 1, 3) if len(downs) < 3 else None
    if len(downs) == 1 and not ups:
        widths: tuple[int, ...] = CHANNELS[:-1]
        level = widths.index(int(downs[0].shape[0])) - 1 if int(downs[0].shape[0]) in widths else -1
    elif len(ups) == 1 and not downs:
        widths = CHANNELS[:DEEPEST]
        level = DEEPEST + 3 - widths.index(int(ups[0].shape[1])) if int(ups[0].shape[1]) in widths else -1
    else:
        return None
    return (1, level) if 0 <= level <= 6 else None
