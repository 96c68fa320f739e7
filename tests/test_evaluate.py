"""Evaluation against published figures, hand-made cases, and slow ways to the same number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from wsitk.errors import SourceError, UsageError
from wsitk.evaluation import Length, Options, evaluate
from wsitk.evaluation.compare import ALL, compare
from wsitk.evaluation.figures import vocabulary
from wsitk.evaluation.labels import Labels
from wsitk.evaluation.report import as_dict, write_report
from wsitk.metrics.panoptic import binary_pq


def nuclei(seed: int, count: int = 12, side: int = 96) -> np.ndarray:
    """Return a map of discs that don't overlap."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    yy, xx = np.mgrid[:side, :side]
    for label in range(1, count + 1):
        y, x, r = *rng.uniform(6, side - 6, 2), rng.uniform(4, 7)
        disc = np.hypot(yy - y, xx - x) < r
        if not labels[disc].any():
            labels[disc] = label
    return labels


def shifted(labels: np.ndarray, by: int) -> np.ndarray:
    return np.roll(labels, by, axis=1)


def save(folder: Path, **maps: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels in maps.items():
        np.savez(folder / f"{name}.npz", inst=labels)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Return folders of predictions and of truth with four images."""
    truth = {f"im{k}": nuclei(k) for k in range(4)}
    found = {name: shifted(m, k) for k, (name, m) in enumerate(truth.items())}
    return save(tmp_path / "pred", **found), save(tmp_path / "truth", **truth)


def codes(evaluation) -> list[str]:
    return [w.code for w in evaluation.warnings]


# published figures


@pytest.fixture
def folds(data: Path, tmp_path: Path) -> tuple[Path, Path, dict]:
    golden = data / "golden" / "methods" / "metrics"
    with np.load(golden / "pannuke_small.npz") as stored:
        for side in ("true", "pred"):
            (tmp_path / side).mkdir()
            np.save(tmp_path / side / "masks.npy", stored[side].astype(np.float64))  # as PanNuke has them
        np.save(tmp_path / "true" / "types.npy", stored["types"])
    return tmp_path / "pred", tmp_path / "true", json.loads((golden / "pannuke_expected.json").read_text())


def test_pannuke_figures_in_both_published_meanings(folds) -> None:
    pred, true, expected = folds
    evaluation = evaluate(pred, true, Options(mpp=0.25))
    for key, meaning in (("tissues", "pannuke_protocol"), ("images", "cellvit_dataset_protocol")):
        for name in ("bPQ", "mPQ"):
            figure = evaluation.figure(f"{name.lower()}@{key}")
            assert figure.value == pytest.approx(expected[meaning][name], abs=2e-6)
    ours = {"nonneoplastic": "Epithelial"}
    for name, value in expected["class_pq"].items():
        figure = evaluation.figure(f"pq:{ours.get(name, name.capitalize())}@images")
        assert figure.value == pytest.approx(value, abs=2e-6)
        assert figure.n + figure.skipped == 12
    assert "W-FREEFP" in codes(evaluation)


def test_real_truth_against_itself_is_perfect(data: Path) -> None:
    folder = data / "data" / "nuclei" / "monuseg_train"
    file = sorted(folder.glob("*.npz"))[0]
    evaluation = evaluate(file, file, Options(mpp=0.25))
    assert evaluation.figure("bpq@pooled").value == 1
    assert evaluation.figure("f1@pooled").value == 1
    assert math.isnan(evaluation.figure("f1@pooled").low)  # one image says nothing about the next


# what an evaluation must get right


def test_figures_follow_from_the_images(two) -> None:
    evaluation = evaluate(*two, Options(mpp=0.25))
    each = [binary_pq(nuclei(k), shifted(nuclei(k), k)) for k in range(4)]
    assert evaluation.figure("bpq@images").value == pytest.approx(np.mean(each), abs=1e-6)
    pooled = evaluation.figure("bpq@pooled")
    assert pooled.low <= pooled.value <= pooled.high
    assert pooled.n == 4


def test_a_missing_prediction_is_worst_and_not_skipped(two) -> None:
    pred, _ = two
    before = evaluate(*two, Options(mpp=0.25))
    (pred / "im0.npz").unlink()  # the best of them: everything must fall
    after = evaluate(*two, Options(mpp=0.25))
    assert codes(after)[0] == "W-MISSING"
    assert "im0" in after.warnings[0].found
    for key in (
        "bpq@images",
        "bpq@pooled",
        "dice@images",
        "f1@pooled",
        "f1@images",
        "aji@images",
        "dq@images",
    ):
        assert after.figure(key).value < before.figure(key).value
        assert after.figure(key).n == 4
    assert after.images[0].counts[ALL].fn == before.images[0].counts[ALL].truth


def test_a_missing_prediction_is_worst_even_where_nothing_is(tmp_path: Path) -> None:
    blank = np.zeros((64, 64), np.int32)
    truth = save(tmp_path / "t", a=nuclei(1, side=64), b=blank)
    pred = save(tmp_path / "p", a=nuclei(1, side=64))
    evaluation = evaluate(pred, truth, Options(mpp=0.25))
    assert evaluation.figure("bpq@images").value == pytest.approx(0.5, abs=1e-5)
    assert evaluation.figure("dice@images").value == pytest.approx(0.5)


def test_empty_images_by_protocol(tmp_path: Path) -> None:
    blank, some = np.zeros((64, 64), np.int32), nuclei(1, side=64)
    truth = save(tmp_path / "t", both=blank, false=blank, good=some)
    pred = save(tmp_path / "p", both=blank, false=some, good=some)
    free = evaluate(pred, truth, Options(mpp=0.25))
    assert free.figure("bpq@images").value == pytest.approx(1, abs=1e-5)  # PanNuke: false positives are free
    assert (free.figure("bpq@images").n, free.figure("bpq@images").skipped) == (1, 2)
    warned = next(w for w in free.warnings if w.code == "W-FREEFP")
    count = len(np.unique(some)) - 1
    assert warned.found.startswith(f"{count} false positives")
    assert "W-EMPTY" in codes(free)
    strict = evaluate(pred, truth, Options(mpp=0.25, protocol="hovernet"))
    assert strict.figure("bpq@images").value == pytest.approx(0.5, abs=1e-5)
    assert strict.figure("bpq@images").skipped == 1
    assert strict.figure("bpq@pooled").value == pytest.approx(2 / 3)


def test_hovernet_loses_a_legal_pair(tmp_path: Path) -> None:
    points = {"t": [(1.0, 11.0), (0.0, 0.0)], "p": [(1.0, 0.0), (11.0, 0.0)]}
    for side, rows in points.items():
        (tmp_path / f"{side}.csv").write_text("y,x\n" + "".join(f"{y},{x}\n" for y, x in rows))
    options = {"task": "detection", "radius": Length(12, "px")}
    for protocol, tp in (("pannuke", 2), ("hovernet", 1)):
        evaluation = evaluate(tmp_path / "p.csv", tmp_path / "t.csv", Options(protocol=protocol, **options))
        assert evaluation.images[0].detection.detection.tp == tp


def test_the_radius_is_a_length(two) -> None:
    counts = [
        evaluate(*two, Options(mpp=mpp)).images[3].detection.detection.tp for mpp in (0.25, 4.0)
    ]  # a shift of 3 px is 0.75 µm, or 12 µm
    assert counts[0] == len(np.unique(nuclei(3))) - 1
    assert counts[1] < counts[0]
    unknown = evaluate(*two)
    assert "W-MPP" in codes(unknown)
    assert "12 px" in next(w.found for w in unknown.warnings if w.code == "W-MPP")
    assert unknown.images[3].detection.detection.tp == counts[0]


def test_groups_are_drawn_whole(tmp_path: Path) -> None:
    names = [f"TCGA-AA-000{k}-01Z-00-DX1_{part}" for k in range(3) for part in "ab"]
    truth = save(tmp_path / "t", **{n: nuclei(k) for k, n in enumerate(names)})
    pred = save(tmp_path / "p", **{n: shifted(nuclei(k), k // 2 * 2) for k, n in enumerate(names)})
    by_slide = evaluate(pred, truth, Options(mpp=0.25, group="slide"))
    assert {i.facts["slide"] for i in by_slide.images} == {f"TCGA-AA-000{k}-01Z-00-DX1" for k in range(3)}
    assert by_slide.figure("bpq@groups").over == "mean of 3 slides"
    wide, narrow = (
        evaluate(pred, truth, Options(mpp=0.25, group=g)).figure("bpq@pooled") for g in ("slide", "image")
    )
    assert wide.value == pytest.approx(narrow.value, abs=1e-12)
    assert wide.high - wide.low > 0
    assert evaluate(pred, truth, Options(mpp=0.25, group="patient")).figure("bpq@pooled") == wide


def test_unknown_slides_are_not_guessed(two, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WSI831 the slide of 'im0' is unknown"):
        evaluate(*two, Options(group="slide"))
    table = tmp_path / "table.csv"
    table.write_text("image,slide,tissue\n" + "".join(f"im{k},s{k // 2},t{k % 2}\n" for k in range(4)))
    evaluation = evaluate(*two, Options(mpp=0.25, group="slide", table=table))
    assert evaluation.figure("bpq@tissues").over == "mean of 2 tissues"
    means = [evaluation.images[k].counts[ALL].pq for k in range(4)]
    assert evaluation.figure("bpq@tissues").value == pytest.approx(np.mean(means), abs=1e-5)


def test_leaks_are_found_by_slide(tmp_path: Path) -> None:
    truth = save(tmp_path / "t", **{f"TCGA-AA-000{k}-01Z-00-DX1_7": nuclei(k) for k in range(3)})
    (tmp_path / "train.txt").write_text("tiles/TCGA-AA-0001-01Z-00-DX1_9.png\nother.png\n")
    evaluation = evaluate(truth, truth, Options(mpp=0.25, train=tmp_path / "train.txt"))
    warned = next(w for w in evaluation.warnings if w.code == "W-LEAK")
    assert warned.found.startswith("1 of 3 images are of 1 slides")
    split = tmp_path / "split.csv"
    split.write_text("path,group,part\nx1.png,TCGA-AA-0002,train\nx2.png,TCGA-AA-0000,test\n")
    evaluation = evaluate(truth, truth, Options(mpp=0.25, train=split))
    warned = next(w for w in evaluation.warnings if w.code == "W-LEAK")
    assert warned.found.startswith("1 of 3 images are of 1 patients")
    split.write_text("path,part\nx1.png,test\n")
    with pytest.raises(UsageError, match="WSI837"):
        evaluate(truth, truth, Options(mpp=0.25, train=split))
    (tmp_path / "other.txt").write_text("elsewhere.png\n")
    clean = evaluate(truth, truth, Options(mpp=0.25, train=tmp_path / "other.txt"))
    assert "W-LEAK" not in codes(clean)


def test_small_objects_and_borders_are_pointed_out(tmp_path: Path) -> None:
    tiny = np.zeros((40, 40), np.int32)
    tiny[::8, ::8] = np.arange(1, 26).reshape(5, 5)
    tiny = np.maximum(tiny, np.roll(tiny, 1, axis=1))
    file = save(tmp_path / "t", a=tiny)
    found = {w.code: w for w in evaluate(file, file, Options(mpp=0.25)).warnings}
    assert "2 px" in found["W-SMALL"].found
    assert found["W-BORDER"].found.startswith("9 of 25")


# types


def typed(path: Path, labels: np.ndarray, kinds: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, inst=labels, type=np.array(kinds, np.uint8))


def test_types_by_hand(tmp_path: Path) -> None:
    labels = np.zeros((30, 90), np.int32)
    for k in range(4):
        labels[10:20, 20 * k + 5 : 20 * k + 15] = k + 1
    typed(tmp_path / "t" / "a.npz", labels, [1, 1, 2, 2])
    typed(tmp_path / "p" / "a.npz", np.where(labels == 4, 0, labels), [1, 2, 2, 2])
    evaluation = evaluate(tmp_path / "p", tmp_path / "t", Options(mpp=0.25, classes={1: "A", 2: "B"}))
    # A: one right, one given to B (weight 2). B: one right, one wrong from A (2), one missed.
    assert evaluation.figure("f1:A@pooled").value == pytest.approx(2 / (2 + 2))
    assert evaluation.figure("f1:B@pooled").value == pytest.approx(2 / (2 + 2 + 1))
    assert evaluation.figure("pq:A@pooled").value == pytest.approx(1 / 1.5)
    assert evaluation.figure("pq:B@pooled").value == pytest.approx(1 / 2)
    assert evaluation.figure("mpq@pooled").value == pytest.approx((1 / 1.5 + 1 / 2) / 2)
    assert evaluation.figure("type_accuracy@pooled").value == pytest.approx(2 / 3)
    assert evaluation.figure("bpq@pooled").value == pytest.approx(3 / 3.5)


def test_classes_of_one_side_are_not_scored(tmp_path: Path) -> None:
    labels = nuclei(3)
    count = int(labels.max())
    typed(tmp_path / "t" / "a.npz", labels, [1 + k % 3 for k in range(count)])
    typed(tmp_path / "p" / "a.npz", labels, [1 + k % 2 for k in range(count)])
    options = {"mpp": 0.25, "classes": {1: "A", 2: "B", 3: "C"}}
    evaluation = evaluate(
        tmp_path / "p",
        tmp_path / "t",
        Options(
            **options,
            truth_names={"C": None, "B": "both"},
            predicted_names={"A": "A", "B": "both", "C": None},
        ),
    )
    assert evaluation.vocabulary.shared == ("A", "both")
    # an object without a class still counts among all
    assert evaluation.figure("bpq@pooled").value == 1
    none = evaluate(
        tmp_path / "p", tmp_path / "t", Options(**options, truth_names={"A": "X", "B": "Y", "C": "Z"})
    )
    assert none.vocabulary.shared == ()
    assert "no class name in common" in next(w.found for w in none.warnings if w.code == "W-CLASSES")


def test_what_counts_as_never_found_and_what_as_unknown() -> None:
    one = np.zeros((8, 8), np.int32)
    one[2:6, 2:6] = 1
    truth = Labels(one[None], ("A", "B"), np.array([-1, 0]))

    def shared(*names: str, declared: bool = False) -> tuple[str, ...]:
        predicted = Labels(one[None], names, np.array([-1, 0]), declared=declared)
        return vocabulary([compare("x", truth, predicted, Options(), {})]).shared

    assert shared("A") == ("A", "B")  # B could have been found, and was not
    assert shared("A", declared=True) == ("A",)  # the model knows no B
    assert shared("C") == ()
    assert shared("A", "C") == ("A", "B", "C")


# areas


def test_segmentation_by_hand(tmp_path: Path) -> None:
    import tifffile

    t, p = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    t[5:15, 5:15], p[5:15, 7:17] = 1, 1
    t[20:30, 20:30] = 2
    for side, labels in (("t", t), ("p", p)):
        (tmp_path / side).mkdir()
        tifffile.imwrite(tmp_path / side / "a.tif", labels)
    options = Options(
        task="segmentation", mpp=0.5, classes={1: "A", 2: "B", 3: "C"}, tolerance=Length(1, "um")
    )
    evaluation = evaluate(tmp_path / "p", tmp_path / "t", options)
    assert evaluation.figure("dice:A@images").value == pytest.approx(0.8)
    assert evaluation.figure("iou:A@images").value == pytest.approx(80 / 120)
    assert evaluation.figure("hd95:A@images").value == pytest.approx(1.0)  # two pixels of half a µm
    assert evaluation.figure("nsd:A@images").value == 1
    # missed altogether: worst, not skipped; absent from both: skipped, not perfect
    assert evaluation.figure("dice:B@images").value == 0
    assert evaluation.figure("hd95:B@images").value == pytest.approx(math.hypot(20, 20))
    assert math.isnan(evaluation.figure("dice:C@images").value)
    assert evaluation.figure("dice:C@images").skipped == 1
    assert evaluation.figure("dice@images").value == pytest.approx(0.4)
    tight = evaluate(
        tmp_path / "p", tmp_path / "t", Options(task="segmentation", mpp=0.5, tolerance=Length(0.2, "um"))
    )
    assert tight.figure("nsd:class 1@images").value < 1
    assert "less than a pixel" in next(w.found for w in tight.warnings if w.code == "W-NSDTAU")
    assert {"W-NSDTAU", "W-EMPTY", "W-IMBAL"} <= set(
        codes(evaluate(tmp_path / "p", tmp_path / "t", Options(task="segmentation", mpp=0.5)))
    )


def test_touching_instances_are_pointed_out(tmp_path: Path) -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[10:20, 10:20], labels[10:20, 20:30], labels[30:34, 2:6] = 1, 2, 3
    file = save(tmp_path / "t", a=labels)
    found = evaluate(file, file, Options(task="segmentation", mpp=0.5)).warnings
    assert next(w for w in found if w.code == "W-OVERLAP").found.startswith("2 true objects")


def test_volumes_have_their_own_spacing(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    truth = np.zeros((12, 10, 8), np.uint8)
    truth[3:8, 3:8, 2:5] = 1
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    for side, labels in (("t", truth), ("p", np.roll(truth, 1, axis=2))):
        (tmp_path / side).mkdir()
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / side / "a.nii.gz")
    options = Options(task="segmentation", tolerance=Length(2000, "um"))
    evaluation = evaluate(tmp_path / "p", tmp_path / "t", options)
    assert evaluation.images[0].unit == "mm"
    assert evaluation.figure("hd95:class 1@images").value == pytest.approx(3.0)
    assert evaluation.figure("nsd:class 1@images").value < 1
    moved = affine.copy()
    moved[0, 3] = 5
    nibabel.save(nibabel.Nifti1Image(truth, moved), tmp_path / "p" / "a.nii.gz")
    with pytest.raises(SourceError, match="WSI827"):
        evaluate(tmp_path / "p", tmp_path / "t", options)


# what is written


def test_reports_are_whole_and_repeat_themselves(two, tmp_path: Path) -> None:
    (two[0] / "im2.npz").unlink()
    evaluation = evaluate(*two, Options(mpp=0.25))
    for name in ("one", "two"):
        write_report(tmp_path / name, evaluate(*two, Options(mpp=0.25)))
    files = sorted(f.name for f in (tmp_path / "one").iterdir())
    assert files == ["cases.png", "evaluation.json", "images.csv"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    stored = json.loads((tmp_path / "one" / "evaluation.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(as_dict(evaluation)))
    assert stored["missing"] == ["im2"]
    rows = (tmp_path / "one" / "images.csv").read_text().splitlines()
    assert len(rows) == 5
    assert rows[0].startswith("image,missing,unit,pq:all,tp:all,fp:all,fn:all,f1")


def test_the_picture_shows_faults_in_their_colours(tmp_path: Path) -> None:
    from PIL import Image

    labels = np.zeros((64, 64), np.int32)
    labels[8:24, 8:24] = 1
    other = np.zeros_like(labels)
    other[40:56, 40:56] = 1
    write_report(
        tmp_path / "out",
        evaluate(save(tmp_path / "p", a=other), save(tmp_path / "t", a=labels), Options(mpp=0.25)),
    )
    with Image.open(tmp_path / "out" / "cases.png") as picture:
        pixels = np.asarray(picture)[120:680, 24:584]  # the panel
    missed, false = (
        pixels[80:200, 80:200].reshape(-1, 3).mean(0),
        pixels[370:470, 370:470].reshape(-1, 3).mean(0),
    )
    assert missed[2] < 200 < missed[0]  # yellow
    assert false[1] < 200 < false[0]  # red
    assert (pixels[250:300, 250:300] == 255).all()
