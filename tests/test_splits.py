"""Splits: whole groups, as even as they allow, the same for the same seed; and whatever two parts share is found."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from wsitk.cli.split import app
from wsitk.errors import OutputError, UsageError, WsitkError
from wsitk.splits import alike, check_split, examine_split, group_names, make_split, origin_of, parse_parts
from wsitk.testing import SyntheticSlide

PARTS = {"train": 0.7, "val": 0.15, "test": 0.15}

# --- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slide", "patient", "rule"),
    [
        ("a/TCGA-18-5592-01Z-00-DX1.jpg", "TCGA-18-5592-01Z-00-DX1", "TCGA-18-5592", "TCGA"),
        ("TCGA-18-5592-01Z-00-DX1.8A1F-22.svs", "TCGA-18-5592-01Z-00-DX1", "TCGA-18-5592", "TCGA"),
        ("tcga-ay-a8yk-01a-01-ts1_inst.npz", "TCGA-AY-A8YK-01A-01-TS1", "TCGA-AY-A8YK", "TCGA"),
        ("TCGA-18-5592_x1_y2.png", "TCGA-18-5592", "TCGA-18-5592", "TCGA"),
        (
            "20-1-1_2019-05-28 21_45_59-lv1-9124-14744-4459-43.png",
            "20-1-1_2019-05-28 21_45_59",
            None,
            "-lvN-",
        ),
        ("case 7 [x=1024,y=0,w=512,h=256].tif", "case 7", None, "QuPath"),
        ("case 7 [d=4.0,x=1024,y=0,w=512,h=256,z=0].tif", "case 7", None, "QuPath"),
        ("case-7_x123_y456.png", "case-7", None, "x, y"),
        ("case-7_X=123_Y=456_3.png", "case-7", None, "x, y"),
        ("case-7 (x12, y34).png", "case-7", None, "x, y"),
        ("slide3_patch_00017.png", "slide3", None, "numbered"),
        ("slide3_patch_upper_left.png", "slide3", None, "numbered"),
        ("slide3-tile7-b.png", "slide3", None, "numbered"),
        ("train_10_003.jpg", "train_10", None, "CoNSeP"),
        ("train_10.png", "train_10", None, "whole name"),
        ("liver_tiles_b.png", "liver_tiles_b", None, "whole name"),
        ("slide 12.svs", "slide 12", None, "whole name"),
        ("max_y2.png", "max_y2", None, "whole name"),
    ],
)
def test_names_tell_slide_and_patient(name: str, slide: str, patient: str | None, rule: str) -> None:
    origin = origin_of(name)
    assert (origin.slide, origin.patient, origin.rule) == (slide, patient, rule)


def test_names_tell_places() -> None:
    tile = origin_of("case 7 [d=4.0,x=1024,y=7,w=512,h=256].tif")
    assert (tile.x, tile.y, tile.width, tile.height) == (1024, 7, 512, 256)
    tile = origin_of("a_x3_y4_w5_h6.png")
    assert (tile.x, tile.y, tile.width, tile.height) == (3, 4, 5, 6)
    tile = origin_of("TCGA-18-5592-01Z-00-DX1_x3_y4.png")
    assert (tile.x, tile.y, tile.width) == (3, 4, None)


def test_a_pattern_names_groups() -> None:
    names = ["s1/p7_a.png", "s2/p7_b.png"]
    assert group_names(names, pattern=r"p\d+") == (["p7", "p7"], {"pattern": 2})
    assert group_names(names, pattern=r"(s\d)/")[0] == ["s1", "s2"]
    assert group_names(names, pattern=r"(s\d)/(?P<group>p\d)")[0] == ["p7", "p7"]
    for pattern, code in (("(", "WSI931"), (r"q\d", "WSI932"), (r"s1/(x*)", "WSI932")):
        with pytest.raises(UsageError, match=code):
            group_names(names, pattern=pattern)


def test_patients_that_names_do_not_tell_are_said() -> None:
    parts = {"train": ["TCGA-18-5592-01Z-00-DX1.jpg", "a_patch_1.png"], "test": ["b_patch_1.png"]}
    report = examine_split(parts, group="patient", contents=False)
    assert report.rules == {"TCGA": 1, "slide for patient": 2}
    assert "2 of 3 names tell no patient" in report.notes[0]


# --- making --------------------------------------------------------------------------------------------

Made = tuple[list[str], list[str], int]


@st.composite
def lists(draw: st.DrawFn) -> Made:
    """Draw each item's group and stratum, and a seed."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=3, max_size=14))
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    strata = draw(st.lists(st.sampled_from("abc"), min_size=len(groups), max_size=len(groups)))
    return groups, strata, draw(st.integers(0, 5))


