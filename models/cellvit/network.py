"""CellViT: a transformer encoder under three UNETR-like branches (Hörst 2024), with upstream's names.

The skip decoders run once for all branches; upstream runs them again for each, which is 11 to 16 % of all its
arithmetic. Images are (N, 3, H, W) float, normalised as the checkpoint says, at 0.25 µm/px.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.errors import ModelError
from wsitk.models.cellvit.config import VARIANTS, CellViTConfig
from wsitk.models.cellvit.decoder import Branch, resize, skip_decoders
from wsitk.models.cellvit.encoders import build_encoder

__all__ = ["CellViT", "CellViTConfig", "VARIANTS", "empty_network"]


class CellViT(nn.Module):
    """CellViT with the encoder that `config` names.

    ``forward(x: (N, 3, H, W))`` returns a dict of

    - ``tissue_types`` (N, tissue classes): logits,
    - ``nuclei_binary_map`` (N, 2, H, W): logits of background and nucleus,
    - ``hv_map`` (N, 2, H, W): horizontal and vertical distance to the nucleus' centre, about -1 to 1,
    - ``nuclei_type_map`` (N, nuclei classes, H, W): logits, background first,
    - ``regression_map`` (N, 2, H, W), if the config says so,
    - ``tokens`` (N, embed_dim, H / patch, W / patch): the deepest tokens, for cell classifiers.
    """

    def __init__(self, config: CellViTConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder0, self.decoder1, self.decoder2, self.decoder3 = skip_decoders(config)
        self.nuclei_binary_map_decoder = Branch(config, 4 if config.regression else 2)
        self.hv_map_decoder = Branch(config, 2)
        self.nuclei_type_maps_decoder = Branch(config, config.nuclei_classes)
        # SAM's encoder has no class token: its tissue head lies outside. The others bring their own.
        self.classifier_head = (
            nn.Linear(256, config.tissue_classes) if config.family == "sam" else nn.Identity()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.suffix(self.prefix(x))

    def prefix(self, x: Tensor) -> dict[str, Tensor]:
        """Return what has no dropout: the pixels, the tokens of four depths, and what the tissue head reads."""
        self._check(x)
        (z1, z2, z3, z4), tissue = self.encoder(self._to_patches(x))
        return {"pixels": x, "z1": z1, "z2": z2, "z3": z3, "z4": z4, "tissue": tissue}

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs, from what `prefix` returned."""
        x, tissue = features["pixels"], features["tissue"]
        z1, z2, z3, z4 = (features[f"z{depth}"] for depth in (1, 2, 3, 4))
        image = resize(self.decoder0(self._to_patches(x)), like=x)
        skips = (image, self.decoder1(z1), self.decoder2(z2), self.decoder3(z3))
        binary = self.nuclei_binary_map_decoder(z4, skips)
        out = {
            "tissue_types": self.classifier_head(tissue),
            "nuclei_binary_map": binary[:, :2],
            "hv_map": self.hv_map_decoder(z4, skips),
            "nuclei_type_map": self.nuclei_type_maps_decoder(z4, skips),
            "tokens": z4,
        }
        if self.config.regression:
            out["regression_map"] = binary[:, 2:]
        return out

    def _to_patches(self, x: Tensor) -> Tensor:
        """Return `x` averaged down to the next multiples of the patch, where it has none (256 -> 252)."""
        h, w = (side // self.config.patch * self.config.patch for side in x.shape[2:])
        return x if (h, w) == tuple(x.shape[2:]) else F.interpolate(x, size=(h, w), mode="area")

    def _check(self, x: Tensor) -> None:
        align, most = self.config.align, self.config.largest_tile
        if any(side % align or side < align or side > (most or side) for side in x.shape[2:]):
            limit = "" if most is None else f" up to {most}"
            raise ModelError(
                "WSI311",
                f"CellViT tile of {' x '.join(map(str, x.shape[2:]))} px: wanted sides that are multiples of "
                f"{align}{limit}; choose another --tile",
            )


def empty_network(config: CellViTConfig) -> CellViT:
    """Return the network without memory for its weights, to be filled by ``load_state_dict(assign=True)``."""
    with torch.device("meta"):
        return CellViT(config)
