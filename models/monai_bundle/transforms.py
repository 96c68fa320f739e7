"""What a bundle does to its input and output, in terms of `ModelSpec`; whatever has no such term is refused.

MONAI's transforms differ in many arguments. Those that wsitk does itself in any case (loading, types, devices)
are passed over, a few are mapped, and all other names are errors (WSI363): to leave one out would be to run
another model. Axes are x, y, z there and z, y, x here; lengths are millimetres there, micrometres here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, NoReturn

from wsitk.errors import ModelError
from wsitk.models.monai_bundle.config import Config, Unevaluated, refused
from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["Output", "Preparation", "Windows", "output", "preparation", "windows"]

PASSED: Mapping[str, frozenset[str]] = {
    "LoadImage": frozenset({"reader", "dtype", "image_only", "ensure_channel_first", "simple_keys"}),
    "EnsureChannelFirst": frozenset({"channel_dim", "strict_check"}),
    "AddChannel": frozenset(),
    "EnsureType": frozenset({"data_type", "dtype", "device", "track_meta", "wrap_sequence"}),
    "ToTensor": frozenset({"dtype", "device", "wrap_sequence", "track_meta"}),
    "ToDevice": frozenset({"device"}),
    "SaveImage": frozenset({
        "output_dir", "output_postfix", "output_ext", "output_dtype", "resample", "mode", "padding_mode", "scale",
        "dtype", "squeeze_end_dims", "data_root_dir", "separate_folder", "print_log", "meta_keys",
        "meta_key_postfix", "writer", "output_format", "folder_layout", "savepath_in_metadict",
    }),
    "Invert": frozenset({
        "transform", "orig_keys", "meta_keys", "orig_meta_keys", "meta_key_postfix", "nearest_interp", "to_tensor",
        "device", "post_func",
    }),
}  # fmt: skip
"""Transforms that need no counterpart, and their arguments: wsitk reads, writes, and goes back by itself."""

COMMON = frozenset({"_target_", "_desc_", "_disabled_", "keys", "allow_missing_keys", "lazy"})


@dataclass(frozen=True)
class Preparation:
    """What becomes of a volume before the network: spacing (z, y, x), orientation (x, y, z), intensities."""

    spacing_um: tuple[float, ...] | None = None
    orientation: str = ""
    rule: IntensityRule | None = None
    rule_first: bool = False


@dataclass(frozen=True)
class Windows:
    """The sliding window: its size (z, y, x), the share of it that neighbours have in common, its weights."""

    size: tuple[int, ...]
    overlap: float
    weights: Literal["flat", "gaussian"]


@dataclass(frozen=True)
class Output:
    """How logits become labels: the largest wins, or the only one is above `threshold`."""

    kind: Literal["argmax", "threshold"]
    threshold: float = 0.0


class _Arguments:
    """One transform's arguments; what is never asked for, and isn't known to be harmless, is refused at the end."""

    def __init__(
        self, config: Config, where: str, entry: Mapping[str, Any], harmless: frozenset[str]
    ) -> None:
        self._config, self.where = config, where
        self.name = str(entry["_target_"])
        self._left = {k: v for k, v in entry.items() if k not in COMMON | harmless}

    def take(self, name: str, default: Any) -> Any:
        value = self._left.pop(name, default)
        if isinstance(value, Unevaluated):
            raise refused(self._config.path, value.place, value.text)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"{name} = {value!r}", "a number")
        return float(value)

    def numbers(self, name: str) -> list[float]:
        value = self.take(name, None)
        good = isinstance(value, list) and len(value) == 3
        if not good or not all(type(v) in (int, float) and v > 0 for v in value):
            self.refuse(f"{name} = {value!r}", "three numbers above 0")
        return [float(v) for v in value]

    def wants(self, name: str, *allowed: Any) -> None:
        """Refuse any value of an argument but the first of `allowed` (its default) or the others."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            self.refuse(f"{name} = {value!r}", " or ".join(map(repr, allowed)))

    def refuse(self, got: str, wanted: str) -> NoReturn:
        raise _unknown(self._config, self.where, f"{self.name} with {got}", f"wanted {wanted}")

    def done(self) -> None:
        for name, value in self._left.items():
            if value is not None:
                shown = value.text if isinstance(value, Unevaluated) else value
                self.refuse(f"{name} = {shown!r}", "no such argument")


def _unknown(config: Config, where: str, got: str, wanted: str) -> ModelError:
    return ModelError(
        "WSI363",
        f"{config.path}: {where} is {got}; {wanted}: wsitk has no equal of it, and leaves nothing out",
    )


