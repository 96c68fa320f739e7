"""Every number of the golden vectors: what five published scripts say of the same small inputs."""

from __future__ import annotations

import json
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import detfill

from wsitk.metrics.contingency import Contingency
from wsitk.metrics.counts import Convention
from wsitk.metrics.detection import Pairs, pair_points, typed_counts
from wsitk.metrics.empties import Empty
from wsitk.metrics.overlap import centreline_dice, confusion
from wsitk.metrics.pannuke import CLASSES, TISSUES, ImageCounts, image_counts, summarise
from wsitk.metrics.panoptic import aji, aji_plus, count_matches, ensemble_dice, foreground_dice, matches
from wsitk.metrics.surface import boundary_iou, surface_distances

GOLDEN = Path(__file__).parent / "golden" / "methods" / "metrics"
SINGLE = 1e-6  # MONAI and parts of MetricsReloaded compute in float32


def expected(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def close(value: float, wanted: float, tolerance: float = 1e-12) -> bool:
    both_nan = isnan(value) and isnan(wanted)
    return both_nan or value == wanted or abs(value - wanted) <= tolerance * max(1.0, abs(wanted))


INSTANCES = expected("instance_expected")
SCRIPTS = {
    "pannuke": Convention.HOVERNET,
    "hovernet": Convention.HOVERNET,
    "cellvit": Convention.CELLVIT,
    "metricsreloaded": Convention.EXACT,
}


def table(key: str) -> Contingency:
    with np.load(GOLDEN / "instance_maps.npz") as maps:
        return Contingency.of(maps[f"{key}/true"], maps[f"{key}/pred"])


@pytest.mark.parametrize("key", INSTANCES)
def test_panoptic_quality(key: str) -> None:
    pairs = table(key)
    for name, wanted in INSTANCES[key].items():
        if "_pq@" not in name or wanted is None:
            continue
        script, threshold = name.split("_pq@")
        counts = count_matches(pairs, float(threshold))
        quality = counts.quality(SCRIPTS[script])
        tolerance = SINGLE if script == "metricsreloaded" else 1e-14
        for part in ("dq", "sq", "pq"):
            assert close(getattr(quality, part), wanted[part], tolerance), (name, part)
        assert (counts.tp, counts.fp, counts.fn) == (wanted["tp"], wanted["fp"], wanted["fn"]), name
        if "paired_true" in wanted:
            # The scripts number the objects from 1 before they pair them.
            chosen = matches(pairs, float(threshold))
            assert (pairs.truth[chosen] + 1).tolist() == wanted["paired_true"], name
            assert (pairs.predicted[chosen] + 1).tolist() == wanted["paired_pred"], name


@pytest.mark.parametrize("key", INSTANCES)
def test_aji_and_dice(key: str) -> None:
    pairs, wanted = table(key), INSTANCES[key]
    ours = {
        "get_fast_aji": aji(pairs),
        "get_fast_aji_plus": aji_plus(pairs),
        "get_fast_dice_2": ensemble_dice(pairs),
        "get_dice_1": foreground_dice(pairs),
    }
    for name, value in ours.items():
        if isinstance(wanted.get(name), float):
            assert close(value, wanted[name]), name


def test_what_the_scripts_say_of_nothing() -> None:
    both, lost, false = table("both_empty"), table("pred_empty"), table("true_empty")
    assert INSTANCES["both_empty"]["hovernet"].startswith("ZeroDivisionError")
    assert isnan(count_matches(both).quality(Convention.HOVERNET).pq)
    assert INSTANCES["both_empty"]["cellvit"].startswith("([0.0, np.float64(0.0)")
    assert count_matches(both).quality(Convention.CELLVIT).pq == 0
    assert isnan(count_matches(both).pq)
    assert np.isnan([aji(both), aji_plus(both), foreground_dice(both)]).all()
    assert INSTANCES["pred_empty"]["get_fast_aji"].startswith("ValueError")
    assert aji(lost) == 0
    assert INSTANCES["pred_empty"]["get_fast_dice_2"].startswith("ZeroDivisionError")
    assert isnan(ensemble_dice(lost))
    for convention in Convention:
        assert count_matches(lost).quality(convention).pq == 0
        assert count_matches(false).quality(convention).pq == 0
    assert aji(false) == float(INSTANCES["true_empty"]["get_fast_aji"])


def pannuke_images() -> tuple[list[ImageCounts], list[str]]:
    with np.load(GOLDEN / "pannuke_small.npz") as data:
        images = [image_counts(t, p) for t, p in zip(data["true"], data["pred"], strict=True)]
        return images, data["types"].tolist()


def test_pannuke_per_image() -> None:
    images, _ = pannuke_images()
    with np.load(GOLDEN / "pannuke_small.npz") as data:
        classes, binary = data["pq_per_image_class"], data["bpq_per_image"]
    for image, wanted, wanted_binary in zip(images, classes, binary, strict=True):
        ours = [c.quality(Convention.HOVERNET).pq if c.truth else nan for c in image.classes]
        np.testing.assert_allclose(ours, wanted, rtol=1e-13)
        one = image.binary
        assert close(one.quality(Convention.HOVERNET).pq if one.truth else nan, float(wanted_binary))


def test_pannuke_in_both_published_meanings() -> None:
    wanted = expected("pannuke_expected")
    summary = summarise(*pannuke_images())
    assert close(summary.mpq_tissues, wanted["pannuke_protocol"]["mPQ"])
    assert close(summary.bpq_tissues, wanted["pannuke_protocol"]["bPQ"])
    assert close(summary.mpq_images, wanted["cellvit_dataset_protocol"]["mPQ"])
    assert close(summary.bpq_images, wanted["cellvit_dataset_protocol"]["bPQ"])
    for name, value in zip(CLASSES, summary.class_pq, strict=True):
        assert close(value, wanted["class_pq"][name]), name
    lines = wanted["run_py_stdout"].splitlines()
    printed = {k: float(v) for k, v in (line.split(":") for line in lines if " PQ" in line and ":" in line)}
    for name in TISSUES:
        assert close(summary.tissue_mpq.get(name, nan), printed[f"{name} PQ"]), name
        assert close(summary.tissue_bpq.get(name, nan), printed[f"{name} PQ binary"]), name
    # With CellViT's own constant the same figure differs in the 7th digit.
    theirs = summarise(*pannuke_images(), Convention.CELLVIT)
    assert 1e-8 < summary.mpq_images - theirs.mpq_images < 1e-6


def test_detection_by_the_hovernet_protocol() -> None:
    wanted = expected("detection_expected")
    total = None
    with np.load(GOLDEN / "detection.npz") as data:
        for k in range(4):
            one = {name.split("/")[1]: data[name] for name in data.files if name.startswith(f"img{k}/")}
            pairs = pair_points(one["true_centroid"], one["pred_centroid"], float(one["radius"]), "hovernet")
            assert np.array_equal(np.stack([pairs.truth, pairs.predicted], axis=1), one["paired"])
            assert np.array_equal(pairs.unpaired_truth, one["unpaired_true"])
            assert np.array_equal(pairs.unpaired_predicted, one["unpaired_pred"])
            counts = typed_counts(pairs, one["true_type"], one["pred_type"], (1, 2, 3, 4, 5))
            total = counts if total is None else total + counts
    assert total is not None
    found = total.detection
    assert [found.f1, found.precision, found.recall] == pytest.approx(wanted["detection"], abs=1e-15)
    for type_id, figures in wanted["per_type"].items():
        score = total.score(int(type_id))
        assert [score.f1, score.precision, score.recall] == pytest.approx(figures, abs=1e-15), type_id


def test_hungarian_then_gate_loses_a_pair_and_the_gate_first_does_not() -> None:
    case = expected("detection_expected")["hungarian_then_gate_example"]
    truth, predicted = np.array(case["true"]), np.array(case["pred"])
    upstream = pair_points(truth, predicted, case["radius"], "hovernet")
    assert np.stack([upstream.truth, upstream.predicted], axis=1).tolist() == case["upstream_pairs"]
    assert upstream.counts.tp == case["upstream_tp"]
    assert pair_points(truth, predicted, case["radius"]).counts.tp == case["gated_max_tp"]


CELLVIT = Path(__file__).parent / "golden" / "cellvit"


def test_cellvit_on_its_own_nuclei() -> None:
    wanted = json.loads((CELLVIT / "losses_metrics.json").read_text(encoding="utf-8"))
    with np.load(CELLVIT / "post_nuclei_256.npz") as data:
        counts = count_matches(Contingency.of(data["gt_label"], data["inf_inst"]))
    quality, panoptic = counts.quality(Convention.CELLVIT), wanted["pq_nuclei_256"]
    assert [quality.dq, quality.sq, quality.pq] == pytest.approx(
        [panoptic[k] for k in ("dq", "sq", "pq")], rel=1e-14
    )
    assert [counts.tp, counts.fp, counts.fn] == [panoptic[k] for k in ("tp", "fp", "fn")]
    detection = wanted["cell_detection_scores(paired by IoU>.5)"]
    assert [counts.f1, counts.precision, counts.recall] == pytest.approx(list(detection.values()), rel=1e-15)


def test_cellvit_scores_of_types() -> None:
    wanted = json.loads((CELLVIT / "losses_metrics.json").read_text(encoding="utf-8"))
    names = {"t": 40, "p": 40, "ut": 9, "up": 7}
    t, p, missed, spurious = (
        (detfill.uniform01(f"m/{k}", (n,)) * 5).astype(int) + 1 for k, n in names.items()
    )
    p = np.where(detfill.uniform01("m/e", (40,)) > 0.3, t, p)
    pairs = Pairs(np.arange(40), np.arange(40), np.zeros(40), np.arange(40, 49), np.arange(40, 47))
    counts = typed_counts(pairs, np.append(t, missed), np.append(p, spurious), (1, 2, 3, 4, 5))
    for type_id, figures in wanted["cell_type_detection_scores"].items():
        score = counts.score(int(type_id))
        assert [score.f1, score.precision, score.recall] == pytest.approx(figures, rel=1e-15), type_id


MASKS = expected("binary_expected")


def masks(key: str) -> tuple[np.ndarray, np.ndarray, list[float]]:
    with np.load(GOLDEN / "binary_masks.npz") as data:
        return data[f"{key}/ref"], data[f"{key}/pred"], data[f"{key}/spacing"].tolist()


@pytest.mark.parametrize("key", MASKS)
def test_masks_as_metricsreloaded_has_them(key: str) -> None:
    truth, predicted, spacing = masks(key)
    policy = Empty.METRICS_RELOADED
    pixels, surfaces = confusion(truth, predicted), surface_distances(truth, predicted, spacing)
    ours = {
        "dsc": pixels.dice(policy),
        "fbeta": pixels.dice(policy),
        "intersection_over_union": pixels.iou(policy),
        "sensitivity": pixels.sensitivity,
        "specificity": pixels.specificity,
        "positive_predictive_value": pixels.precision,
        "matthews_correlation_coefficient": pixels.mcc,
        "cohens_kappa": pixels.kappa,
        "balanced_accuracy": pixels.balanced_accuracy,
        "absolute_volume_difference_ratio": pixels.volume_difference,
        "centreline_dsc": centreline_dice(truth, predicted, policy),
        "measured_hausdorff_distance": surfaces.hausdorff(empty=policy),
        "measured_hausdorff_distance_perc": surfaces.hausdorff(95, policy),
        "measured_average_distance": surfaces.assd(policy),
        "measured_masd": surfaces.masd(policy),
        "nsd@1": surfaces.nsd(1, policy),
        "nsd@2": surfaces.nsd(2, policy),
        "biou@1": boundary_iou(truth, predicted, 1, 1.0, policy),
        "biou@2": boundary_iou(truth, predicted, 2, 1.0, policy),
    }
    wanted = {name[3:]: value for name, value in MASKS[key].items() if name.startswith("mr_")}
    assert set(ours) == set(wanted)
    single = {"fbeta", "positive_predictive_value", "matthews_correlation_coefficient", "cohens_kappa"}
    for name, value in ours.items():
        assert close(value, wanted[name], SINGLE if name in single else 1e-12), name


@pytest.mark.parametrize("key", MASKS)
def test_masks_as_monai_has_them(key: str) -> None:
    truth, predicted, spacing = masks(key)
    surfaces = surface_distances(truth, predicted, spacing)
    ours = {
        "hd100": surfaces.hausdorff(empty=Empty.MONAI),
        "hd95": surfaces.hausdorff(95, Empty.MONAI),
        "nsd1": surfaces.nsd(1, Empty.MONAI),
        "nsd2": surfaces.nsd(2, Empty.MONAI),
        "assd": surfaces.assd(Empty.MONAI),
    }
    assert set(ours) == set(MASKS[key]["monai"])
    for name, value in ours.items():
        assert close(value, MASKS[key]["monai"][name], SINGLE), name


@pytest.mark.parametrize("key", [key for key, value in MASKS.items() if isinstance(value["deepmind"], dict)])
def test_masks_as_deepmind_has_them(key: str) -> None:
    truth, predicted, spacing = masks(key)
    surfaces, wanted = surface_distances(truth, predicted, spacing, "surfel"), MASKS[key]["deepmind"]
    ours = {
        "hd100": surfaces.hausdorff(),
        "hd95": surfaces.hausdorff(95),
        "nsd1": surfaces.nsd(1),
        "nsd2": surfaces.nsd(2),
        "dice": confusion(truth, predicted).dice(),
    }
    assert {*ours, "asd"} == set(wanted)
    for name, value in ours.items():
        assert close(value, wanted[name]), name
    assert surfaces.directed_averages() == pytest.approx(wanted["asd"], rel=1e-12)


def test_the_nearest_candidate_is_chosen_where_metricsreloaded_takes_the_farthest() -> None:
    theirs = expected("metricsreloaded_assignment_defects")
    [[_, _, chosen]] = theirs["greedy_matching_com_dist thr 6 (preds at distance 0 and 4)"]
    pairs = pair_points(np.array([[5.0, 5.0]]), np.array([[9.0, 5.0], [5.0, 5.0]]), 6)
    assert chosen == 4.0
    assert (pairs.predicted.tolist(), pairs.distance.tolist()) == ([1], [0.0])


def test_the_best_of_two_overlaps_is_chosen_where_metricsreloaded_takes_the_worse() -> None:
    theirs = expected("metricsreloaded_assignment_defects")
    [[_, _, chosen]] = theirs["greedy_matching_mask_iou (preds with IoU 1.0 and 0.6 to one ref)"]
    assert chosen == 0.6
    assert theirs["hungarian"] == "KeyError: 'seg'"
    truth, predicted = np.ones((2, 10), np.int32), np.ones((2, 10), np.int32)
    predicted[1, 2:] = 2  # IoU 0.6 and 0.4
    counts = count_matches(Contingency.of(truth, predicted), 0.3)
    assert (counts.tp, counts.fp, counts.iou_sum) == (1, 1, 0.6)
