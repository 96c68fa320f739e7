"""Calibration and selective metrics against slow references, and `evaluate --uncertainty` against planted doubt."""

from __future__ import annotations

import csv
import json
import math
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from writers_data import CLASSES, rows_of

from wsitk.errors import OutputError, UsageError
from wsitk.evaluation import Options, evaluate
from wsitk.evaluation.report import as_dict, write_report
from wsitk.evaluation.uncertainty_pixels import judge_pixels
from wsitk.metrics.calibration import (
    brier_score,
    calibration_error,
    equal_mass_edges,
    equal_width_edges,
    interval_scores,
    log_score,
    reliability,
)
from wsitk.metrics.selective import (
    Graded,
    aurc,
    error_auprc,
    error_auroc,
    excess_aurc,
    levels_of,
    precision_recall,
    risk_coverage,
    roc,
)
from wsitk.model import ObjectClass
from wsitk.writers.ome_zarr import MapChannel, write_maps
from wsitk.writers.parquet import ObjectWriter

ITEMS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)
FEW = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6)


def graded(items) -> Graded:
    return Graded.of([d for d, _ in items], [w for _, w in items])


# --- slow references: item by item ---------------------------------------------------------------------


def slow_area(wrong: list[bool]) -> float:
    return sum(sum(wrong[:k]) / k for k in range(1, len(wrong) + 1)) / len(wrong)


def slow_aurc(items) -> float:
    """The mean over all orders that ascending doubt allows."""
    orders = [o for o in permutations(items) if all(a[0] <= b[0] for a, b in pairwise(o))]
    return sum(slow_area([w for _, w in o]) for o in orders) / len(orders)


def slow_auroc(items) -> float:
    pairs = [(a, b) for a, w in items if w for b, r in items if not r]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else math.nan


def slow_auprc(items) -> float:
    errors = sum(w for _, w in items)
    area = before = 0.0
    for threshold in sorted({d for d, _ in items}, reverse=True):
        shown = [w for d, w in items if d >= threshold]
        recall = sum(shown) / errors if errors else math.nan
        area += (recall - before) * sum(shown) / len(shown)
        before = recall
    return area


@given(FEW)
def test_aurc_is_the_mean_over_all_orders_of_ties(items) -> None:
    g = graded(items)
    assert float(aurc(g.right, g.wrong)) == pytest.approx(slow_aurc(items), abs=1e-12)


@given(ITEMS)
def test_detection_of_errors_item_by_item(items) -> None:
    g = graded(items)
    assert float(error_auroc(g.right, g.wrong)) == pytest.approx(slow_auroc(items), nan_ok=True)
    assert float(error_auprc(g.right, g.wrong)) == pytest.approx(slow_auprc(items), nan_ok=True)


@given(ITEMS)
def test_curves_hold_their_figures(items) -> None:
    g = graded(items)
    coverage, risk = risk_coverage(g, int(g.items))
    assert risk.mean() == pytest.approx(float(aurc(g.right, g.wrong)))
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(g.errors / g.items)
    x, y = roc(g)
    if 0 < g.errors < g.items:
        assert np.trapezoid(y, x) == pytest.approx(float(error_auroc(g.right, g.wrong)))
        recall, precision = precision_recall(g)
        assert (np.diff(recall, prepend=0) * precision).sum() == pytest.approx(
            float(error_auprc(g.right, g.wrong))
        )


@given(ITEMS)
def test_no_doubt_beats_the_one_that_ranks_errors_last(items) -> None:
    g = graded(items)
    assert float(excess_aurc(g.right, g.wrong)) >= -1e-12
    perfect = Graded.of([w for _, w in items], [w for _, w in items])
    assert float(excess_aurc(perfect.right, perfect.wrong)) == pytest.approx(0, abs=1e-12)


