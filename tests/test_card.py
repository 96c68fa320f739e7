"""Model cards: those that ship are whole, wrong ones are refused by field, and `models show` tells all."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from wsitk.card import card_problems, read_card, write_card
from wsitk.cli.card_text import card_text
from wsitk.cli.models import app
from wsitk.errors import ModelError, OutputError

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "models").rglob("*card.toml"))
PAGE = ROOT / "docs" / "how-to" / "model-card.md"
EXAMPLE = tomllib.loads(re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)[0])


def changed(**fields: Any) -> dict[str, Any]:
    """Return the page's example with other values; None takes a field out."""
    content = copy.deepcopy(EXAMPLE) | fields
    return {k: v for k, v in content.items() if v is not None}


# --- what ships ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.parent.name)
def test_every_card_that_ships_is_whole_and_describes_its_weights(path: Path) -> None:
    card = read_card(path)
    if card.shipped:
        assert card.verified() is True
        assert card.weights.stat().st_size == card.content["size_bytes"]
    else:
        assert "http" in card.content["official"]["link"]
        assert card.verified() is None


def test_there_are_cards_and_the_page_shows_a_right_one_with_every_field() -> None:
    assert CARDS
    assert card_problems(EXAMPLE) == []
    said = PAGE.read_text("utf-8")
    from wsitk import card

    assert all(f"`{name}`" in said or f"[{name}]" in said for name in (*card.MANDATORY, *card.OPTIONAL))
    assert set(card.MANDATORY) | set(card.OPTIONAL) == set(EXAMPLE)


# --- what is refused -----------------------------------------------------------------------------------

FIGURES = {"definition": "d"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"licence": None}, "'licence' is missing"),
        ({"licnece": "MIT"}, "'licnece' is unknown"),
        ({"name": ""}, "'name' is no text"),
        ({"paper": 3}, "'paper' is no text"),
        ({"spacing_um": 0.0}, "'spacing_um' is no length"),
        ({"spacing_um": True}, "'spacing_um' is no length"),
        ({"sha256": "ab"}, "'sha256' is no sha256"),
        ({"size_bytes": 1.5}, "'size_bytes' is no whole number"),
        ({"parameters": -1}, "'parameters' is no whole number"),
        ({"weights": "/etc/passwd"}, "'weights' is no path below"),
        ({"weights": "../other/model.safetensors"}, "'weights' is no path below"),
        ({"weights": "..\\other.safetensors"}, "'weights' is no path below"),
        ({"classes": []}, "'classes' is no list of tables, at least 1"),
        ({"classes": [{"name": "A", "color": [0, 0, 256]}]}, "number 1 is wrong: 'color' is not three"),
        ({"classes": [{"name": "A", "color": [0, 0, 0], "colour": 1}]}, "'colour' is unknown"),
        ({"training_data": [{"name": "A", "labels": "by hand"}]}, "'licence' is missing"),
        ({"known_failures": {}}, "'known_failures' is no table of texts"),
        ({"known_failures": "none"}, "'known_failures' is no table of texts"),
        ({"network": {}}, "'network' has no 'arch'"),
        ({"normalisation": {"mean": [1, 2], "std": [1, 1, 1]}}, "'mean' is not 3 numbers"),
        ({"training": {"hours": 1}}, "'hardware' is missing"),
        ({"training": EXAMPLE["training"] | {"hours": float("nan")}}, "'hours' is no number"),
        ({"measured": {}}, "'definition' is missing"),
        ({"measured": FIGURES | {"set": {"f1": "high"}}}, "'set' is wrong: 'f1' is no number"),
        ({"measured": FIGURES | {"set": {"f1_ci95": [0.1, 0.2]}}}, "interval of a figure that is not there"),
        ({"measured": FIGURES | {"set": {"f1": 1, "f1_ci95": [0.2, 0.1]}}}, "'f1_ci95' is not two numbers"),
        ({"measured": FIGURES | {"set": {"counts": {"tp": 0.5}}}}, "'tp' is no whole number"),
        (
            {"measured": FIGURES | {"set": {"per_class": {"A": {"f1": None}}}}},
            "'A' is wrong: 'f1' is no number",
        ),
        ({"measured": FIGURES | {"set": {"per_class": {"A": {"per_class": {}}, "B": 1}}}}, "'B' is no table"),
        ({"failure_cases": [{"picture": "../x.png", "caption": "c"}]}, "'picture' is no path below"),
        ({"started_from": {"name": "A"}}, "'started_from' is no list of tables"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], said: str) -> None:
    (problem,) = card_problems(changed(**fields))[:1]
    assert said in problem


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    def refusal(text: str | None) -> str:
        path = tmp_path / "card.toml"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text, "utf-8")
        with pytest.raises(ModelError) as caught:
            read_card(path)
        assert caught.value.code == "WSI314"
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return caught.value.message

    assert "No such file" in refusal(None)
    assert "is no model card" in refusal("name = ")
    assert "'name' is missing; 'version' is missing" in refusal("")
    assert re.search(r"; and \d+ more;", refusal(""))
    with pytest.raises(ModelError, match="'use' is missing"):
        write_card(tmp_path / "card.toml", changed(use=None))
    cases = [{"picture": "gone.png", "caption": "c"}]
    with pytest.raises(ModelError, match=r"no picture gone\.png"):
        write_card(tmp_path / "other.toml", changed(failure_cases=cases))


