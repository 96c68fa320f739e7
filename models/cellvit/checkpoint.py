"""Load CellViT's published checkpoint files as they are, and write such files.

A file is what upstream's trainer saved: a dict of `arch` (the network's class), `config` (flat, dotted keys)
and `model_state_dict`; whatever else lies in it (optimizer, run names) is not used. The weights' licence is
not ours: see README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsitk.errors import ModelError
from wsitk.model import ObjectClass
from wsitk.models.cellvit.config import VARIANTS, CellViTConfig
from wsitk.models.cellvit.network import CellViT, empty_network
from wsitk.torchfile import TensorFile, checked_state, read_tensors
from wsitk.writers.base import atomic_file

__all__ = [
    "CheckpointInfo",
    "PANNUKE",
    "is_ours",
    "load_checkpoint",
    "object_classes",
    "save_upstream_checkpoint",
]

PANNUKE = (
    ObjectClass("Neoplastic", (255, 0, 0)),
    ObjectClass("Inflammatory", (34, 221, 77)),
    ObjectClass("Connective", (35, 92, 236)),
    ObjectClass("Dead", (254, 255, 0)),
    ObjectClass("Epithelial", (255, 159, 68)),
)
"""PanNuke's nucleus classes 1 to 5 (Gamper 2020) in upstream's colours."""

PALETTE = (
    *(c.color for c in PANNUKE),
    (160, 70, 220),
    (0, 200, 200),
    (150, 95, 45),
    (245, 120, 190),
    (120, 120, 120),
)
"""Colours of classes that no palette names; they repeat after ten."""

VARIANT_BY_ARCH = {
    ("CellViT256", None): "CellViT-256",
    ("CellViTSAM", "SAM-B"): "CellViT-SAM-B",
    ("CellViTSAM", "SAM-L"): "CellViT-SAM-L",
    ("CellViTSAM", "SAM-H"): "CellViT-SAM-H",
    ("CellViTUNI", None): "CellViT-UNI",
    ("CellViTVirchow", None): "CellViT-Virchow",
    ("CellViTVirchow2", None): "CellViT-Virchow2",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes
    ----------
    path, sha256
        The file and its identity.
    arch, variant
        Upstream's class name, and our name of the variant ("CellViT" for the generic one).
    config
        The network's architecture.
    classes
        Nucleus classes of the type map's channels 1, 2, …; channel 0 is background.
    mean, std
        Normalisation of RGB in 0 to 1.
    spacing_um
        Pixel size at which it was trained: 0.25, or 0.5 for the checkpoints trained at 20x.
    magnification
        The objective it names, if it does; post-processing has settings for 40 and 20.
    mixed_precision
        Whether it was trained, and is run upstream, in half precision.
    """

    path: Path
    sha256: str
    arch: str
    variant: str
    config: CellViTConfig
    classes: tuple[ObjectClass, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    spacing_um: float
    magnification: int | None
    mixed_precision: bool


def is_ours(file: TensorFile) -> bool:
    """Return whether a file is a checkpoint of CellViT's training, or names itself one."""
    named = str(file.meta.get("arch", "")).startswith("CellViT")
    return named or any(n.startswith("nuclei_binary_map_decoder.") for n in file.tensors)


def load_checkpoint(path: str | Path) -> tuple[CellViT, CheckpointInfo]:
    """Return the network of a published checkpoint, in evaluation mode, float32, on the CPU, and its facts.

    Raises ModelError: WSI301 (the weights are not that network's), WSI302 (the file asks for imports),
    WSI303 (unreadable), WSI304 (unknown architecture or configuration), WSI306 (claims more data than it
    has), WSI307 (entries that are no finite numbers).
    """
    file = read_tensors(path)
    info = _describe(file)
    network = empty_network(info.config)
    network.load_state_dict(checked_state(file, network.state_dict()), strict=True, assign=True)
    return network.eval(), info


def save_upstream_checkpoint(
    path: str | Path,
    network: nn.Module,
    *,
    classes: Sequence[ObjectClass] = PANNUKE,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    magnification: int = 40,
    mixed_precision: bool = False,
    config: Mapping[str, str | int | float | bool] | None = None,
    epoch: int = 0,
    overwrite: bool = False,
) -> None:
    """Write `network` as upstream's trainer does, so that upstream's tools and `load_checkpoint` read it.

    The file is a `torch.save` dict of `arch`, `epoch`, `config` and `model_state_dict`, plain values and
    tensors only, in the network's precision; optimizer states are not in it. `classes` are those of the type
    map's channels 1, 2, …; `magnification` is 40 (0.25 µm/px) or 20 (0.5); `config` adds flat, dotted keys of
    one's own. Raises ModelError: WSI315 (upstream has no such architecture, or the weights hold more or other
    than it), WSI316 (classes or magnification that the file can't say), WSI307 (weights that are not
    finite); OutputError as `atomic_file` does.
    """
    arch, described = _upstream_architecture(network)
    settings = {
        **(config or {}),
        **described,
        **_upstream_data(network, classes, magnification),
        "training.mixed_precision": mixed_precision,
        "transformations.normalize.mean": [float(v) for v in mean],
        "transformations.normalize.std": [float(v) for v in std],
    }
    state = _upstream_state(network)
    content = {"arch": arch, "epoch": epoch, "config": settings, "model_state_dict": state}
    with atomic_file(path, overwrite=overwrite) as file:
        torch.save(content, file)


def _upstream_architecture(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return upstream's class of a network, and the settings from which upstream builds it."""
    if not isinstance(network, CellViT):
        raise ModelError(
            "WSI315",
            f"a {type(network).__name__} has no architecture in upstream's tools, only a CellViT network has; "
            "keep wsitk's own format (safetensors and a card)",
        )
    own = network.config
    bare = replace(own, nuclei_classes=6, tissue_classes=19, regression=False, dropout=0.0)
    for (arch, backbone), variant in VARIANT_BY_ARCH.items():
        if VARIANTS[variant] == bare:
            return arch, {} if backbone is None else {"model.backbone": backbone}
    plain = CellViTConfig("dino", own.embed_dim, own.depth, own.num_heads, own.extract_layers)
    if replace(bare, input_channels=3) != plain:
        raise ModelError(
            "WSI315",
            f"upstream has no architecture for {own}; wanted a published variant or a plain ViT with patches "
            "of 16; keep wsitk's own format (safetensors and a card)",
        )
    numbers = ("embed_dim", "depth", "num_heads", "input_channels")
    described = {f"model.{name}": getattr(own, name) for name in numbers}
    return "CellViT", described | {"model.extract_layers": list(own.extract_layers)}


def _upstream_data(
    network: nn.Module, classes: Sequence[ObjectClass], magnification: int
) -> dict[str, str | int | bool]:
    """Return the settings that say what the channels mean."""
    assert isinstance(network, CellViT)  # as _upstream_architecture found
    own, names = network.config, ["Background", *(c.name for c in classes)]
    if len(set(names)) != own.nuclei_classes:
        got = f"{len(set(names)) - 1} different classes for a type map of {own.nuclei_classes - 1}"
        raise ModelError("WSI316", f"{got} (and background); name each class once")
    # Upstream cuts keys at dots, so such a name would come back as a folder of names.
    if dotted := [name for name in names if "." in name or not name]:
        raise ModelError("WSI316", f"class {dotted[0]!r}: upstream allows no dot in a name; rename it")
    if magnification not in (20, 40):
        raise ModelError("WSI316", f"magnification is {magnification}, wanted 40 (0.25 µm/px) or 20 (0.5)")
    return {
        "data.num_nuclei_classes": own.nuclei_classes,
        "data.num_tissue_classes": own.tissue_classes,
        "data.magnification": magnification,
        "model.regression_loss": own.regression,
        **{f"dataset_config.nuclei_types.{name}": channel for channel, name in enumerate(names)},
    }


def _upstream_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights on the CPU once they prove to be those of a plain network, each in its own memory."""
    assert isinstance(network, CellViT)  # as _upstream_architecture found
    state, wanted = network.state_dict(), empty_network(network.config).state_dict()
    odd = [n for n in {**wanted, **state} if n not in state or n not in wanted]
    if odd:
        raise ModelError(
            "WSI315",
            f"{len(odd)} entries are not those of a plain CellViT ({', '.join(map(repr, odd[:3]))}); merge "
            "adapters into the weights before saving",
        )
    bad = next((n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if bad is not None:
        raise ModelError("WSI307", f"{bad!r} has values that are not finite; not saved")
    return {name: _whole(value) for name, value in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor alone in its memory: a view would take all that it is a view of into the file."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def object_classes(names: Mapping[int, str], count: int, first: int = 1) -> tuple[ObjectClass, ...]:
    """Return the classes `first` to ``count - 1``; one without a name is called 'class N'."""
    known = {c.name: c.color for c in PANNUKE}
    chosen = [(i, names.get(i, f"class {i}")) for i in range(first, count)]
    return tuple(ObjectClass(n, known.get(n, PALETTE[(i - first) % len(PALETTE)])) for i, n in chosen)


def _describe(file: TensorFile) -> CheckpointInfo:
    arch, config = file.meta.get("arch"), file.meta.get("config")
    if not isinstance(arch, str) or not isinstance(config, Mapping):
        found = ", ".join(map(repr, list(file.meta)[:6]))
        raise ModelError(
            "WSI304", f"{file.path} names no arch and config (it holds: {found}); wanted a CellViT checkpoint"
        )
    settings = _Settings(file.path, config)
    try:
        variant, network = _architecture(arch, settings)
    except ValueError as error:
        raise ModelError("WSI304", f"{file.path}: {error}; is it a CellViT checkpoint?") from error
    magnification = settings.integer("data.magnification", 0) or None
    return CheckpointInfo(
        path=file.path,
        sha256=file.sha256,
        arch=arch,
        variant=variant,
        config=network,
        classes=_classes(settings, network.nuclei_classes),
        mean=settings.triple("transformations.normalize.mean", 0.5),
        std=settings.triple("transformations.normalize.std", 0.5),
        spacing_um=0.5 if magnification == 20 else 0.25,
        magnification=magnification,
        mixed_precision=bool(settings.get("training.mixed_precision", False)),
    )


def _architecture(arch: str, settings: _Settings) -> tuple[str, CellViTConfig]:
    if arch == "CellViT":
        variant, base = arch, _generic(settings)
    else:
        backbone = settings.get("model.backbone") if arch == "CellViTSAM" else None
        found = VARIANT_BY_ARCH.get((arch, backbone if isinstance(backbone, str) else None))
        if found is None:
            known = ", ".join(sorted({"CellViT", *(name for name, _ in VARIANT_BY_ARCH)}))
            what = f"{arch[:80]!r}" + (f" with backbone {backbone!r}" if arch == "CellViTSAM" else "")
            raise ModelError(
                "WSI304", f"{settings.path} is a {what}; wanted one of {known} (SAM-B, SAM-L or SAM-H)"
            )
        variant, base = found, VARIANTS[found]
    return variant, replace(
        base,
        nuclei_classes=settings.integer("data.num_nuclei_classes"),
        tissue_classes=settings.integer("data.num_tissue_classes"),
        regression=bool(settings.get("model.regression_loss", False)),
    )


def _generic(settings: _Settings) -> CellViTConfig:
    layers = settings.get("model.extract_layers")
    if not isinstance(layers, list | tuple) or [type(n) for n in layers] != [int] * 4:
        raise settings.refusal("model.extract_layers", layers, "four block numbers")
    return CellViTConfig(
        family="dino",
        embed_dim=settings.integer("model.embed_dim"),
        depth=settings.integer("model.depth"),
        num_heads=settings.integer("model.num_heads"),
        extract_layers=(layers[0], layers[1], layers[2], layers[3]),
        input_channels=settings.integer("model.input_channels", 3),
    )


def _classes(settings: _Settings, count: int) -> tuple[ObjectClass, ...]:
    """Return the classes of `dataset_config.nuclei_types` (name -> channel), or PanNuke's if it is silent."""
    named = settings.below("dataset_config.nuclei_types.")
    if not named and count == len(PANNUKE) + 1:
        return PANNUKE
    names: dict[int, str] = {}
    for name, channel in named.items():
        if type(channel) is not int or not 0 <= channel < count or channel in names:
            key = f"dataset_config.nuclei_types.{name}"
            raise settings.refusal(key, channel, f"a channel of its own, 0 to {count - 1}")
        names[channel] = name
    return object_classes(names, count)


class _Settings:
    """A checkpoint's flat configuration, read with types."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = {str(key): value for key, value in values.items()}

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def below(self, prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): v for key, v in self._values.items() if key.startswith(prefix)}

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(key, value, "a whole number")
        return value

    def triple(self, key: str, default: float) -> tuple[float, float, float]:
        value = self._values.get(key, (default,) * 3)
        numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
        if not numbers or len(value) != 3:
            raise self.refusal(key, value, "three numbers")
        return float(value[0]), float(value[1]), float(value[2])

    def refusal(self, key: str, got: Any, wanted: str) -> ModelError:
        what = f"config {key[:80]!r} is {str(got)[:80]!r}, wanted {wanted}"
        return ModelError("WSI304", f"{self.path}: {what}; is it a CellViT checkpoint?")