def test_known_areas() -> None:
    # right, wrong: risks 0 and 1/2; wrong, right: 1 and 1/2; both at once: the mean of the two
    assert float(aurc([1, 0], [0, 1])) == pytest.approx(0.25)
    assert float(aurc([0, 1], [1, 0])) == pytest.approx(0.75)
    assert float(aurc([1], [1])) == pytest.approx(0.5)
    assert float(excess_aurc([0, 1], [1, 0])) == pytest.approx(0.5)
    # a doubt that knows nothing: the share of errors, whatever the number
    assert float(aurc([700_000], [300_000])) == pytest.approx(0.3, abs=1e-12)
    assert math.isnan(float(aurc([0.0], [0.0])))
    assert math.isnan(float(error_auroc([3.0], [0.0])))
    many = excess_aurc([7e8, 0], [0, 3e8])  # harmonic numbers keep their digits
    assert float(many) == pytest.approx(0, abs=1e-9)
    r = 0.3  # Geifman's approximation of the optimum, for many items
    assert float(aurc([7e8, 0], [0, 3e8])) == pytest.approx(r + (1 - r) * math.log(1 - r), abs=1e-8)


def test_rows_of_draws_are_taken_one_by_one() -> None:
    rng = np.random.default_rng(3)
    right, wrong = rng.integers(0, 5, (2, 7, 11))
    for measure in (aurc, excess_aurc, error_auroc, error_auprc):
        each = [float(measure(r, w)) for r, w in zip(right, wrong, strict=True)]
        np.testing.assert_allclose(measure(right, wrong), each)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 12))
def test_levels_never_split_a_value(doubt, most) -> None:
    levels = levels_of(doubt, most)
    place = np.searchsorted(levels, doubt)
    assert len(levels) <= max(most, 1) + 1
    assert place.max() < len(levels)
    order = np.argsort(doubt, kind="stable")
    assert (np.diff(place[order]) >= 0).all()
    if len(set(doubt)) <= most:
        assert len(set(zip(doubt, place.tolist(), strict=True))) == len(set(place.tolist()))


def test_bad_doubts_are_refused() -> None:
    for doubt in ([1.0], [math.nan, 1.0]):
        with pytest.raises(UsageError, match="WSI842"):
            Graded.of(doubt, [True, False])


# --- calibration ---------------------------------------------------------------------------------------


def slow_ece(p, right, edges) -> float:
    total = 0.0
    for k, (low, high) in enumerate(pairwise(edges)):
        mine = [i for i, v in enumerate(p) if low < v <= high or (k == 0 and v == low)]
        if mine:
            total += abs(sum(right[i] for i in mine) - sum(p[i] for i in mine))
    return total / len(p)


PROBABILITIES = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0])), st.booleans()),
    min_size=1, max_size=60,
)  # fmt: skip


@given(PROBABILITIES, st.integers(1, 20), st.booleans())
def test_ece_bin_by_bin(items, bins, mass) -> None:
    p, right = zip(*items, strict=True)
    edges = equal_mass_edges(p, bins) if mass else equal_width_edges(bins)
    found = reliability(p, right, edges)
    assert found.count.sum() == len(p)
    assert found.ece == pytest.approx(slow_ece(p, right, edges.tolist()), abs=1e-12)
    assert found.worst >= found.ece - 1e-12
    half = len(p) // 2
    parts = reliability(p[:half], right[:half], edges) + reliability(p[half:], right[half:], edges)
    np.testing.assert_allclose(parts.sums, found.sums)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=50), st.integers(1, 8))
def test_bins_of_equal_mass_keep_ties_together(values, bins) -> None:
    p = np.array(values) / 8
    edges = equal_mass_edges(p, bins)
    held = reliability(p, np.zeros(len(p)), edges).count
    assert len(edges) <= bins + 1
    assert held.sum() == len(p)
    often = max(values.count(v) for v in values)
    assert held.max() <= len(p) / bins + often + 1


def test_bins_of_equal_mass_are_equal_without_ties() -> None:
    p = np.random.default_rng(0).permutation(np.linspace(0.2, 0.9, 120))
    assert reliability(p, np.zeros(120), equal_mass_edges(p, 12)).count.tolist() == [10] * 12


