"""What happens to an example on its way to the network: the paper's changes, and stains of other laboratories.

`augment` is a pure function of the example and of one source of chance, which the sampler makes anew for every
sample of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from wsitk.errors import UsageError
from wsitk.models.cellvit.training import optics, stain, warp
from wsitk.models.cellvit.training.data import Example, Image

__all__ = ["Recipe", "PAPER", "STAIN", "PLAIN", "RECIPES", "augment", "make_crop"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How likely each change is; the defaults are those of CellViT's published runs.

    Attributes
    ----------
    turn, mirror_x, mirror_y
        A turn by 0 to 3 right angles; left for right; top for bottom.
    downscale, blur, noise, jitter, superpixels, zoom_blur
        Appearance, see `optics`.
    sized_crop, elastic
        Geometry, see `warp`.
    restain, recolour, expose, degrade
        Other laboratories and scanners, see `stain`. `degrade` is itself a matter of chance.
    stain_amount, stain_hue
        Spread of `restain`'s factors (natural logarithm) and vectors.
    own_stains
        How often `restain` starts from the image's own stain vectors instead of the textbook's.
    zoom, wide_zoom, wide
        A crop shows the tissue larger or smaller by a factor drawn, in the logarithm, up to `zoom`, and with
        probability `wide` up to `wide_zoom`. 1 for true size.

    Raises UsageError WSI902 for numbers out of range.
    """

    turn: float = 0.5
    mirror_x: float = 0.5
    mirror_y: float = 0.5
    downscale: float = 0.15
    blur: float = 0.2
    noise: float = 0.25
    jitter: float = 0.2
    superpixels: float = 0.1
    zoom_blur: float = 0.1
    sized_crop: float = 0.1
    elastic: float = 0.2
    restain: float = 0.0
    recolour: float = 0.0
    expose: float = 0.0
    degrade: float = 0.0
    own_stains: float = 0.0
    stain_amount: float = 0.25
    stain_hue: float = 0.07
    zoom: float = 1.0
    wide_zoom: float = 1.0
    wide: float = 0.0

    def __post_init__(self) -> None:
        beyond = {
            "zoom": (1.0, 4.0),
            "wide_zoom": (1.0, 4.0),
            "stain_amount": (0.0, 2.0),
            "stain_hue": (0.0, 0.5),
        }
        for field in fields(self):
            low, high = beyond.get(field.name, (0.0, 1.0))
            value = getattr(self, field.name)
            if not low <= value <= high:
                raise UsageError(
                    "WSI902", f"augmentation {field.name} is {value}, wanted {low:g} to {high:g}"
                )

    def zoom_factor(self, rng: np.random.Generator) -> float:
        """Return how much larger than life to show a crop: the `zoom` of `warp.fit`."""
        widest = self.wide_zoom if rng.random() < self.wide else self.zoom
        return float(np.exp(rng.uniform(-1, 1) * np.log(widest)))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return a changed copy of an example; see `augment`."""
        return augment(example, rng, self)


PAPER = Recipe()
"""Hörst et al. 2024: the published runs."""

STAIN = replace(
    PAPER,
    **{"turn": 1.0, "downscale": 0.0, "blur": 0.0, "noise": 0.0, "jitter": 0.0},
    **{"restain": 0.85, "recolour": 0.6, "expose": 0.5, "degrade": 1.0, "own_stains": 0.3},
    **{"zoom": 1.25, "wide_zoom": 1.6, "wide": 0.12},
)
"""For slides from anywhere: the paper's geometry, with the stains, colours and optics of other laboratories."""

PLAIN = Recipe(**dict.fromkeys((f.name for f in fields(Recipe)[:11]), 0.0))
"""No change at all."""

RECIPES: dict[str, Recipe] = {"paper": PAPER, "stain": STAIN, "none": PLAIN}


def augment(example: Example, rng: np.random.Generator, recipe: Recipe = PAPER) -> Example:
    """Return a changed copy of an example, of the same size: first appearance, then geometry.

    One number is drawn for each possible change, whether or not it comes to pass: what happens to a sample
    depends on its own chances only.
    """
    chance = {f.name: float(c) for f, c in zip(fields(recipe), rng.random(len(fields(recipe))), strict=True)}
    streams = dict(zip(chance, rng.spawn(len(chance)), strict=True))

    def happens(name: str) -> bool:
        return chance[name] < float(getattr(recipe, name))

    example = warp.symmetry(
        example,
        int(streams["turn"].integers(4)) if happens("turn") else 0,
        happens("mirror_x"),
        happens("mirror_y"),
    )
    image = example.image
    for name, change in _OPTICS.items():
        if happens(name):
            image = change(image, streams[name])
    example = replace(example, image=_stained(image, happens, streams, recipe))
    if happens("sized_crop"):
        example = warp.sized_crop(example, streams["sized_crop"])
    return warp.elastic(example, streams["elastic"]) if happens("elastic") else example


def make_crop(
    example: Example, size: int, spacing_um: float, rng: np.random.Generator, recipe: Recipe = PAPER
) -> Example:
    """Return what the network sees of an image: a random crop of `size` pixels of `spacing_um`, changed."""
    return augment(warp.fit(example, size, spacing_um, rng, recipe.zoom_factor(rng)), rng, recipe)


_OPTICS: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "downscale": optics.downscale,
    "blur": optics.blur,
    "noise": optics.noise,
    "jitter": optics.jitter,
    "superpixels": optics.superpixels,
    "zoom_blur": optics.zoom_blur,
}


def _stained(
    image: Image, happens: Callable[[str], bool], streams: dict[str, np.random.Generator], recipe: Recipe
) -> Image:
    """Return the image as another laboratory and scanner would have made it."""
    names = [n for n in ("restain", "recolour", "expose") if happens(n)]
    pixels = image.astype(np.float32)
    for name in names:
        if name == "restain":
            vectors = stain.estimate_stains(image) if happens("own_stains") else stain.STAINS
            amount, hue = recipe.stain_amount, recipe.stain_hue
            pixels = stain.restain(pixels, streams[name], amount=amount, hue=hue, stains=vectors)
        else:
            pixels = {"recolour": stain.recolour, "expose": stain.expose}[name](pixels, streams[name])
    if names:
        image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return stain.degrade(image, streams["degrade"]) if happens("degrade") else image
