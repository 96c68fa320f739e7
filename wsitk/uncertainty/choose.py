"""From a model and the settings of a run to the model that is run: itself, or itself asked several times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsitk.errors import UsageError
from wsitk.model import Model, TileModel
from wsitk.registry import load_model
from wsitk.settings import Settings
from wsitk.uncertainty.ensemble import Ensemble
from wsitk.uncertainty.interface import SampledModel
from wsitk.uncertainty.sampling import MonteCarlo, Sampling
from wsitk.uncertainty.views import Views

__all__ = ["sampled"]


def sampled(model: TileModel, settings: Settings, options: Mapping[str, Any] | None = None) -> TileModel:
    """Return `model` wrapped as `settings` ask for; itself where they ask for one sample.

    The members of an ensemble are loaded with the model's `options`. Raises UsageError: WSI601 for a model that can't
    be sampled, WSI609 for settings that contradict each other, and what `MonteCarlo`, `Views` and `Ensemble` raise.
    """
    _check(settings)
    if settings.samples == 1 and not settings.members:
        return model
    whole = _sampled_model(model)
    if settings.uncertainty == "tta":
        return Views(whole, settings.samples)
    if settings.uncertainty == "ensemble":
        others = [load_model(name, **(options or {})) for name in settings.members]
        return Ensemble([whole, *map(_sampled_model, others)])
    return MonteCarlo(
        whole, settings.samples, seed=settings.seed, kind=settings.uncertainty, rate=settings.dropout
    )


def _sampled_model(model: Model) -> SampledModel:
    if isinstance(model, SampledModel):
        return model
    if isinstance(model, Sampling):
        raise UsageError(
            "WSI609", f"{model.spec.name} {model.spec.version} is sampled already; leave samples out"
        )
    raise UsageError(
        "WSI601",
        f"{model.spec.name} gives one answer and can't be sampled: its model is no SampledModel, which says where "
        "chance begins (see docs/how-to/uncertainty.md); leave --samples out",
    )


def _check(settings: Settings) -> None:
    """Refuse what would be ignored (WSI609)."""
    by_dropout = settings.uncertainty not in ("tta", "ensemble")
    count = 1 + len(settings.members)
    wrong = ""
    if settings.samples < 1:
        wrong = f"{settings.samples} samples; 1 is the plain answer, 20 measure its uncertainty"
    elif settings.members and settings.uncertainty != "ensemble":
        wrong = f"{count - 1} further models, but uncertainty {settings.uncertainty!r}; ask for 'ensemble'"
    elif settings.uncertainty == "ensemble" and not settings.members:
        wrong = "an ensemble of one model; name further ones (--member FILE)"
    elif settings.uncertainty == "ensemble" and settings.samples not in (1, count):
        wrong = f"{settings.samples} samples of an ensemble of {count}; leave the samples out"
    elif settings.uncertainty not in ("dropout", "ensemble") and settings.samples == 1:
        wrong = f"uncertainty {settings.uncertainty!r} with one sample; ask for several (--samples 8)"
    elif settings.dropout is not None and (settings.samples == 1 or not by_dropout):
        wrong = f"a rate of dropout ({settings.dropout:g}), but no samples of it; give --samples"
    if wrong:
        raise UsageError("WSI609", f"the settings ask for {wrong}")