def test_calibration_by_hand() -> None:
    # 10 at 0.8 of which 6 are right, 10 at 0.3 of which 3 are: (|6 - 8| + |3 - 3|) / 20
    p = [0.8] * 10 + [0.3] * 10
    right = [1] * 6 + [0] * 4 + [1] * 3 + [0] * 7
    assert reliability(p, right, equal_width_edges(10)).ece == pytest.approx(0.1)
    assert reliability(p, right, equal_mass_edges(p, 2)).ece == pytest.approx(0.1)
    assert reliability(p, right, equal_width_edges(1)).ece == pytest.approx(0.1)
    assert brier_score([0.8, 0.3], [1, 1]) == pytest.approx([0.04, 0.49])
    assert log_score([0.8, 0.3], [1, 0]) == pytest.approx([-math.log(0.8), -math.log(0.7)])
    assert log_score([1.0], [0]) == pytest.approx([-math.log(1e-7)])
    # honest probabilities: the expected Brier score of a coin of p is p (1 - p)
    rng = np.random.default_rng(1)
    p = rng.uniform(0, 1, 200_000)
    right = rng.random(200_000) < p
    assert reliability(p, right, equal_width_edges(15)).ece < 0.005
    assert brier_score(p, right).mean() == pytest.approx(1 / 6, abs=0.002)


def test_edges_belong_to_the_bin_below() -> None:
    found = reliability([0.0, 0.1, 0.2, 0.3, 0.6, 0.7, 1.0], [0] * 7, equal_width_edges(10))
    assert found.count.tolist() == [2, 1, 1, 0, 0, 1, 1, 0, 0, 1]


def test_rows_without_items_have_no_calibration() -> None:
    assert np.isnan(calibration_error(np.zeros((2, 6)))).all()


def test_bad_probabilities_are_refused() -> None:
    edges = equal_width_edges(2)
    for p, right, e in (
        ([1.2], [1], edges),
        ([0.5], [1, 0], edges),
        ([0.5], [2], edges),
        ([0.5], [1], [0, 2]),
    ):
        with pytest.raises(UsageError, match="WSI840"):
            reliability(p, right, e)
    with pytest.raises(UsageError, match="WSI840"):
        reliability([0.5], [1], edges) + reliability([0.5], [1], equal_width_edges(3))


def test_intervals_by_hand() -> None:
    inside, width, score = interval_scores([0, 0, 0, 2], [4, 4, 4, 2], [0, 5, -1, 2], 0.9)
    assert inside.tolist() == [True, False, False, True]
    assert width.tolist() == [4, 4, 4, 0]
    assert score == pytest.approx([4, 24, 24, 0])


def test_the_honest_interval_scores_best() -> None:
    x = np.random.default_rng(5).normal(size=100_000)
    scores = {z: interval_scores(-z + 0 * x, z + 0 * x, x, 0.9)[2].mean() for z in (1.2, 1.645, 2.2)}
    assert min(scores, key=scores.__getitem__) == 1.645
    for low, high, level in (([1], [0], 0.9), ([0], [1], 1.0), ([math.nan], [1], 0.9)):
        with pytest.raises(UsageError, match="WSI841"):
            interval_scores(low, high, [0], level)


# --- evaluate --uncertainty ----------------------------------------------------------------------------

COLUMNS = ("mutual_information", "existence", "area_low_um2", "area_high_um2")
SIDE, UM = 320, 0.5


