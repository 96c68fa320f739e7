"""What a CellViT training depends on, as data: `recipes` holds the tables to start from, one TOML file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from wsitk.errors import UsageError
from wsitk.models.cellvit.training.lora import LoraConfig
from wsitk.training.config import from_table, merged, override, read_toml
from wsitk.training.settings import FitConfig

__all__ = ["CardConfig", "DataConfig", "NetworkConfig", "TrainConfig", "read_config", "recipe_names"]

Table = Mapping[str, object]


@dataclass(frozen=True)
class NetworkConfig:
    """What is trained, from which weights, and which part of it.

    Attributes
    ----------
    arch
        ``compact``, or one of `config.VARIANTS`.
    start
        Weights to start from: a name that `wsitk models list` knows, a folder that wsitk wrote, an official
        CellViT checkpoint, or a pretrained encoder (MobileSAM for ``compact``, HIPT's ViT-256, SAM); empty
        for random ones.
    types
        Whether nuclei are typed; None for wherever the data name classes.
    learn
        ``all``, ``decoder`` (the encoder stays as it is) or ``lora`` (adapters in the encoder, and the decoder).
    thaw
        First epoch in which the encoder learns.
    encoder_rate
        Factor of the learning rate for the encoder.
    lora
        The adapters; see `lora.LoraConfig`.
    dropout
        Rate in the decoder of the published variants; ``compact`` has its own.
    """

    arch: str = "compact"
    start: str = ""
    types: bool | None = None
    learn: Literal["all", "decoder", "lora"] = "all"
    thaw: int = 0
    encoder_rate: float = 1.0
    dropout: float = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are drawn and changed.

    Attributes
    ----------
    spacing_um, crop, batch
        Micrometres per pixel, side in pixels, and number of crops of a batch (over all processes).
    epoch_crops
        Crops that make an epoch; 0 for as many as there are images.
    classes, rename
        Names to learn (empty for all that occur), and other names of the same thing.
    shares
        How often each set is drawn, in the order of the sets; empty for by their number of images.
    sampling, gamma
        ``plain``, or by rarity of ``cells``, of ``tissue`` or of both (``cell+tissue``); from 0 (as they come)
        to 1 (all equally often).
    fixed_counts
        Whether, for PanNuke's classes, rarity is reckoned from the numbers of the paper's runs instead of the data's.
    mosaic
        Share of crops that are put together from four.
    augment
        ``none``, ``paper`` or ``stain``; or a table of ``recipe`` and the fields of `augment.Recipe` to change.
    convention
        Of the distance maps, see `targets.hv_target`.
    held_out
        Share of the groups (slides, patients) that nothing is learned from, or their names.
    held_out_images
        Largest number of held-out images that a validation looks at; 0 for all.
    cache
        Whether to keep images in memory.
    mpp
        Pixel size of images that state none.
    """

    spacing_um: float = 0.25
    crop: int = 256
    batch: int = 16
    epoch_crops: int = 0
    classes: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    sampling: Literal["plain", "cell", "tissue", "cell+tissue"] = "plain"
    gamma: float = 0.85
    fixed_counts: bool = False
    mosaic: float = 0.0
    augment: str | Table = field(default_factory=dict)
    convention: Literal["upstream", "centred"] = "centred"
    held_out: float = 0.1
    held_out_groups: tuple[str, ...] = ()
    held_out_images: int = 64
    cache: bool = True
    mpp: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, wanted a share of the groups below 1")
        for name in ("crop", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        if not 0 <= self.mosaic <= 1:
            raise ValueError(f"mosaic is {self.mosaic}, wanted a share from 0 to 1")
        if not 0.05 <= self.spacing_um <= 20:
            raise ValueError(f"spacing_um is {self.spacing_um}, wanted 0.05 to 20")


@dataclass(frozen=True)
class CardConfig:
    """What the card of the result says that the trainer cannot know."""

    name: str = "my-cellvit"
    version: str = "0.1.0"
    summary: str = "Nuclei in H&E, trained with wsitk."
    licence: str = "not stated"
    data_licence: str = "not stated"
    labels: str = "not stated"
    watts: float = 100.0


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training. `loss` is a table for `losses.LossWeights.from_mapping`.

    `fam` is the strength of the flatness penalty on the binary branch's last layer (`training.flatness`),
    ``auto``, or None for none. `postprocessing` is what the card tells those who run the model.
    """

    recipe: str = "compact"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: Table = field(default_factory=dict)
    fam: float | Literal["auto"] | None = None
    fit: FitConfig = field(default_factory=FitConfig)
    postprocessing: Table = field(default_factory=dict)
    card: CardConfig = field(default_factory=CardConfig)


def recipe_names() -> list[str]:
    """Return the recipes that come with wsitk."""
    folder = files(__package__) / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def read_config(path: Path | None = None, settings: Sequence[str] = (), recipe: str = "") -> TrainConfig:
    """Return the settings of `path` and ``section.key=value`` on top of the recipe that they name.

    Raises UsageError WSI860 to WSI863, naming the setting; WSI869 for an unknown recipe.
    """
    own = override(read_toml(path) if path is not None else {}, settings)
    if recipe:
        own["recipe"] = recipe
    name = own.get("recipe", "compact")
    if name not in recipe_names():
        raise UsageError("WSI869", f"there is no recipe {name!r}, wanted one of {', '.join(recipe_names())}")
    below: dict[str, Any] = read_toml(Path(str(files(__package__) / "recipes" / f"{name}.toml")))
    return from_table(TrainConfig, merged(below, own))
