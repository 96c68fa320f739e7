"""P-Net and R-Net of DeepIGeoS (Wang et al. 2018) in three dimensions, as pet-ct-annotate trained them.

Five blocks of dilated convolutions keep the resolution; two channels of each are gathered for the decision.
No layer normalises, so that a voxel depends on its surroundings alone, at most `REACH` voxels away.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["PNET_CHANNELS", "REACH", "RNET_CHANNELS", "Pair", "PRNet"]

PNET_CHANNELS = ("CT", "PET")
RNET_CHANNELS = (*PNET_CHANNELS, "foreground distance", "background distance", "proposal")

DILATIONS = (1, 2, 4, 8, 16)
CONVOLUTIONS = (2, 2, 3, 3, 3)

REACH = (
    sum(DILATIONS) + 1,
    *(sum(n * d for n, d in zip(CONVOLUTIONS, DILATIONS, strict=True)) + 1,) * 2,
)
"""How far one network looks, in voxels (z, y, x)."""


class PRNet(nn.Module):
    """Logits (N, 1, x, y, z) of channels (N, C, x, y, z): upstream's axes, since its kernels are flat in z."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        widths = (channels, *(width,) * len(DILATIONS))
        plan = zip(pairwise(widths), DILATIONS, CONVOLUTIONS, strict=True)
        for number, ((before, after), dilation, count) in enumerate(plan, 1):
            self.add_module(f"block{number}", _block(before, after, dilation, count))
            self.add_module(f"block{number}_downsample", nn.Sequential(nn.Conv3d(after, 2, 1), nn.ReLU()))
        self.block6 = nn.Sequential(
            nn.Dropout(), nn.Conv3d(2 * len(DILATIONS), width, 1), nn.ReLU(), nn.Dropout(),
            nn.Conv3d(width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        gathered = []
        for number in range(1, len(DILATIONS) + 1):
            x = self.get_submodule(f"block{number}")(x)
            gathered.append(self.get_submodule(f"block{number}_downsample")(x))
        logits: Tensor = self.block6(torch.cat(gathered, 1))
        return logits


def _block(before: int, after: int, dilation: int, count: int) -> nn.Sequential:
    """Return one cubic convolution and ``count - 1`` flat ones, each followed by ReLU."""
    layers: list[nn.Module] = []
    for index in range(count):
        deep = 1 if index == 0 else 0  # whether it looks along z
        kernel, padding = (3, 3, 1 + 2 * deep), (dilation, dilation, dilation * deep)
        layers += [nn.Conv3d(before, after, kernel, padding=padding, dilation=dilation), nn.ReLU()]
        before = after
    return nn.Sequential(*layers)


class Pair(nn.Module):
    """Both networks: P-Net proposes from CT and PET, R-Net refines with the scribbles' distances."""

    def __init__(self) -> None:
        super().__init__()
        self.pnet = PRNet(len(PNET_CHANNELS))
        self.rnet = PRNet(len(RNET_CHANNELS))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``proposal``, and ``refined`` if `x` has the two distances: logits (N, 1, x, y, z)."""
        proposal = self.pnet(x[:, : len(PNET_CHANNELS)])
        if x.shape[1] == len(PNET_CHANNELS):
            return {"proposal": proposal}
        return {"proposal": proposal, "refined": self.rnet(torch.cat((x, proposal.sigmoid()), 1))}

    def load_pair(self, pnet: Mapping[str, Tensor], rnet: Mapping[str, Tensor]) -> None:
        """Take both networks' weights."""
        self.pnet.load_state_dict(pnet)
        self.rnet.load_state_dict(rnet)
