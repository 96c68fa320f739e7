"""Fields of infected hepatocytes as a microscope would show them, with exact masks; a function of a seed.

There are no public liver-stage images with masks that a model may be trained on, so these are made: what is there
(cells, nuclei, parasites, what looks like them), then what the instrument does to it (`camera`). Two channels: a
stain of DNA, and one of the parasite (antibodies against its HSP70). Units: micrometres, and brightness as a
multiple of the host cytoplasm's.

Where the numbers come from
    Nuclei: 84 to 99 % of those of human hepatocytes are diploid, and the volume doubles with the ploidy (Ranek et
    al. 1975, Acta Path. Microbiol. Scand. A); 4 to 7 % of the cells have two of equal ploidy, and a cell grows with
    its nuclei (Watanabe & Tanaka 1982, Virchows Arch. B 39). Cells are 20 to 30 µm wide (textbooks). Parasites: a
    hypnozoite has little DNA and stains for HSP70 all over; by day 8 a P. vivax schizont is several times as large as
    the host's nucleus and has many nuclei, P. falciparum stays smaller (Roth et al. 2018, Nat. Commun. 9, fig. 4).
    Light: Poisson statistics, and a Gaussian for the lateral point spread function, of sigma 0.21 wavelength / NA
    (Zhang et al. 2007, Appl. Opt. 46).

What is ours
    All other numbers: the distributions between these facts, shapes, textures, how often what occurs, and all that
    looks like a parasite and is none. They were chosen wide. Whoever wrote them had seen the two fields of
    ``parasites/`` in the project's test data, and knows such debris from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from wsitk.models.liverstage.camera import Camera, photograph
from wsitk.models.liverstage.shapes import Blob, Floats, blob, box_at, smooth_noise, spots

__all__ = ["DNA", "PARASITE", "Field", "FieldRecipe", "make_field"]

DNA, PARASITE = 0, 1
"""The channels."""

_FOCUS_UM = (0.0, 0.9, 2.5)
"""Blur (sigma) of what lies in the plane in focus, near it, and far from it."""


@dataclass(frozen=True)
class FieldRecipe:
    """How fields may differ. Pairs are the ends of a range; sizes are in µm.

    Attributes
    ----------
    um_per_px
        Pixel sizes, drawn evenly in their logarithm: objectives of 10x to 20x.
    cell, confluence
        Distance between neighbouring cells, and the share of them that are there.
    nucleus, polyploid, binucleate
        Diameter of diploid nuclei and its deviation; shares of tetraploid nuclei and of cells with two.
    empty, parasites, touching
        Share of fields without parasites; mean number in the others, for 250 µm squared; share that touch another.
    median, spread, smallest, largest
        Parasites of a field have a median diameter between the ends of `median` (early to late stages), log-normal
        about it with deviation `spread`, cut at `smallest` and `largest`.
    contrast
        Brightness of parasites in a field, as a multiple of the host cytoplasm's.
    least_px
        Parasites are at least so many pixels wide.
    look_alikes
        Mean number of things that are none, for 250 µm squared.
    camera
        What the instrument does.
    """

    um_per_px: tuple[float, float] = (0.4, 1.1)
    cell: tuple[float, float] = (20.0, 30.0)
    confluence: tuple[float, float] = (0.6, 1.0)
    nucleus: tuple[float, float] = (9.0, 0.9)
    polyploid: tuple[float, float] = (0.01, 0.16)
    binucleate: tuple[float, float] = (0.03, 0.12)
    empty: float = 0.12
    parasites: tuple[float, float] = (1.5, 8.0)
    touching: float = 0.2
    median: tuple[float, float] = (5.0, 30.0)
    spread: float = 0.35
    smallest: float = 3.5
    largest: float = 60.0
    contrast: tuple[float, float] = (2.5, 40.0)
    least_px: float = 5.0
    look_alikes: tuple[float, float] = (0.0, 16.0)
    camera: Camera = field(default_factory=Camera)


@dataclass(frozen=True)
class Field:
    """A field: ``image`` uint8 or uint16 (2, H, W), instance masks int32 (H, W), 0 for background."""

    image: NDArray[np.uint8] | NDArray[np.uint16]
    parasites: NDArray[np.int32]
    nuclei: NDArray[np.int32]
    um_per_px: float


def make_field(
    shape: tuple[int, int],
    rng: np.random.Generator,
    recipe: FieldRecipe | None = None,
    nuclei: NDArray[np.floating] | None = None,
) -> Field:
    """Return a field: a pure function of the arguments and the state of `rng`.

    `nuclei` (H, W), 0 to 1, takes the place of the nuclei that would be drawn: a photograph of real ones. The mask
    of nuclei is then empty.
    """
    recipe = recipe or FieldRecipe()
    scene = _Scene(shape, rng, recipe)
    cells = scene.cells()
    if nuclei is None:
        scene.draw_nuclei(cells)
    else:
        scene.planes[0, DNA] += rng.uniform(3, 15) * nuclei.astype(np.float32)
    scene.draw_parasites(cells)
    scene.draw_look_alikes(cells)
    image = photograph(scene.in_focus(), scene.um, rng, recipe.camera)
    return Field(image, scene.parasites, scene.nuclei, scene.um)


def _log_uniform(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(ends))))


@final
class _Scene:
    """What is there, in planes of focus (3, 2, H, W); masks are drawn along."""

    def __init__(self, shape: tuple[int, int], rng: np.random.Generator, recipe: FieldRecipe) -> None:
        self.shape, self.rng, self.recipe = shape, rng, recipe
        self.um = _log_uniform(rng, recipe.um_per_px)
        self.planes = np.zeros((len(_FOCUS_UM), 2, *shape), np.float32)
        self.parasites, self.nuclei = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.share = shape[0] * shape[1] * self.um**2 / 250**2

    def in_focus(self) -> Floats:
        """Return what the objective sees: each plane with its blur, added up (2, H, W)."""
        whole: Floats = self.planes[0].copy()
        for plane, blur in zip(self.planes[1:], _FOCUS_UM[1:], strict=True):
            sigma = blur * self.rng.uniform(0.7, 1.5) / self.um
            whole += ndimage.gaussian_filter(plane, (0, sigma, sigma))
        return whole

    def paint(self, channel: int, plane: int, centre: NDArray[np.float64], light: Floats) -> None:
        """Add the square `light` about `centre`."""
        if box := box_at(centre, light.shape[0], self.shape):
            self.planes[plane, channel][box[0]] += light[box[1]]

    # --- cells ---

    def cells(self) -> NDArray[np.float64]:
        """Return the middles of the cells (N, 2), and let their cytoplasm shine."""
        rng, recipe = self.rng, self.recipe
        apart = rng.uniform(*recipe.cell) / self.um
        rows, columns = (int(n / apart) + 4 for n in self.shape)
        lattice = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        middle = (lattice + [[0.0, 0.5]] * (lattice[:, :1] % 2) - 1.5) * apart
        middle += rng.normal(0, 0.17 * apart, middle.shape)
        there = rng.random(len(middle)) < rng.uniform(*recipe.confluence)
        glow = np.exp(rng.normal(0, rng.uniform(0.05, 0.4), len(middle))) * np.where(there, 1, 0.25)
        step = 4
        y, x = np.mgrid[: self.shape[0] : step, : self.shape[1] : step]
        owner = cKDTree(middle).query(np.stack([y, x], -1))[1]
        soft = ndimage.gaussian_filter(glow[owner].astype(np.float32), rng.uniform(0.5, 4) / self.um / step)
        coarse = ndimage.zoom(soft, step, order=1)[: self.shape[0], : self.shape[1]]
        coarse = coarse + 0.15 * smooth_noise(rng, self.shape, 2 / self.um)
        self.planes[1, PARASITE] += np.maximum(coarse, 0)
        self.planes[1, DNA] += 1 + rng.uniform(0, 0.5) * np.maximum(coarse, 0)
        return np.asarray(middle[there])

    def draw_nuclei(self, cells: NDArray[np.float64]) -> None:
        """Draw one or two nuclei for each cell; what shines through into the other channel comes with it."""
        rng, recipe = self.rng, self.recipe
        polyploid, binucleate = rng.uniform(*recipe.polyploid), rng.uniform(*recipe.binucleate)
        bright, leak = _log_uniform(rng, (2.5, 20)), rng.choice([0.0, rng.uniform(0, 0.06)])
        texture = rng.uniform(0, 0.25)
        size = rng.normal(recipe.nucleus[0], recipe.nucleus[1])
        for cell in cells:
            diameter = rng.normal(size, 0.08 * size) * 2 ** (1 / 3 * (rng.random() < polyploid))
            two = rng.random() < binucleate
            away = rng.uniform(0, 2 * np.pi)
            for side in (-1, 1) if two else (0,):
                offset = np.array([np.sin(away), np.cos(away)]) * side * 0.6 * diameter / self.um
                shape = blob(rng, max(diameter / 2 / self.um, 1.5), stretch=rng.uniform(1, 1.3), wobble=0.03)
                light = shape.thickness(rng.uniform(0.3, 0.9)) * bright * np.exp(rng.normal(0, 0.25))
                plane = int(rng.choice(3, p=[0.45, 0.4, 0.15]))
                self.paint(DNA, plane, cell + offset, light)
                self.paint(PARASITE, plane, cell + offset, leak * light)
                self._mark(self.nuclei, cell + offset, shape, least=0.0)
        chromatin = smooth_noise(rng, self.shape, max(0.7 / self.um, 0.7))
        self.planes[:, DNA] *= np.maximum(1 + texture * chromatin, 0.2)

    # --- parasites ---

    def draw_parasites(self, cells: NDArray[np.float64]) -> None:
        """Draw the parasites of the field: anywhere in the cells, sometimes side by side."""
        rng, recipe = self.rng, self.recipe
        if rng.random() < recipe.empty:
            return
        median, contrast = _log_uniform(rng, recipe.median), _log_uniform(rng, recipe.contrast)
        flat, texture = rng.uniform(0.2, 1), rng.uniform(0, 0.35)
        # a field of large parasites has room for fewer
        wanted = rng.uniform(*recipe.parasites) * min(1.0, (15 / median) ** 2)
        number = rng.poisson(max(wanted * self.share, 1.0))
        last: tuple[NDArray[np.float64], float] | None = None
        for _ in range(number):
            diameter = median * np.exp(rng.normal(0, recipe.spread))
            radius = max(np.clip(diameter, recipe.smallest, recipe.largest) / self.um, recipe.least_px) / 2
            shape = blob(rng, radius, stretch=1 + rng.exponential(0.2), wobble=rng.uniform(0, 0.12))
            if last is not None and rng.random() < recipe.touching:
                angle = rng.uniform(0, 2 * np.pi)
                place = last[0] + np.array([np.sin(angle), np.cos(angle)]) * (last[1] + radius) * rng.uniform(
                    0.9, 1.1
                )
            else:
                place = rng.uniform(-radius / 2, np.array(self.shape) + radius / 2)
            if self._mark(self.parasites, place, shape, least=0.7):
                self._light_parasite(place, shape, contrast * np.exp(rng.normal(0, 0.35)), flat, texture)
            last = place, radius

    def _light_parasite(
        self, place: NDArray[np.float64], shape: Blob, contrast: float, flat: float, texture: float
    ) -> None:
        """Draw its cytoplasm, with vacuoles and the grain of its organelles, and its nuclei."""
        rng, um = self.rng, self.um
        light = shape.thickness(flat) * contrast
        light *= np.maximum(1 + texture * smooth_noise(rng, light.shape, rng.uniform(0.7, 1.8) / um), 0.1)
        hollow = np.zeros_like(light)
        for _ in range(rng.poisson(0.7)):
            hole = shape.radius * rng.uniform(0.1, 0.35)
            dark = spots(rng, shape.rho < 0.7, 1, max(hole / 1.5, 0.7), 0.0)
            hollow = np.maximum(
                hollow, np.minimum(dark / max(float(dark.max()), 1e-6), 1) * rng.uniform(0.2, 0.9)
            )
        if rng.random() < 0.12:  # the parasitophorous vacuole stains, its content less
            hollow = np.maximum(hollow, np.exp(-((shape.rho / 0.6) ** 4)) * rng.uniform(0.2, 0.7))
        # small ones far from focus can't be seen at all, by nobody
        plane = int(rng.choice(3, p=[0.55, 0.38, 0.07] if shape.radius * um > 4 else [0.7, 0.3, 0]))
        self.paint(PARASITE, plane, place, light * (1 - hollow))
        many = max(1, int((2 * shape.radius * um / 3.5) ** 2 * rng.uniform(0.5, 1.5)))
        dna = spots(rng, shape.rho < 0.9, min(many, 400), max(0.45 / um, 0.6))
        self.paint(DNA, plane, place, dna * rng.uniform(0.3, 4))

    def _mark(
        self, labels: NDArray[np.int32], place: NDArray[np.float64], shape: Blob, *, least: float
    ) -> bool:
        """Give what is still free of a shape the next label, if that is a share of `least`; tell whether it was."""
        box = box_at(place, shape.rho.shape[0], self.shape)
        if box is None:
            return True  # outside: its light may reach in
        inside = shape.inside[box[1]]
        free = inside & (labels[box[0]] == 0)
        if free.sum() < least * inside.sum():
            return False
        if free.sum() >= 6:
            labels[box[0]][free] = labels.max() + 1
        return True

    # --- what looks like a parasite ---

    def draw_look_alikes(self, cells: NDArray[np.float64]) -> None:
        """Draw debris, dead cells, granules of lipofuscin, fibres, specks, and holes in the layer of cells."""
        rng = self.rng
        kinds = (
            self._debris,
            self._dead_cell,
            self._granules,
            self._pyknotic,
            self._fibre,
            self._haze,
            self._hole,
        )
        often = np.array([0.25, 0.25, 0.2, 0.1, 0.05, 0.1, 0.05])
        for kind in rng.choice(
            len(kinds), rng.poisson(rng.uniform(*self.recipe.look_alikes) * self.share), p=often
        ):
            near = cells[rng.integers(len(cells))] if len(cells) else np.array(self.shape) / 2
            kinds[kind](near + rng.normal(0, 4 / self.um, 2))
        specks = rng.poisson(rng.uniform(0, 6) * self.share)
        drawn = spots(rng, np.ones(self.shape, np.bool_), specks, 0.6, 0.8)
        self.planes[0, PARASITE] += drawn * np.float32(_log_uniform(rng, (0.5, 8)))

    def _ragged(self, radius_um: float, bite: float) -> tuple[Floats, Blob]:
        """Return a clump with a torn outline and an uneven inside, and the shape it was torn from."""
        rng = self.rng
        shape = blob(rng, radius_um / self.um, stretch=1 + rng.exponential(0.6), wobble=0.3)
        grain = smooth_noise(rng, shape.rho.shape, max(radius_um * rng.uniform(0.1, 0.35) / self.um, 0.8))
        kept = np.clip((1 - shape.rho) * 3 + bite * grain, 0, 1)
        light: Floats = (kept * np.maximum(1 + 0.5 * grain, 0.05)).astype(np.float32)
        return light, shape

    def _debris(self, place: NDArray[np.float64]) -> None:
        """A clump of membranes above the layer: large, out of focus, in both channels."""
        light, _ = self._ragged(_log_uniform(self.rng, (4, 30)), self.rng.uniform(0.15, 1))
        self.paint(PARASITE, int(self.rng.choice([1, 2])), place, light * _log_uniform(self.rng, (1, 16)))
        self.paint(DNA, 2, place, light * self.rng.uniform(0, 4))

    def _dead_cell(self, place: NDArray[np.float64]) -> None:
        """A shrunken, coarsely granular cell, with what is left of its DNA in it."""
        light, shape = self._ragged(self.rng.uniform(3.5, 9), 1.6)
        grains = spots(self.rng, shape.rho < 0.9, int(self.rng.integers(3, 15)), max(0.7 / self.um, 0.6))
        glow = _log_uniform(self.rng, (1, 12))
        self.paint(PARASITE, int(self.rng.choice([0, 1])), place, glow * (light * 0.6 + grains))
        scraps = spots(self.rng, shape.rho < 0.8, int(self.rng.integers(1, 8)), max(0.9 / self.um, 0.7))
        rest: Floats = (scraps + 0.3 * light) * np.float32(self.rng.uniform(2, 10))
        self.paint(DNA, 0, place, rest)

    def _granules(self, place: NDArray[np.float64]) -> None:
        """Lipofuscin: a cloud of fine grains that shine by themselves, dense at one side of a nucleus."""
        shape = blob(self.rng, self.rng.uniform(3, 12) / self.um, stretch=self.rng.uniform(1, 2), wobble=0.3)
        grains = spots(self.rng, shape.inside, int(self.rng.integers(5, 60)), max(0.45 / self.um, 0.5), 0.6)
        self.paint(PARASITE, int(self.rng.choice([0, 1])), place, grains * _log_uniform(self.rng, (0.3, 4)))

    def _pyknotic(self, place: NDArray[np.float64]) -> None:
        """A shrunken nucleus, very bright in its own channel, that shines through into the other."""
        shape = blob(
            self.rng, self.rng.uniform(1.5, 3.5) / self.um, stretch=self.rng.uniform(1, 1.4), wobble=0.1
        )
        light = shape.thickness(0.5) * _log_uniform(self.rng, (10, 40))
        self.paint(DNA, 0, place, light)
        self.paint(PARASITE, 0, place, light * self.rng.uniform(0, 0.15))

    def _fibre(self, place: NDArray[np.float64]) -> None:
        """A thread of lint, longer than any parasite."""
        shape = blob(self.rng, self.rng.uniform(5, 12) / self.um, stretch=self.rng.uniform(8, 20), wobble=0.1)
        self.paint(
            PARASITE, int(self.rng.choice(3)), place, shape.thickness(0.6) * _log_uniform(self.rng, (1, 10))
        )

    def _haze(self, place: NDArray[np.float64]) -> None:
        """Light of something far out of focus: no outline anywhere."""
        shape = blob(self.rng, self.rng.uniform(10, 40) / self.um, stretch=self.rng.uniform(1, 2), wobble=0.2)
        light = np.exp(-2 * shape.rho**2).astype(np.float32)
        self.paint(PARASITE, 2, place, light * _log_uniform(self.rng, (0.3, 4)))

    def _hole(self, place: NDArray[np.float64]) -> None:
        """No cells: darker than all around."""
        shape = blob(self.rng, self.rng.uniform(5, 20) / self.um, stretch=1.5, wobble=0.4)
        if box := box_at(place, shape.rho.shape[0], self.shape):
            self.planes[:, :, box[0][0], box[0][1]] *= 1 - 0.8 * shape.thickness(1.0)[box[1]]