def preparation(config: Config, channels: int) -> Preparation:
    """Return what ``preprocessing`` asks for. Raises ModelError: WSI363 for what wsitk has no equal of, WSI361."""
    found = Preparation()
    for each in _steps(config, "preprocessing"):
        mapped = _BEFORE.get(_plain(each.name))
        if mapped is not None:
            found = mapped(found, each, channels)
        elif _plain(each.name) not in PASSED:
            raise _unknown(config, each.where, each.name, f"wanted one of {_names(_BEFORE)}")
        each.done()
    return found


def _steps(config: Config, name: str) -> list[_Arguments]:
    """Return the transforms of a ``Compose``, or of a list, those left out that the bundle disables."""
    content = config.value(name)
    where = name
    if isinstance(content, Mapping) and _plain(content.get("_target_")) == "Compose":
        content, where = content.get("transforms"), f"{name}#transforms"
    if isinstance(content, Unevaluated):
        raise refused(config.path, content.place, content.text)
    if content is None:
        content = []
    if not isinstance(content, list):
        raise _unknown(config, where, f"a {type(content).__name__}", "wanted a list of transforms")
    steps = []
    for index, entry in enumerate(content):
        place = f"{where}#{index}"
        if isinstance(entry, Unevaluated):
            raise refused(config.path, entry.place, entry.text)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
            raise _unknown(config, place, repr(entry)[:60], "wanted a transform with a _target_")
        if entry.get("_disabled_") not in (None, False, True):
            raise _unknown(config, place, f"_disabled_ = {entry['_disabled_']!r}", "wanted true or false")
        if entry.get("_disabled_"):
            continue
        keys = entry.get("keys", "image")
        if not isinstance(keys, str) and not (isinstance(keys, list) and len(keys) == 1):
            raise _unknown(config, place, f"{entry['_target_']} of keys {keys!r}", "wanted one key")
        steps.append(_Arguments(config, place, entry, PASSED.get(_plain(entry["_target_"]), frozenset())))
    return steps


def _plain(target: Any) -> str:
    """Return a transform's name without its package (MONAI's alone) and without the d of dictionaries."""
    name = str(target)
    if name.startswith("monai.transforms."):
        name = name.rpartition(".")[2]
    for ending in ("Dict", "D", "d"):
        if name.endswith(ending) and name.removesuffix(ending) in {*_BEFORE, *_AFTER, *PASSED}:
            return name.removesuffix(ending)
    return name


def _names(table: Mapping[str, Any]) -> str:
    return ", ".join(sorted(table))


# --- before the network --------------------------------------------------------------------------------


def _orientation(found: Preparation, each: _Arguments, channels: int) -> Preparation:
    codes = each.take("axcodes", None)
    each.wants("as_closest_canonical", False)
    pairs = ("LR", "AP", "SI")
    letters = set(codes) if isinstance(codes, str) else set()
    if len(str(codes)) != 3 or len(letters) != 3 or not all(len(letters & set(p)) == 1 for p in pairs):
        each.refuse(f"axcodes = {codes!r}", "three letters, one of each of LR, AP, SI")
    return replace(found, orientation=codes)


def _spacing(found: Preparation, each: _Arguments, channels: int) -> Preparation:
    pixdim = each.numbers("pixdim")
    each.wants("diagonal", False)
    mode = each.take("mode", "bilinear")
    if (mode[0] if isinstance(mode, list) and len(mode) == 1 else mode) not in ("bilinear", "trilinear", 1):
        each.refuse(f"mode = {mode!r}", "'bilinear'")
    each.wants("padding_mode", "border", "zeros", "reflection")
    each.wants("align_corners", False, True)
    for harmless in ("recompute_affine", "dtype", "ensure_same_shape", "image_only"):
        each.take(harmless, None)
    return replace(found, spacing_um=tuple(1000.0 * p for p in reversed(pixdim)))


def _with(found: Preparation, each: _Arguments, rule: IntensityRule) -> Preparation:
    if found.rule is not None:
        each.refuse("another intensity transform before it", "one of them")
    each.wants("dtype", None, "float32")
    return replace(found, rule=rule, rule_first=found.spacing_um is None)


def _range(found: Preparation, each: _Arguments, channels: int) -> Preparation:
    a_min, a_max = each.number("a_min"), each.number("a_max")
    b_min, b_max = each.number("b_min", 0.0), each.number("b_max", 1.0)
    clip = each.take("clip", False)
    if a_max <= a_min or b_max <= b_min:
        each.refuse(f"{a_min:g}..{a_max:g} to {b_min:g}..{b_max:g}", "ascending ranges")
    scale = (a_max - a_min) / (b_max - b_min)
    low, high = (a_min, a_max) if clip is True else (-inf, inf)
    rule = IntensityRule("ct", shift=a_min - b_min * scale, scale=scale, low=low, high=high)
    return _with(found, each, rule)