def cost(groups: list[str], strata: list[str], part_of: dict[str, str], parts: dict[str, float]) -> float:
    """Return the measure that the module's docstring tells, from its words."""
    total = 0.0
    for part, share in parts.items():
        inside = [s for g, s in zip(groups, strata, strict=True) if part_of[g] == part]
        total += (len(inside) - share * len(groups)) ** 2 / (share * len(groups))
        for stratum, count in Counter(strata).items():
            total += (inside.count(stratum) - share * count) ** 2 / (share * count)
    return total


@settings(max_examples=60)
@given(lists())
def test_groups_stay_whole_and_no_move_would_help(made: Made) -> None:
    groups, strata, seed = made
    split = make_split(groups, PARTS, strata, seed)
    part_of: dict[str, str] = {}
    for group, part in zip(groups, split.part, strict=True):
        assert part_of.setdefault(group, part) == part
    count = Counter(part_of.values())
    assert set(count) == set(PARTS)
    assert split.groups == {p: count[p] for p in PARTS}
    assert split.items == {p: split.part.count(p) for p in PARTS}
    pairs = Counter(zip(split.part, strata, strict=True))
    assert all(n == pairs[part, s] for part, each in split.strata.items() for s, n in each.items())
    now = cost(groups, strata, part_of, PARTS)
    for group, part in itertools.product(part_of, PARTS):
        if count[part_of[group]] > 1:
            assert cost(groups, strata, part_of | {group: part}, PARTS) > now - 1e-6
    order = np.random.default_rng(seed).permutation(len(groups))
    again = make_split([groups[i] for i in order], PARTS, [strata[i] for i in order], seed)
    assert [again.part[k] for k in np.argsort(order)] == list(split.part)


def test_many_groups_come_out_even_in_every_stratum_and_the_seed_matters() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 60, 400)
    groups = [f"slide {i}" for i, size in enumerate(sizes) for _ in range(size)]
    kind = random.choice(list("abcd"), 400, p=[0.6, 0.3, 0.08, 0.02])
    strata = [str(kind[i]) for i, size in enumerate(sizes) for _ in range(size)]
    split = make_split(groups, PARTS, strata, seed=1)
    for part, share in PARTS.items():
        assert split.items[part] / len(groups) == pytest.approx(share, abs=0.002)
        for stratum, count in Counter(strata).items():
            assert split.strata[part][stratum] / count == pytest.approx(share, abs=0.03)
    assert make_split(groups, PARTS, strata, seed=1) == split
    other = make_split(groups, PARTS, strata, seed=2)
    assert sum(a != b for a, b in zip(split.part, other.part, strict=True)) > len(groups) / 4


def test_small_parts_get_a_group_and_impossible_ones_are_refused() -> None:
    split = make_split(["a"] * 90 + ["b"] * 50 + ["c"] * 70, {"train": 0.98, "val": 0.01, "test": 0.01})
    assert split.groups == {"train": 1, "val": 1, "test": 1}
    assert split.items["train"] == 90
    with pytest.raises(UsageError, match=r"WSI933 2 groups can't fill 3 parts"):
        make_split(["a", "b"], PARTS)
    with pytest.raises(UsageError, match="WSI933"):
        make_split(["a", "b", "c"], PARTS, ["x"])


@pytest.mark.parametrize(
    "text", ["", "train", "train=1", "train=.5", "train=.5,train=.5", "a=.5,b=x", "a=.6,b=.6", "a=.5,b=nan"]
)
def test_parts_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="WSI930"):
        parse_parts(text)
    assert parse_parts("train=.7, val=.15,test=.15") == PARTS


# --- groups in two parts -------------------------------------------------------------------------------


def medfmc() -> dict[str, list[str]]:
    """Return lists of the shape of MedFMC's ColonPath: 169 slides tested, 50 of them trained on as well.

    No region of a slide is in both parts, so names of regions show nothing. 1,012 of 3,296 test tiles are
    from the 50.
    """
    shared, own = [f"2020-{i:04}-1_2019-05-28 21_45_59" for i in range(50)], [f"T{i:03}" for i in range(119)]

    def tiles(slides: list[str], count: int, first: int) -> list[str]:
        return [f"{slides[i % len(slides)]}-lv1-{first + i}-{i}-4459-4459.png" for i in range(count)]

    trained = tiles(shared, 900, 50_000) + tiles([f"R{i:03}" for i in range(200)], 3_000, 0)
    return {"trainval": trained, "test": tiles(shared, 1_012, 0) + tiles(own, 3_296 - 1_012, 0)}