def squares(count: int) -> np.ndarray:
    """Return a label image of 10 px squares on a lattice of 20 px."""
    labels = np.zeros((SIDE, SIDE), np.int32)
    for k in range(count):
        y, x = 20 * (k // 15) + 5, 20 * (k % 15) + 5
        labels[y : y + 10, x : x + 10] = k + 1
    return labels


def write_run(folder: Path, count: int, wrong: set[int], *, doubt, classes=None, seed=0) -> None:
    """Write an output folder: square `k` lies on the truth unless it is in `wrong`, which lie between."""
    folder.mkdir(parents=True)
    shift = np.array([6 if k in wrong else 0 for k in range(count)])
    y, x = (np.array([20 * (k // 15) for k in range(count)]), np.array([20 * (k % 15) for k in range(count)]))
    shapes = shapely.box(x + 5 + shift, y + 5 + shift, x + 15 + shift, y + 15 + shift)
    area = np.full(count, 25.0, np.float32)
    columns = {
        "mutual_information": np.asarray(doubt, np.float32),
        "existence": np.where(shift > 0, 0.25, 0.75).astype(np.float32),
        "area_low_um2": area - 1,
        "area_high_um2": area + 3,
    }
    kinds = np.zeros(count, np.int16) if classes is None else np.asarray(classes, np.int16)
    rows = rows_of(shapes, columns=columns, area_um2=area, class_id=kinds, seed=seed)
    names = (ObjectClass("Nuclei", (0, 200, 0)),) if classes is None else CLASSES
    with ObjectWriter(folder / "objects.parquet", names, COLUMNS) as writer:
        writer.write(rows)
    (folder / "provenance.json").write_text(json.dumps({"spacing_um": [UM, UM]}))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Four images of 60 squares; in image k the squares 0 .. 5 k are wrong, and as doubtful as they should be."""
    (tmp_path / "truth").mkdir()
    for k in range(4):
        np.savez(tmp_path / f"truth/image{k}.npz", inst=squares(60))
        wrong = set(range(5 * k))
        doubt = [1.0 if i in wrong else 0.1 for i in range(60)]
        write_run(tmp_path / f"out/image{k}.png", 60, wrong, doubt=doubt, seed=k)
    return tmp_path / "out", tmp_path / "truth"


QUICK = Options(uncertainty=True, resamples=100)


def values(doubt) -> dict[str, float]:
    return {f.key.split(":")[0]: f.value for f in doubt.figures}


def test_planted_doubt_is_found(runs) -> None:
    found = evaluate(*runs, QUICK).uncertainty
    assert found is not None
    doubt = found.doubt("mutual_information", "object")
    assert (doubt.items, doubt.errors) == (240, 30)
    said = values(doubt)
    assert said["auroc"] == said["auprc"] == 1
    assert said["eaurc"] == pytest.approx(0, abs=1e-12)
    assert said["errors"] == pytest.approx(30 / 240)
    assert doubt.calibration is None
    existence = found.doubt("existence", "object")
    # 30 at 0.25, none right; 210 at 0.75, all right
    assert values(existence)["ece"] == pytest.approx(0.25)
    assert values(existence)["ece_mass"] == pytest.approx(0.25)
    assert values(existence)["brier"] == pytest.approx(0.0625)
    assert values(existence)["nll"] == pytest.approx(-math.log(0.75))
    # probability is drawn at random: it knows nothing
    assert 0.35 < values(found.doubt("probability", "object"))["auroc"] < 0.65
    with pytest.raises(UsageError, match="WSI843"):
        found.doubt("mood", "object")


def test_intervals_of_area_are_held_against_the_true_area(runs) -> None:
    out, truth = runs
    labels = squares(60)
    labels[5:15, 5:15][:, 9:] = 0  # one true square of 90 px: 22.5 µm², below its interval of 24 to 28
    np.savez(truth / "image0.npz", inst=labels)
    found = evaluate(out, truth, QUICK).uncertainty
    assert found is not None
    said = {f.key.split(":")[0]: f for f in found.intervals}
    assert said["coverage"].value == pytest.approx(209 / 210)
    assert said["width"].value == pytest.approx(4)
    assert said["winkler"].value == pytest.approx(4 + 20 * 1.5 / 210)
    half = evaluate(out, truth, Options(uncertainty=True, resamples=100, interval_level=0.5)).uncertainty
    assert half is not None
    assert next(f.value for f in half.intervals if f.key == "winkler:area") == pytest.approx(
        4 + 4 * 1.5 / 210
    )


def test_a_wrong_class_is_an_error_of_the_class_only(tmp_path: Path) -> None:
    (tmp_path / "truth").mkdir()
    np.savez(tmp_path / "truth/a.npz", inst=squares(30), type=np.full(30, 1))
    kinds = [1 if k < 6 else 0 for k in range(30)]
    write_run(tmp_path / "out/a.png", 30, {29}, doubt=np.arange(30), classes=kinds)
    options = Options(uncertainty=True, resamples=100, classes={1: "Neoplastic"})
    found = evaluate(tmp_path / "out", tmp_path / "truth", options).uncertainty
    assert found is not None
    assert found.doubt("mutual_information", "object").errors == 1
    assert found.doubt("mutual_information", "class").errors == 7
    unknown = evaluate(tmp_path / "out", tmp_path / "truth", QUICK).uncertainty  # "class 1" is none of ours
    assert unknown is not None
    assert {d.error for d in unknown.doubts} == {"object"}
    assert any("--labels" in note for note in unknown.notes)


def test_outlines_and_labels_agree(runs, tmp_path: Path) -> None:
    out, truth = runs
    for k in range(4):
        folder = tmp_path / f"outlined/image{k}.png"
        write_run(folder, 60, set(), doubt=np.zeros(60))
    drawn, outlined = (
        evaluate(out, truth, QUICK).uncertainty,
        evaluate(out, tmp_path / "outlined", QUICK).uncertainty,
    )
    assert drawn is not None
    assert outlined is not None
    for name in ("mutual_information", "probability"):
        assert values(drawn.doubt(name, "object")) == pytest.approx(values(outlined.doubt(name, "object")))
    assert [f.value for f in drawn.intervals] == pytest.approx([f.value for f in outlined.intervals])


def test_intervals_of_figures_are_drawn_over_images(runs) -> None:
    errors = {f.key: f for f in evaluate(*runs, QUICK).uncertainty.doubts[0].figures}[
        "errors:probability@object"
    ]
    assert errors.low < errors.value < errors.high
    assert errors.n == 4


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_coarse_levels_of_the_draws_keep_the_figures(seed) -> None:
    rng = np.random.default_rng(seed)
    doubt = rng.normal(size=3000)
    wrong = rng.random(3000) < 1 / (1 + np.exp(-doubt))
    exact, place = Graded.of(doubt, wrong), np.searchsorted(levels_of(doubt, 256), doubt)
    coarse = Graded.of(place, wrong)
    for measure in (aurc, error_auroc, error_auprc):
        assert float(measure(exact.right, exact.wrong)) == pytest.approx(
            float(measure(coarse.right, coarse.wrong)), abs=0.006
        )


def test_files_of_a_report(runs, tmp_path: Path) -> None:
    from PIL import Image

    evaluation = evaluate(*runs, QUICK)
    for name in ("one", "two"):
        write_report(tmp_path / name, evaluation)
    stems = ("reliability", "risk_coverage", "error_detection")
    wanted = {"evaluation.json", "images.csv", "cases.png", "uncertainty.csv", "curves.csv"}
    wanted |= {f"{s}.{e}" for s in stems for e in ("png", "svg")}
    assert {p.name for p in (tmp_path / "one").iterdir()} == wanted
    for file in wanted:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    import xml.etree.ElementTree as ElementTree

    for stem in stems:
        root = ElementTree.parse(tmp_path / f"one/{stem}.svg").getroot()
        with Image.open(tmp_path / f"one/{stem}.png") as picture:
            assert picture.size == (int(root.attrib["width"]), int(root.attrib["height"]))
    with open(tmp_path / "one/uncertainty.csv", newline="") as file:
        rows = {r["key"]: r for r in csv.DictReader(file)}
    assert float(rows["auroc:mutual_information@object"]["value"]) == 1
    stored = json.loads((tmp_path / "one/evaluation.json").read_text())["uncertainty"]
    assert stored == as_dict(evaluation)["uncertainty"]
    assert {s["score"] for s in stored["scores"]} == {
        "probability", "existence", "mutual_information", "area_interval",
    }  # fmt: skip


def test_from_the_command_line(runs, tmp_path: Path) -> None:
    from wsitk.cli.main import app

    arguments = ["evaluate", *map(str, runs), "--uncertainty", "--resamples", "100"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "e")])
    assert done.exit_code == 0, done.output
    assert "mutual_information" in done.output
    assert "AURC" in done.output
    assert (tmp_path / "e/risk_coverage.svg").is_file()
    wrong = CliRunner().invoke(app, [*arguments, "--task", "segmentation"])
    assert isinstance(wrong.exception, UsageError)
    assert wrong.exception.code == "WSI844"


def test_predictions_that_say_nothing_of_themselves_are_refused(runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI843"):
        evaluate(runs[1], runs[1], QUICK)
    write_run(tmp_path / "far/image0.png", 0, set(), doubt=[])
    with pytest.raises(UsageError, match="WSI843"):
        evaluate(tmp_path / "far", runs[1] / "image0.npz", QUICK)


# --- pixels --------------------------------------------------------------------------------------------


def add_maps(folder: Path, p: np.ndarray, doubt: np.ndarray, scale_um: float, corner_um=(0.0, 0.0)) -> None:
    stack = np.stack([p, doubt, np.full_like(p, 7)]).astype(np.uint8)
    write_maps(
        folder / "maps.ome.zarr", p.shape, "uint8",
        [MapChannel(n, (255, 255, 255)) for n in ("Nuclei", "Mutual information", "Density")],
        (scale_um, scale_um), (corner_um[0] + scale_um / 2, corner_um[1] + scale_um / 2),
        lambda r: stack[:, r.start[0] : r.stop[0], r.start[1] : r.stop[1]],
        overwrite=True,
    )  # fmt: skip


def test_pixels_of_maps_on_another_grid(runs, monkeypatch) -> None:
    """Truth at 0.5 µm, maps at 1 µm over a part of it: as if the maps had been enlarged first."""
    out, truth = runs
    rng = np.random.default_rng(0)
    p, doubt = rng.integers(0, 256, (2, 100, 120)).astype(np.uint8)
    folder = out / "image1.png"
    add_maps(folder, p, doubt, 1.0, corner_um=(10.0, 20.0))
    labels = np.load(truth / "image1.npz")["inst"] > 0
    window = labels[20:220, 40:280]
    large_p, large_doubt = (np.kron(v, np.ones((2, 2), np.uint8)) for v in (p, doubt))
    wrong = (large_p > 127) != window

    for block in (64, 1024):
        monkeypatch.setattr("wsitk.evaluation.uncertainty_pixels._BLOCK", block)
        found = evaluate(out, truth, QUICK).uncertainty
        assert found is not None
        judged = found.doubt("Mutual information", "pixel")
        assert (judged.items, judged.errors) == (window.size, wrong.sum())
        expected = Graded.of(large_doubt.ravel(), wrong.ravel())
        assert values(judged)["auroc"] == pytest.approx(float(error_auroc(expected.right, expected.wrong)))
        assert values(judged)["aurc"] == pytest.approx(float(aurc(expected.right, expected.wrong)))
        own = found.doubt("1 - |2p - 1|", "pixel")
        exact = large_p.ravel() / 255
        assert values(own)["brier"] == pytest.approx(brier_score(exact, window.ravel()).mean(), rel=1e-5)
        assert values(own)["ece"] == pytest.approx(
            reliability(exact, window.ravel(), equal_width_edges(15)).ece, abs=1e-4
        )
        assert not any("pixels were not judged" in note for note in found.notes)


def test_pixels_that_nobody_read_are_left_out(runs) -> None:
    from wsitk.evaluation.labels import Labels
    from wsitk.geometry import Region
    from wsitk.grid import TileGrid
    from wsitk.writers.ledger import TILE_STATUSES, write_ledger

    folder = runs[0] / "image0.png"
    add_maps(folder, np.full((160, 160), 200), np.zeros((160, 160)), 1.0)
    grid = TileGrid.fit(Region((0, 0), (160, 160)), (80, 80), (0, 0))
    status = np.full(len(grid), TILE_STATUSES.index("ok"))
    status[1] = TILE_STATUSES.index("unreadable")
    write_ledger(folder / "tiles.parquet", grid, status, (2.0, 2.0))
    truth = Labels(np.ones((1, SIDE, SIDE), np.int32), (), np.array([-1, -1]), typed=False)
    found = judge_pixels(folder, truth)
    assert found is not None
    lost = grid[1].owned.shape
    assert found.pixels == SIDE * SIDE - 4 * lost[0] * lost[1]


def test_damaged_maps_are_refused(runs) -> None:
    (runs[0] / "image0.png/maps.ome.zarr").mkdir()
    with pytest.raises(OutputError, match="WSI845"):
        evaluate(*runs, QUICK)
