"""No documented code is unreached: each is named by a test, and those that no other test names are raised here."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from faults.cases import CASES
from PIL import Image
from typer.testing import CliRunner

import wsitk
from wsitk.cli.main import app
from wsitk.device import choose_device
from wsitk.errors import WsitkError
from wsitk.evaluation.label_files import LabelReader
from wsitk.evaluation.run import Evaluation
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.model import FieldSpec, TileModel, TileResult
from wsitk.outcome import known_error
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.plan import working_image
from wsitk.record import InputRow
from wsitk.settings import Settings
from wsitk.sources.array import ArraySource
from wsitk.sources.base import Reading
from wsitk.sources.nifti import import_reader
from wsitk.testing import OracleModel, SyntheticSlide

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"\bWSI\d{3}\b")
PLAIN: dict[str, Any] = {"tissue": "none", "threads": 1, "preview": False}
SLIDE = SyntheticSlide.make((260, 300), count=30, seed=4)


def test_every_documented_code_is_named_by_a_test() -> None:
    documented = re.findall(r"^\| (WSI\d{3}) \|", (ROOT / "docs" / "errors.md").read_text("utf-8"), re.M)
    others = [p for p in (ROOT / "tests").rglob("*.py") if p.name != "test_docs.py"]
    named = {code for path in others for code in CODE.findall(path.read_text("utf-8"))}
    assert [code for code in documented if code not in named] == [], "write a test that reaches them"
    assert len(CASES) >= 150


def reached(code: str) -> Any:
    """Expect one of our errors, of this code and in one line."""
    return pytest.raises(WsitkError, match=rf"^{code} [^\n]+$")


# --- the command and the call -------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "code"), [(["--part", "4/4"], "WSI016"), (["--option", "3"], "WSI031")])
def test_options_that_make_no_sense(tmp_path: Path, words: list[str], code: str) -> None:
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, SLIDE.pixels, tile=(128, 128), photometric="rgb")
    done = CliRunner().invoke(app, ["run", "cellvit", str(path), "-o", str(tmp_path / "out"), *words])
    assert isinstance(done.exception, WsitkError)
    assert done.exception.code == code
    assert not (tmp_path / "out").exists()


def test_a_model_by_name_reads_files_only(tmp_path: Path) -> None:
    source = wsitk.open_source(SLIDE.pixels, mpp=0.25, name="array")
    runner = Runner(ModelRef("wsitk.testing:OracleModel"), tmp_path / "out", Settings(**PLAIN))
    (row,) = runner.run([Input("array", source)])
    assert row.code == "WSI025"


def test_a_builder_knows_its_options() -> None:
    with reached("WSI031"):
        wsitk.load_model("cellvit", wings=2)


def test_two_packages_may_not_claim_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("cellvit", "elsewhere:build", "wsitk.models")]
    monkeypatch.setattr("wsitk.registry.entry_points", lambda group: points)
    with reached("WSI305"):
        wsitk.load_model("cellvit")


def test_a_device_that_is_not_there() -> None:
    with reached("WSI330"):
        choose_device("abacus")


def test_what_nobody_foresaw_asks_to_be_reported() -> None:
    with reached("WSI412"):
        raise known_error("a.svs", KeyError("x"))


def test_a_figure_that_is_not_there() -> None:
    with reached("WSI833"):
        Evaluation.figure(SimpleNamespace(figures=()), "beauty")  # type: ignore[arg-type]  # all that it looks at


def test_labels_too_large_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros((20, 20), np.int32))
    monkeypatch.setattr("wsitk.evaluation.label_files.LARGEST", 399)
    with reached("WSI834"):
        LabelReader().read(tmp_path / "a.npy")


# --- what is not installed ----------------------------------------------------------------------------


def test_readers_that_are_not_installed() -> None:
    with reached("WSI149"):
        import_reader("a.nii", "no_such_package.of_readers")


def test_writers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsitk.frame import Frame
    from wsitk.writers.labels import LabelClass
    from wsitk.writers.nifti import write_nifti

    kinds = [LabelClass(1, "spleen", (1, 2, 3))]
    monkeypatch.setitem(sys.modules, "nibabel.nifti1", None)
    frame = Frame.from_nifti_affine(np.eye(4))
    with reached("WSI530"):
        write_nifti(
            tmp_path / "a.nii", (2, 2, 2), frame, kinds, lambda region: np.zeros(region.shape, np.uint8)
        )


def test_networks_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsitk.models.monai_bundle.config import read_file
    from wsitk.models.nnunet.network import KINDS, build_unet

    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures", None)
    with reached("WSI342"):
        build_unet(next(iter(KINDS)), {}, 1, 2)
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yaml").write_text("a: 1")
    with reached("WSI365"):
        read_file(tmp_path / "a.yaml")


# --- models that do what they should not ---------------------------------------------------------------


class Odd(TileModel):
    """The oracle, whose network gives or raises what it is told to."""

    def __init__(self, outcome: Any = None, **spec: Any) -> None:
        from dataclasses import replace

        self._oracle = OracleModel(tile=(192, 192), halo=(32, 32))
        self.spec = replace(self._oracle.spec, **spec)
        self._outcome = outcome

    @property
    def network(self) -> torch.nn.Module:
        return self._oracle.network

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return {k: v.float() * float("nan") for k, v in self._oracle.predict(batch).items()}

    def postprocess(self, outputs: Mapping[str, np.ndarray[Any, Any]], tile: Tile) -> TileResult:
        shape = tile.read.shape
        return TileResult(
            None, {f.name: np.zeros((len(f.channels), *shape), np.float32) for f in self.spec.fields}
        )


def run(model: TileModel, out: Path, source: ArraySource | None = None) -> InputRow:
    given = source or wsitk.open_source(SLIDE.pixels, mpp=0.5, name="a")
    (row,) = Runner(model, out, Settings(**PLAIN)).run([Input("a", given)])
    return row


def reasons(out: Path) -> set[str]:
    return {
        text.split()[0] for text in pq.read_table(out / "a" / "tiles.parquet")["reason"].to_pylist() if text
    }


def test_tiles_that_the_model_cannot_do(tmp_path: Path) -> None:
    assert run(Odd(), tmp_path / "nan").code == "WSI411"
    assert reasons(tmp_path / "nan") == {"WSI310"}
    assert run(Odd(torch.OutOfMemoryError("too large")), tmp_path / "full").code == "WSI411"
    assert reasons(tmp_path / "full") == {"WSI320"}


class Hollow(ArraySource):
    """A slide whose left half is not in its file."""

    def read_inside(self, region: Region, level: int) -> Reading:
        pixels = super().read_inside(region, level).pixels
        columns = np.arange(region.start[1], region.stop[1]) < 200
        return Reading(pixels, np.broadcast_to(columns, region.shape).copy())


def test_tiles_that_the_file_does_not_hold(tmp_path: Path) -> None:
    source = Hollow(SLIDE.pixels, axes="yxc", spacing=0.5)
    assert run(OracleModel(tile=(192, 192), halo=(32, 32)), tmp_path, source).status == "done"
    assert reasons(tmp_path) == {"WSI110"}


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    volume = ArraySource(np.zeros((20, 20, 20, 3), np.uint8), axes="zyxc", spacing=1000.0)
    assert run(OracleModel(tile=(192, 192), halo=(32, 32)), tmp_path / "volume", volume).code == "WSI113"
    clipped = Odd(border="clip", compute_batch=2)
    with reached("WSI334"):
        working_image(wsitk.open_source(SLIDE.pixels, mpp=0.5), clipped.spec)


def test_a_block_that_no_worker_can_do() -> None:
    pytest.importorskip("distributed")
    from wsitk.work import cluster

    unit = (SimpleNamespace(input="a.svs", block=3),)
    work = SimpleNamespace(_forget=lambda name: None, _client=SimpleNamespace(status="running"))
    with reached("WSI402"):
        sent = cluster._Sent(unit, lost=cluster.TRIES)  # type: ignore[arg-type]  # all that it looks at
        cluster.WorkCluster._lose(work, sent, TimeoutError())  # type: ignore[arg-type]
    with reached("WSI404"):
        sent = cluster._Sent(unit, failed=cluster.FAILURES - 1)  # type: ignore[arg-type]
        cluster.WorkCluster._fail(work, sent, RuntimeError("x"))  # type: ignore[arg-type]


def test_fields_of_two_types(tmp_path: Path) -> None:
    class Calm(Odd):
        def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {k: v.float() for k, v in self._oracle.predict(batch).items()}

    fields = (FieldSpec("a", ("a",), dtype="uint8"), FieldSpec("b", ("b",), dtype="float32"))
    assert run(Calm(fields=fields, classes=()), tmp_path).code == "WSI335"


# --- training ------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    from wsitk.training.state import write_tensors

    with reached("WSI867"):
        write_tensors(tmp_path / "no" / "such" / "a.safetensors", {"w": torch.zeros(1)}, {})


def test_a_weights_file_of_numbers_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsitk.cli.models import app as models

    monkeypatch.setattr("wsitk.registry.load_model", lambda name: Odd())
    done = CliRunner().invoke(models, ["check", "odd"])
    assert isinstance(done.exception, WsitkError)
    assert done.exception.code == "WSI310"


def patches(folder: Path, names: str, size: int = 32) -> Path:
    """Write images and masks of a nucleus each; a name in capitals has no mask."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    mask = np.zeros((size, size), np.uint16)
    mask[8:20, 8:20] = 1
    for name in names:
        Image.fromarray(np.full((size, size, 3), 200, np.uint8)).save(folder / "images" / f"s_{name}.png")
        if name.islower():
            Image.fromarray(mask).save(folder / "masks" / f"s_{name}.png")
    (folder / "classes.toml").write_text("spacing_um = 0.5\n")
    return folder


