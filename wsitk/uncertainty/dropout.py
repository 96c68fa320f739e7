"""Chance in a network's dropout layers, and nowhere else: hooks on them, while everything stays in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.errors import ModelError
from wsitk.uncertainty.masks import element_mask, layer_key, map_mask

__all__ = ["DropoutSampler", "Kind", "dropout_layers"]

Kind = Literal["dropout", "spatial", "element"]
"""``spatial`` drops whole feature maps, ``element`` single elements, ``dropout`` whatever a layer was trained with."""

_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

Places = Sequence[tuple[int, ...]]


def dropout_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the dropout layers of a network by name, whatever their rate."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _LAYERS)}


@final
class DropoutSampler:
    """Draws masks for the dropout layers of `network` while `sampling`; at all other times they let all through.

    `rate` replaces the layers' own. A mask depends on nothing but (seed, sample, layer's name, and how often the
    layer ran before in this sample), and for single elements on where they lie.
    """

    def __init__(self, network: nn.Module, *, seed: int, kind: Kind, rate: float | None) -> None:
        self._seed, self._kind, self._rate = seed, kind, rate
        self._layers = dropout_layers(network)

    @property
    def sampled(self) -> list[str]:
        """Return the names of the layers that have something to drop."""
        return [name for name, layer in self._layers.items() if self._rate_of(layer)]

    def _rate_of(self, layer: nn.Module) -> float:
        own: Any = layer.p
        return float(own) if self._rate is None else self._rate

    @contextmanager
    def sampling(self, sample: int, starts: Places, tile: tuple[int, ...]) -> Iterator[None]:
        """Apply the masks of `sample` to a batch of tiles that begin at `starts` on the working grid."""

        def hook_of(name: str, layer: nn.Module) -> Callable[..., Tensor]:
            ran = 0

            def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
                nonlocal ran
                key = layer_key(self._seed, sample, name if not ran else f"{name} {ran}")
                ran += 1
                return self._dropped(name, layer, key, given[0], starts, tile)

            return hook

        with _hooked({n: (self._layers[n], hook_of(n, self._layers[n])) for n in self.sampled}):
            yield

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Refuse (ModelError WSI603) layers that drop something by themselves: they would never be sampled here."""

        def hook_of(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
                raise ModelError(
                    "WSI603",
                    f"dropout layer {name!r} runs in the model's prefix, which is computed once and never sampled; "
                    "cut the model's predict before it",
                )

            return hook

        own = {n: layer for n, layer in self._layers.items() if _own_rate(layer)}
        with _hooked({n: (layer, hook_of(n)) for n, layer in own.items()}):
            yield

    def _dropped(
        self,
        name: str,
        layer: nn.Module,
        key: NDArray[np.uint64],
        x: Tensor,
        starts: Places,
        tile: tuple[int, ...],
    ) -> Tensor:
        """Return `x` (N, C, ...) with what the mask keeps, scaled so that its mean stays."""
        rate = self._rate_of(layer)
        if rate >= 1:
            return torch.zeros_like(x)
        if x.ndim not in (2, 2 + len(tile)):
            raise ModelError(
                "WSI604",
                f"dropout layer {name!r} gets a tensor of shape {tuple(x.shape)}, wanted (N, C) or (N, C, "
                f"{len(tile)} axes of space); only such layers can be sampled the same way in every tile",
            )
        if x.ndim == 2 or not self._by_element(layer):
            keep = map_mask(key, x.shape[1], rate).reshape(1, -1, *[1] * (x.ndim - 2))
        else:
            places = [_place(name, start, tile, tuple(x.shape[2:])) for start in starts]
            # all tiles of a batch at one place happens only for blank ones; no mask is worth keeping
            keep = np.stack([element_mask(key, x.shape[1], p, x.shape[2:], rate) for p in places])
        return x * torch.from_numpy(keep).to(x.device).to(x.dtype).mul_(1 / (1 - rate))

    def _by_element(self, layer: nn.Module) -> bool:
        return self._kind == "element" or (self._kind == "dropout" and isinstance(layer, nn.Dropout))


def _own_rate(layer: nn.Module) -> float:
    own: Any = layer.p
    return float(own)


def _place(
    name: str, start: tuple[int, ...], tile: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return where a tile begins in a layer's own grid over the image.

    Raises ModelError (WSI605) where that is between two elements, or the layer has no such grid.
    """
    place = []
    for first, length, count in zip(start, tile, shape, strict=True):
        stride, odd = divmod(length, count)
        if odd or not stride or first % stride:
            raise ModelError(
                "WSI605",
                f"dropout layer {name!r} has {count} elements for {length} pixels from {first} on, so its grid doesn't "
                "lie the same in all tiles; sample whole maps (uncertainty 'spatial'), or give the spec an align "
                "that is a multiple of the network's stride",
            )
        place.append(first // stride)
    return tuple(place)


@contextmanager
def _hooked(hooks: dict[str, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