def test_the_leak_of_medfmc_is_found_slide_by_slide() -> None:
    parts = medfmc()
    assert len({origin_of(name).slide for name in parts["test"]}) == 169
    leaks = check_split(parts)
    assert len(leaks) == 50
    assert {(leak.code, leak.unit) for leak in leaks} == {("WSI920", "slide")}
    assert sum(len(leak.members["test"]) for leak in leaks) == 1_012
    assert not check_split(parts, pattern=r".*")  # by region, as the split was made, there is none


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=2))
def test_shared_groups_are_those_that_a_naive_count_finds(told: list[tuple[str, int]]) -> None:
    parts: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for i, (part, slide) in enumerate(told):
        parts[part].append(f"s{slide}_patch_{i}.png")
    wanted = {s for s in range(10) if len({p for p, slide in told if slide == s}) > 1}
    leaks = check_split(parts, contents=False)
    assert {int(leak.what[1:]) for leak in leaks} == wanted
    assert all(leak.members == {p: m for p, m in leak.members.items() if m} for leak in leaks)


def test_groups_may_be_given() -> None:
    parts = {"train": ["a.png", "b.png"], "test": ["c.png"]}
    assert not check_split(parts)
    (leak,) = check_split(parts, groups={"train": ["p1", "p2"], "test": ["p2"]}, group="patient")
    assert leak.line() == "WSI920 patient 'p2' is in train (1) and test (1): b.png | c.png"
    for wrong in ({"train": ["p1"], "test": ["p2"]}, {"train": ["p1", "p2"]}):
        with pytest.raises(UsageError, match="WSI934 3 files but"):
            check_split(parts, groups=wrong)
    with pytest.raises(UsageError, match="WSI934"):
        check_split({"train": ["a"]})


# --- copies and lookalikes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [
        Image.fromarray(SyntheticSlide.make((192, 192), count=14, radius=(8.0, 14.0), seed=seed).pixels)
        for seed in range(12)
    ]


CHANGES: dict[str, Callable[[Image.Image, Path], None]] = {
    "jpeg": lambda image, path: image.save(path.with_suffix(".jpg"), quality=40),
    "half": lambda image, path: image.resize((96, 96)).save(path),
    "mirrored": lambda image, path: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path),
    "turned": lambda image, path: image.transpose(Image.Transpose.ROTATE_90).save(path),
    "transversed": lambda image, path: image.transpose(Image.Transpose.TRANSVERSE).save(path),
    "grey": lambda image, path: image.convert("L").save(path),
    "tiff": lambda image, path: image.save(path.with_suffix(".tif")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(
    tmp_path: Path, pictures: list[Image.Image], change: str
) -> None:
    parts: dict[str, list[Path]] = {"train": [], "test": []}
    for i, image in enumerate(pictures):
        parts["train" if i < 8 else "test"].append(tmp_path / f"p{i}.png")
        image.save(tmp_path / f"p{i}.png")
    CHANGES[change](pictures[3], tmp_path / "again.png")
    parts["test"].append(next(tmp_path.glob("again.*")))
    (leak,) = check_split(parts)
    assert leak.code == "WSI922"
    assert leak.members == {"train": (str(tmp_path / "p3.png"),), "test": (str(parts["test"][-1]),)}
    assert leak.distance is not None
    assert leak.distance <= alike.DISTANCE


def test_copies_are_found_by_their_bytes_and_once(tmp_path: Path, pictures: list[Image.Image]) -> None:
    for name in ("a", "b", "c"):
        pictures[0].save(tmp_path / f"{name}.png")
    pictures[1].save(tmp_path / "d.png")
    glass = Image.new("RGB", (64, 64), (240, 240, 240))
    glass.save(tmp_path / "glass1.png")
    glass.resize((80, 80)).save(tmp_path / "glass2.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    train = [tmp_path / n for n in ("a.png", "b.png", "glass1.png", "gone.png")]
    test = [tmp_path / n for n in ("c.png", "d.png", "glass2.png", "broken.png")]
    report = examine_split({"train": train, "test": test})
    (leak,) = report.leaks
    assert leak.code == "WSI921"
    assert {part: len(names) for part, names in leak.members.items()} == {"train": 2, "test": 1}
    notes = " ".join(report.notes)
    assert "1 of 8 files are not there" in notes
    assert "1 files can't be compared by their looks" in notes
    assert "broken.png" in notes
    assert "2 pictures are flat" in notes


def naive_pairs(a: Any, b: Any, distance: int) -> dict[tuple[int, int], int]:
    bits = {
        (i, j): bin(int(x) ^ int(y)).count("1")
        for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b))
    }
    return {pair: count for pair, count in bits.items() if count <= distance}


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 15), st.integers(1, 50))
def test_bucketed_pairs_are_those_of_comparing_all(seed: int, distance: int, block: int) -> None:
    random = np.random.default_rng(seed)
    a = random.integers(0, 2**63, 25, dtype=np.uint64)
    b = np.concatenate([a[:15], random.integers(0, 2**63, 5, dtype=np.uint64)])
    for k in range(len(b)):
        for bit in random.integers(1, 64, random.integers(0, 18)):
            b[k] ^= np.uint64(1) << np.uint64(bit)
    found: dict[tuple[int, int], int] = {}
    old, alike.BLOCK = alike.BLOCK, block
    try:
        for i, j, bits in alike._candidates(a, b, distance):
            found |= {(int(x), int(y)): int(d) for x, y, d in zip(i, j, bits, strict=True)}
    finally:
        alike.BLOCK = old
    assert found == naive_pairs(a, b, distance)