# --- reading back --------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
NUMBERS = st.one_of(st.integers(0, 10**12), st.floats(0, allow_nan=False, allow_infinity=False))
FIGURE = st.dictionaries(WORDS.filter(lambda w: not w.endswith("_ci95")), NUMBERS)


@given(st.dictionaries(WORDS, WORDS, min_size=1), st.dictionaries(WORDS, FIGURE), WORDS, NUMBERS)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, failures: Any, sets: Any, word: str, number: float
) -> None:
    content = changed(
        known_failures=failures,
        measured={**sets, "definition": word},
        postprocessing={word: number, "list": [word, True], "deep": {word: [number]}},
        training_data=[{"name": word, "labels": word, "licence": word, "note": word}] * 2,
    )
    if card_problems(content):  # "note" and the like want text
        return
    path = tmp_path_factory.mktemp("card") / "card.toml"
    assert write_card(path, content).content == content
    assert path.read_bytes() == write_card(path, content, overwrite=True).path.read_bytes()
    with pytest.raises(OutputError):
        write_card(path, content)


# --- wsitk models show ---------------------------------------------------------------------------------


def leaves(value: Any) -> list[str]:
    """Return each text and whole number that a card holds."""
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value]


def test_everything_that_a_card_says_is_shown(tmp_path: Path) -> None:
    (tmp_path / "pale nuclei.png").write_bytes(b"picture")
    pictures = [*EXAMPLE["failure_cases"], {"picture": "pale nuclei.png", "caption": "Pale"}]
    card = write_card(tmp_path / "card.toml", changed(failure_cases=pictures))
    text = card_text(card, None)
    flat = " ".join(text.split())
    shown = {k: v for k, v in card.content.items() if k not in ("classes", "size_bytes")}
    assert [leaf for leaf in leaves(shown) if " ".join(leaf.split()) not in flat] == []
    assert "f1 0.84 (95 %: 0.82 to 0.86)" in flat
    assert "Nucleus: f1 0.84 (95 %: 0.82 to 0.86)" in flat
    assert f"    {tmp_path / 'pale nuclei.png'}" in text.splitlines()
    assert "not verified: the file is not there" in flat
    assert max(map(len, text.splitlines())) <= max(100, len(str(tmp_path)) + 30)


def test_show_says_whether_the_weights_are_those_of_the_card(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["show", "cellvit"])
    assert shown.exit_code == 0
    assert ", verified" in shown.stdout
    assert "CoNSeP" in shown.stdout
    folder = tmp_path / "mine"
    folder.mkdir()
    write_card(folder / "card.toml", EXAMPLE)
    for place in (folder, folder / "card.toml"):
        said = runner.invoke(app, ["show", str(place), "--json"])
        assert said.exit_code == 0
        assert json.loads(said.stdout) == {**EXAMPLE, "verified": None}
    (folder / "model.safetensors").write_bytes(b"others")
    said = runner.invoke(app, ["show", str(folder)])
    assert "NOT THE ONE ON DISK" in said.stdout
    assert isinstance(said.exception, ModelError)
    assert said.exception.code == "WSI317"
