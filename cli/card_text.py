"""A model card as a page of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wsitk.card import Card

__all__ = ["card_text"]

WIDTH = 100
LABEL = 11


def card_text(card: Card, verified: bool | None) -> str:
    """Return everything that a card says, for reading in a terminal."""
    parts = [_head(card, verified), *_sections(card)]
    return "\n\n".join("\n".join(part) for part in parts)


def _head(card: Card, verified: bool | None) -> list[str]:
    content = card.content
    spacing = f"{content['spacing_um']} µm" if "spacing_um" in content else "any"
    return [
        f"{card.name} {card.version}",
        *_item("", content["summary"], indent=0),
        *_item("use", content["use"]),
        *_item("classes", ", ".join(c["name"] for c in content["classes"])),
        *_item("pixel size", spacing),
        *_item("licence", f"{content['licence']}; data: {content['data_licence']}"),
        *_item("cite", content.get("cite", content["paper"])),
        *(_item("paper", content["paper"]) if "cite" in content else []),
        *_weights(card, verified),
    ]


def _weights(card: Card, verified: bool | None) -> list[str]:
    """Return what is said of the weights: those beside the card, or where others publish them."""
    content = card.content
    parameters = f"{content['parameters']:,} parameters"
    if not card.shipped:
        official = content["official"]
        where = f"{official['file']}; {parameters}; not shipped: {official['link']}"
        return [*_item("weights", where), *_item("", official.get("note", ""))]
    said = {True: "verified", False: "NOT THE ONE ON DISK", None: "not verified: the file is not there"}
    size = f"{content['weights']}, {content['size_bytes'] / 1e6:.1f} MB, {parameters}"
    return [*_item("weights", size), *_item("sha256", f"{card.sha256}, {said[verified]}")]


def _sections(card: Card) -> Iterator[list[str]]:
    content = card.content
    yield ["Trained on", *(line for each in content["training_data"] for line in _origin(each))]
    if started := content.get("started_from"):
        yield ["Started from", *(line for each in started for line in _origin(each))]
    if training := content.get("training"):
        yield ["Training", *_training(training)]
    if measured := content.get("measured"):
        yield ["Measured", *_measured(measured)]
    failures = content["known_failures"]
    label = max(map(len, failures)) + 1
    lines = (line for name, text in failures.items() for line in _item(name, text, label=label))
    yield ["Known failures", *lines]
    if cases := content.get("failure_cases"):
        yield ["Pictures of failures", *(line for case in cases for line in _case(case, card.path.parent))]
    for name, title in (
        ("network", "Network"),
        ("normalisation", "Normalisation"),
        ("postprocessing", "Post-processing"),
    ):
        if settings := content.get(name):
            yield [title, *_item("", ", ".join(f"{k} {_short(v)}" for k, v in settings.items()))]


def _origin(each: Mapping[str, Any]) -> list[str]:
    facts = [f"labels {each['labels']}"] if "labels" in each else []
    facts += [f"{each[k]:,} {k}" for k in ("images", "objects") if k in each]
    facts += [f"licence {each['licence']}", *(each[k] for k in ("note", "link") if k in each)]
    return _item("-", f"{each['name']}: {'; '.join(facts)}", label=2)


def _training(training: Mapping[str, Any]) -> Iterator[str]:
    yield from _item("time", f"{training['hours']} h on {training['hardware']}")
    yield from _item("energy", f"{training['energy_kwh']} kWh, {training['energy_from']}")
    told = ("hours", "hardware", "energy_kwh", "energy_from")
    for name, value in training.items():
        if name not in told:
            yield from _item(name, _short(value))


def _measured(measured: Mapping[str, Any]) -> Iterator[str]:
    for name in ("definition", "script"):
        if name in measured:
            yield from _item(name, measured[name])
    for name, figures in measured.items():
        if isinstance(figures, Mapping):
            yield f"  {name}"
            yield from _item("", _figures(figures), indent=4)
            for word, value in figures.items():
                if word == "per_class":
                    for kind, inner in value.items():
                        yield from _item("", f"{kind}: {_figures(inner)}", indent=4)
                elif isinstance(value, str):
                    yield from _item("", f"{word}: {value}", indent=4)


def _figures(figures: Mapping[str, Any]) -> str:
    """Return figures in one line, each with its 95 % interval where it has one; then counts."""
    parts = []
    for name, value in figures.items():
        if name.endswith("_ci95") or name == "per_class" or isinstance(value, str):
            continue
        if isinstance(value, Mapping):
            parts.append(f"{name} ({', '.join(f'{k} {v:,}' for k, v in value.items())})")
            continue
        interval = figures.get(f"{name}_ci95")
        between = f" (95 %: {_short(interval[0])} to {_short(interval[1])})" if interval else ""
        parts.append(f"{name} {_short(value)}{between}")
    return ", ".join(parts)


def _case(case: Mapping[str, Any], folder: Path) -> list[str]:
    picture = case["picture"] if "://" in case["picture"] else str(folder / case["picture"])
    facts = [case["caption"], *(f"{k} {case[k]}" for k in ("source", "licence") if k in case)]
    # A path is never broken: it is there to be clicked or copied.
    return [*_item("-", "; ".join(facts), label=2), f"    {picture}"]


def _item(name: str, text: str, *, indent: int = 2, label: int = LABEL) -> list[str]:
    """Return a labelled paragraph, broken at spaces, its later lines under the first."""
    head = " " * indent + (f"{name:<{label - 1}} " if name else "")
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * (indent + (label if name else 0)),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