def _normalize(found: Preparation, each: _Arguments, channels: int) -> Preparation:
    subtrahend, divisor = each.take("subtrahend", None), each.take("divisor", None)
    # MONAI's mask is what isn't zero, channel by channel; the engine's is filled, and common to all channels
    each.wants("nonzero", False)
    each.wants("channel_wise", *((False, True) if channels == 1 else (True,)))
    if subtrahend is None and divisor is None:
        return _with(found, each, IntensityRule("zscore"))
    if type(subtrahend) not in (int, float) or type(divisor) not in (int, float) or divisor <= 0:
        each.refuse(f"subtrahend = {subtrahend!r}, divisor = {divisor!r}", "two numbers, or neither")
    return _with(found, each, IntensityRule("ct", shift=float(subtrahend), scale=float(divisor)))


def _scale(found: Preparation, each: _Arguments, channels: int) -> Preparation:
    each.wants("minv", 0.0)
    each.wants("maxv", 1.0)
    each.wants("factor", None)
    each.wants("channel_wise", *((False, True) if channels == 1 else (True,)))
    return _with(found, each, IntensityRule("unit"))


_Mapping = Callable[[Preparation, _Arguments, int], Preparation]

_BEFORE: Mapping[str, _Mapping] = {
    "Orientation": _orientation,
    "Spacing": _spacing,
    "ScaleIntensityRange": _range,
    "NormalizeIntensity": _normalize,
    "ScaleIntensity": _scale,
}


# --- windows -------------------------------------------------------------------------------------------

INFERERS = ("SlidingWindowInferer", "SlidingWindowInfererAdapt")


def windows(config: Config) -> Windows:
    """Return what ``inferer`` asks for. Raises ModelError: WSI363 for any but a sliding window, WSI361."""
    entry = config.value("inferer")
    if isinstance(entry, Unevaluated):
        raise refused(config.path, entry.place, entry.text)
    target = str(entry.get("_target_")) if isinstance(entry, Mapping) else repr(entry)
    if target.removeprefix("monai.inferers.") not in INFERERS:
        raise _unknown(config, "inferer", target, f"wanted {INFERERS[0]}")
    harmless = frozenset({
        "sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps",
        "buffer_dim",
    })  # fmt: skip
    each = _Arguments(config, "inferer", entry, harmless)
    size = each.numbers("roi_size")
    overlap = each.number("overlap", 0.25)
    mode = each.take("mode", "constant")
    if mode not in ("constant", "gaussian") or not 0 <= overlap < 1 or any(n != int(n) for n in size):
        each.refuse(
            f"mode = {mode!r}, overlap = {overlap:g}, roi_size = {size}", "whole windows, overlap below 1"
        )
    each.wants("sigma_scale", 0.125)
    each.wants("padding_mode", "constant")
    each.wants("cval", 0.0)
    each.wants("with_coord", False)
    each.done()
    weights: Literal["flat", "gaussian"] = "flat" if mode == "constant" else "gaussian"
    return Windows(tuple(int(n) for n in reversed(size)), overlap, weights)


# --- after the network ---------------------------------------------------------------------------------

_AFTER = frozenset({"Activations", "AsDiscrete"})


def output(config: Config, channels: int) -> Output:
    """Return what ``postprocessing`` makes of `channels` logits; without any, the largest wins.

    Raises ModelError: WSI363 for what wsitk has no equal of, WSI361.
    """
    sigmoid, discrete = False, ""
    threshold = 0.5
    for each in _steps(config, "postprocessing"):
        name = _plain(each.name)
        if name == "Activations":
            sigmoid = bool(each.take("sigmoid", False))
            each.wants("softmax", False, True)
            each.wants("other", None)
        elif name == "AsDiscrete":
            if each.take("argmax", False) is True:
                discrete = "argmax"
            value = each.take("threshold", None)
            if value is not None and value is not False:
                discrete, threshold = "threshold", float(value)
            for harmless in ("to_onehot", "rounding"):
                each.wants(harmless, None, False)
        elif name not in PASSED:
            raise _unknown(config, each.where, each.name, f"wanted one of {_names(dict.fromkeys(_AFTER))}")
        each.done()
    if discrete != "threshold" and not sigmoid and channels > 1:
        return Output("argmax")
    if channels == 1 and sigmoid and discrete == "threshold" and threshold == 0.5:
        # logits are averaged, as MONAI does; half a probability is a logit of 0
        return Output("threshold", 0.0)
    raise _unknown(
        config, "postprocessing", f"{channels} outputs, sigmoid {sigmoid}, {discrete or 'no labels'}",
        "wanted argmax of several, or a sigmoid above 0.5 of one",
    )  # fmt: skip