def test_positions_of_a_picture_have_the_hash_of_the_turned_picture() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    low, _, _ = alike._described(pixels)
    hashes = set()
    for turn in range(8):
        turned = np.ascontiguousarray(alike._turned(pixels, turn))
        again = alike._packed(alike._described(turned)[0], 0)
        assert np.array_equal(alike._packed(low, turn), again)
        hashes.add(int(again[0]))
    assert len(hashes) == 8


def test_real_tiles_of_other_places_are_not_taken_for_one(data: Path) -> None:
    folder = data / "data/nuclei/consep256/train"
    files = sorted(folder.glob("*.jpg"))[::3]
    slides: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        slides[origin_of(file).slide].append(file)
    names = sorted(slides)
    halves = {"train": names[: len(names) // 2], "test": names[len(names) // 2 :]}
    parts = {part: [f for slide in some for f in slides[slide]] for part, some in halves.items()}
    assert check_split(parts) == ()
    mixed = {"train": files[::2], "test": files[1::2]}
    leaks = check_split(mixed)
    assert {leak.code for leak in leaks} == {"WSI920"}
    assert len(leaks) == len(names) == 27


# --- overlaps ------------------------------------------------------------------------------------------


def test_tiles_that_share_pixels_are_found_neighbours_are_not(tmp_path: Path) -> None:
    def named(slide: str, x: int, y: int) -> str:
        return f"{slide} [x={x},y={y},w=100,h=100].png"

    train, test = [named("s", 0, 0), named("s", 500, 0)], [named("s", 100, 0), named("t", 0, 0)]
    assert [leak.code for leak in check_split({"train": train, "test": test})] == ["WSI920"]
    test.append(named("s", 99, 99))
    leak = check_split({"train": train, "test": test})[1]
    assert (leak.code, leak.what) == ("WSI923", "s")
    assert leak.members == {"train": (train[0],), "test": (test[2],)}
    # The place from the name, the size from the picture.
    for x in (0, 60, 124):
        Image.fromarray(np.random.default_rng(x).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / f"c_x{x}_y0.png"
        )
    parts = {"train": [tmp_path / "c_x60_y0.png"], "test": [tmp_path / "c_x124_y0.png"]}
    assert [leak.code for leak in check_split(parts)] == ["WSI920"]
    parts["test"].append(tmp_path / "c_x0_y0.png")
    assert check_split(parts)[1].members == {
        "train": (str(parts["train"][0]),),
        "test": (str(parts["test"][1]),),
    }


# --- the command line ----------------------------------------------------------------------------------


def call(*words: object) -> tuple[int, str]:
    """Call `wsitk split`; a refusal gives its exit code and its line."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    if isinstance(result.exception, WsitkError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_what_make_writes_check_accepts(tmp_path: Path) -> None:
    rows = [
        {"path": f"img/s{i % 30}_patch_{i}.png", "organ": "liver" if i % 3 else "colon"} for i in range(300)
    ]
    source, out = table(tmp_path / "all.csv", rows), tmp_path / "out" / "split.csv"
    out.parent.mkdir()
    words = ("make", source, "--stratify", "organ", "--seed", 3, "-o", out)
    code, said = call(*words)
    assert code == 0
    assert "300 files of 30 groups (slide); found by numbered (300)" in said
    assert "(wanted 70.0%)" in said
    read = rows_of(out)
    assert list(read[0]) == ["path", "group", "part", "organ"]
    assert read[0]["path"] == "../img/s0_patch_0.png"
    assert Counter(r["part"] for r in read) in (
        {"train": 210, "val": 50, "test": 40},
        {"train": 210, "val": 40, "test": 50},
    )
    code, said = call("check", out)
    assert (code, said.splitlines()[-1]) == (0, "Nothing shared was found")
    assert "300 of 300 files are not there" in said
    assert call(*words)[1].startswith("WSI510")
    before = out.read_bytes()
    assert call(*words, "--overwrite")[0] == 0
    assert out.read_bytes() == before
    facts = json.loads(call(*words, "--overwrite", "--json")[1])
    assert sum(facts["items"].values()) == 300
    assert facts["strata"]["train"].keys() == {"liver", "colon"}


def test_check_says_each_leak_and_exits_with_one(tmp_path: Path) -> None:
    lists = []
    for part, names in medfmc().items():
        lists.append(tmp_path / f"{part}.txt")
        lists[-1].write_text("\n".join(names), "utf-8")
    code, said = call("check", *lists)
    assert code == 1
    assert said.count("WSI920 slide '2020-") == 20
    assert "WSI920 and 30 more; --json prints all" in said
    assert said.splitlines()[-1] == "50 leaks"
    code, said = call("check", *lists, "--json", "--names-only")
    facts = [json.loads(line) for line in said.splitlines()]
    assert code == 1
    assert sum(len(f["members"]["test"]) for f in facts[:-1]) == 1_012
    assert facts[-1]["leaks"] == {"WSI920": 50}


def test_check_holds_a_list_to_its_groups_and_its_names(tmp_path: Path) -> None:
    rows = [
        {"path": "s1_patch_1.png", "group": "p1", "part": "train", "patient": "a"},
        {"path": "s1_patch_2.png", "group": "p2", "part": "test", "patient": "b"},
        {"path": "s2_patch_1.png", "group": "p2", "part": "train", "patient": "c"},
    ]
    split = table(tmp_path / "split.csv", rows)
    code, said = call("check", split)
    assert code == 1
    assert "WSI920 slide 's1' is in train (1) and test (1)" in said
    assert "WSI920 group 'p2' is in train (1) and test (1)" in said
    assert call("check", split, "--group-column", "patient")[0] == 0
    assert call("check", split, "--group-pattern", r"_(\d)\.png")[0] == 0
    code, said = call("check", split, "--group-pattern", r"^(s\d)_")
    assert code == 1
    places = [{**row, "x": 10 * i, "y": 0, "width": 15, "height": 5} for i, row in enumerate(rows[:2])]
    code, said = call("check", table(split, places), "--group-column", "patient")
    assert code == 1
    assert "WSI923 tiles of slide 's1' overlap" in said


def test_folders_are_parts(tmp_path: Path, pictures: list[Image.Image]) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    for i, image in enumerate(pictures[:6]):
        image.save(tmp_path / ("train" if i < 4 else "test") / f"s{i}.png")
    (tmp_path / "test" / "notes.txt").write_text("no image")
    assert call("check", tmp_path / "train", tmp_path / "test")[0] == 0
    pictures[0].save(tmp_path / "test" / "s9.png")
    code, said = call("check", tmp_path / "train", tmp_path / "test")
    assert code == 1
    assert "WSI921 the same bytes in train (1) and test (1)" in said
    code, said = call("make", tmp_path, "-o", tmp_path / "split.csv", "--parts", "a=.5,b=.5")
    assert code == 0
    read = rows_of(tmp_path / "split.csv")
    assert all((tmp_path / r["path"]).is_file() for r in read)
    assert len(read) == 7


def test_lists_that_say_nothing_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("", "utf-8")
    assert call("check", empty)[1].startswith("WSI935")
    assert call("check", tmp_path / "gone.csv")[1].startswith("WSI935")
    bare = table(tmp_path / "bare.csv", [{"path": "a.png", "organ": ""}])
    assert call("check", bare)[1].startswith("WSI934")
    assert call("make", bare, "-o", tmp_path / "o.csv", "--stratify", "organ")[1].startswith("WSI935")
    assert call("make", bare, "-o", tmp_path / "o.csv", "--group-column", "slide")[1].startswith("WSI935")
    assert call("make", bare, "-o", tmp_path / "o.csv")[1].startswith("WSI933")
    one = table(tmp_path / "one.csv", [{"path": "a.png", "part": "train"}])
    assert call("check", one)[1].startswith("WSI934")
    empty.write_text("path,part\na.png\n", "utf-8")
    assert "line 2 has 1 values, wanted 2" in call("check", empty)[1]
    empty.write_bytes(b"\xff\xfe")
    assert "no UTF-8 text" in call("check", empty)[1]
    assert not (tmp_path / "o.csv").exists()
    assert issubclass(OutputError, WsitkError)