def test_settings_that_do_not_fit_the_data(tmp_path: Path) -> None:
    from dataclasses import replace

    from wsitk.models.cellvit.training.build import types_of
    from wsitk.models.cellvit.training.classify import ClassifyConfig, train_classifier
    from wsitk.models.cellvit.training.config import DataConfig, NetworkConfig, TrainConfig
    from wsitk.models.cellvit.training.export import write_upstream
    from wsitk.models.cellvit.training.run import prepare

    with reached("WSI870"):
        types_of(NetworkConfig(types=True), ())
    odd = TrainConfig(data=DataConfig(spacing_um=0.3))
    with reached("WSI873"):
        write_upstream(tmp_path / "a.pth", torch.nn.Identity(), (), odd)
    folder = patches(tmp_path / "data", "abC", 256)
    (folder / "samples.csv").write_text("file,group\ns_a.png,one\ns_b.png,one\n")
    data = DataConfig(spacing_um=0.5, crop=256, held_out=0.5)
    said = "\n".join(prepare([folder], TrainConfig(data=data)).warnings)
    assert "WSI875" in said
    assert "WSI917" in said
    with reached("WSI877"):
        prepare([folder], TrainConfig(data=replace(data, crop=50)))
    with reached("WSI876"):
        train_classifier([folder], tmp_path / "out", "cellvit", ClassifyConfig(data=replace(data, crop=256)))


def test_slides_that_are_drawn_on_in_other_ways(tmp_path: Path) -> None:
    import shapely
    from test_training_data import feature, nuclei_of, write_slide

    from wsitk.models.cellvit.training.slides import Slides

    drawn = [*nuclei_of(SLIDE.labels), feature(shapely.box(0, 0, 500, 260), "Tumor", "annotation")]
    grey = Slides(write_slide(tmp_path, SLIDE.pixels[..., 0], drawn), side=128)
    assert any(warning.startswith("WSI908") for warning in grey.warnings)
    with reached("WSI911"):
        grey.read(0)
