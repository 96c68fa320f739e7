"""CellViT's checkpoint files: good ones load as they are, all others are refused with a reason."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cellvit_golden import TINY_VIT, check_against_golden, filled_state, manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.errors import ModelError
from wsitk.models.cellvit.checkpoint import PANNUKE, load_checkpoint
from wsitk.torchfile import checked_state, read_tensors

CONFIG_256 = {
    "data.dataset": "PanNuke",
    "data.num_nuclei_classes": 6,
    "data.num_tissue_classes": 19,
    "data.magnification": 40,
    "model.backbone": "ViT256",
    "training.mixed_precision": True,
    "transformations.normalize.mean": [0.5, 0.5, 0.5],
    "transformations.normalize.std": [0.5, 0.5, 0.5],
    "dataset_config.nuclei_types.Background": 0,
    "dataset_config.nuclei_types.Neoplastic": 1,
    "dataset_config.nuclei_types.Inflammatory": 2,
    "dataset_config.nuclei_types.Connective": 3,
    "dataset_config.nuclei_types.Dead": 4,
    "dataset_config.nuclei_types.Epithelial": 5,
}
CONFIG_TINY = {
    "data.num_nuclei_classes": 6,
    "data.num_tissue_classes": 19,
    "model.embed_dim": 96,
    "model.depth": 4,
    "model.num_heads": 3,
    "model.extract_layers": [1, 2, 3, 4],
}
SMALL = {"w": torch.zeros(2, 3), "n": torch.zeros((), dtype=torch.int64)}


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Any]:
    """Save one checkpoint, and delete it afterwards: pytest keeps its folders."""
    path = tmp_path / "model.pth"

    def save(content: object) -> Path:
        torch.save(content, path)
        return path

    yield save
    path.unlink(missing_ok=True)


def tiny_shapes() -> dict[str, torch.Tensor]:
    """Return the tiny network's state with every entry's right shape, and next to nothing stored."""
    kinds = {"int64": torch.int64, "float32": torch.float32}
    return {
        name: torch.zeros((), dtype=kinds[dtype]).expand(shape) for name, shape, dtype in manifest("tiny_vit")
    }


def as_upstream_saves(
    arch: str, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    return {
        "arch": arch,
        "epoch": 129,
        "model_state_dict": dict(state),
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(7)}},
            "param_groups": [{"lr": 3e-4, "betas": (0.85, 0.95), "params": [0]}],
        },
        "scheduler_state_dict": {"gamma": 0.85, "_last_lr": [3e-4]},
        "best_metric": np.float64(0.5),
        "best_epoch": np.int64(12),
        "config": dict(config),
        "wandb_id": None,
        "logdir": "logs",
        "run_name": "run",
        "scaler_state_dict": {"scale": 65536.0},
    }


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


def test_a_published_checkpoint_loads_and_predicts_as_the_original(saved: Any) -> None:
    path = saved(as_upstream_saves("CellViT256", CONFIG_256, filled_state("cellvit256")))
    network, info = load_checkpoint(path)
    assert (info.arch, info.variant, info.magnification, info.spacing_um) == (
        "CellViT256",
        "CellViT-256",
        40,
        0.25,
    )
    assert (info.mean, info.std, info.mixed_precision) == ((0.5,) * 3, (0.5,) * 3, True)
    assert info.classes == PANNUKE
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not network.training
    path.write_bytes(b"")  # the weights are copies: what happens to the file later is of no consequence
    check_against_golden(network, "cellvit256", 224, 224)


def test_a_generic_checkpoint_states_its_own_architecture(saved: Any) -> None:
    extra = {
        "data.num_nuclei_classes": 6,
        "data.magnification": 20,
        "dataset_config.nuclei_types.Neoplastic": 2,
        "dataset_config.nuclei_types.pale. cell": 1,
    }
    halves = {k: v.half() if v.is_floating_point() else v for k, v in filled_state("tiny_vit").items()}
    network, info = load_checkpoint(saved(as_upstream_saves("CellViT", CONFIG_TINY | extra, halves)))
    assert (info.variant, info.config, info.spacing_um, info.mixed_precision) == (
        "CellViT",
        TINY_VIT,
        0.5,
        False,
    )
    names = [c.name for c in info.classes]
    assert names == ["pale. cell", "Neoplastic", "class 3", "class 4", "class 5"]
    assert info.classes[1].color == PANNUKE[0].color
    assert {v.dtype for v in network.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("arch", "change", "said"),
    [
        ("CellViT256Shared", {}, "is a 'CellViT256Shared'; wanted one of CellViT, CellViT256, CellViTSAM"),
        ("CellViTSAM", {}, "is a 'CellViTSAM' with backbone None"),
        ("CellViTSAM", {"model.backbone": "SAM-X"}, "is a 'CellViTSAM' with backbone 'SAM-X'"),
        ("two\nlines", {}, r"is a 'two\nlines'"),
        ("CellViTUNI", {"data.num_tissue_classes": "19"}, "is '19', wanted a whole number"),
        ("CellViT", {"model.depth": 10**9}, "depth is 1000000000"),
        ("CellViT", {"model.depth": None}, "config 'model.depth' is 'None', wanted a whole number"),
        ("CellViT", {"model.extract_layers": [1, 2, 3]}, "wanted four block numbers"),
        ("CellViT", {"model.extract_layers": [True, 2, 3, 4]}, "wanted four block numbers"),
        ("CellViT", {"transformations.normalize.mean": [0.5]}, "wanted three numbers"),
        ("CellViT", {"dataset_config.nuclei_types.Odd": 6}, "wanted a channel of its own, 0 to 5"),
        ("CellViT", {"dataset_config.nuclei_types.A": 1, "dataset_config.nuclei_types.B": 1}, "of its own"),
        (None, {}, "names no arch and config"),
    ],
)
def test_a_configuration_that_is_no_cellvits_is_refused(
    saved: Any, arch: str, change: Any, said: str
) -> None:
    error = refusal(saved(as_upstream_saves(arch, CONFIG_TINY | change, {})))
    assert error.code == "WSI304"
    assert said in str(error)


def test_weights_of_another_network_are_refused(saved: Any) -> None:
    state = {name: torch.zeros(1) for name in tiny_shapes()}
    del state["encoder.norm.bias"]
    error = refusal(saved(as_upstream_saves("CellViT", CONFIG_TINY, state | {"extra": torch.zeros(1)})))
    assert error.code == "WSI301"
    assert "1 missing ('encoder.norm.bias') and 1 unknown ('extra') of 343 entries" in str(error)
    state = {"encoder.norm.bias": torch.zeros(97)} | state
    error = refusal(saved(as_upstream_saves("CellViT", CONFIG_TINY, state)))
    assert error.code == "WSI301"
    assert "'encoder.norm.bias' has shape (97,), wanted (96,)" in str(error)
    content = as_upstream_saves("CellViT", CONFIG_TINY, state)
    del content["model_state_dict"]
    assert refusal(saved(content)).code == "WSI301"


def test_a_checkpoint_that_expands_is_refused_before_it_does(saved: Any) -> None:
    path = saved(as_upstream_saves("CellViT", CONFIG_TINY, tiny_shapes()))
    assert path.stat().st_size < 1_000_000  # of 94 MB that its tensors claim
    assert refusal(path).code == "WSI306"


def refused_state(path: Path, state: object, wanted: Mapping[str, torch.Tensor] = SMALL) -> str:
    torch.save({"model_state_dict": state}, path)
    with pytest.raises(ModelError) as caught:
        checked_state(read_tensors(path), wanted)
    return caught.value.code


def test_state_entries_are_checked_one_by_one_and_together(tmp_path: Path) -> None:
    path, whole, count = tmp_path / "m.pth", torch.zeros(2, 3), torch.tensor(1)
    torch.save({"model_state_dict": {"w": whole.half(), "n": count.int()}}, path)
    state = checked_state(read_tensors(path), SMALL)
    assert [(k, v.dtype) for k, v in state.items()] == [("w", torch.float32), ("n", torch.int64)]
    assert refused_state(path, {"w": whole}) == "WSI301"
    assert refused_state(path, {"w": whole.T, "n": count}) == "WSI301"
    assert refused_state(path, [1]) == "WSI301"
    assert refused_state(path, {"w": torch.zeros(1).expand(2, 3), "n": count}) == "WSI306"
    shared = torch.zeros(50_000)
    many = {str(i): shared for i in range(100)}
    assert refused_state(path, many, many) == "WSI306"
    for wrong in ("text", whole.int(), whole.to_sparse(), whole.to(torch.complex64)):
        assert refused_state(path, {"w": wrong, "n": count}) == "WSI307"
    for value in (float("nan"), float("inf")):
        assert refused_state(path, {"w": torch.full((2, 3), value), "n": count}) == "WSI307"


class Attack:
    """What an evil file holds: a call, made when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["best_metric", "config", "model_state_dict"])
def test_a_file_that_would_run_code_is_refused_unrun(saved: Any, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "owned"
    for call in (
        (os.system, (f"touch '{marker}'",)),
        (eval, (f"open({str(marker)!r}, 'w')",)),
        (os.mkdir, (str(marker),)),
    ):
        content = as_upstream_saves("CellViT", CONFIG_TINY, {}) | {place: Attack(*call)}
        error = refusal(saved(content))
        assert error.code == "WSI302"
        assert call[0].__name__ in str(error)
        assert not marker.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    assert "No such file" in str(refusal(path))
    for content in (b"", b"<html>404</html>", pickle.dumps({"arch": "CellViT"}), os.urandom(4096)):
        path.write_bytes(content)
        assert refusal(path).code == "WSI303"
    torch.save(torch.zeros(3), path)
    assert "it holds a Tensor; wanted a dict" in str(refusal(path))
    torch.save({"arch": "CellViT"}, path, _use_new_zipfile_serialization=False)
    assert refusal(path).code == "WSI301"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    assert refusal(path).code == "WSI306"
    path.unlink()
    assert refusal(tmp_path).code == "WSI303"


def rewritten(path: Path, change: Any) -> None:
    """Rewrite a checkpoint with each part's bytes passed through `change(name, bytes)`."""
    with zipfile.ZipFile(path) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts:
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_beside_the_weights_are_plain_values(tmp_path: Path, module: bytes) -> None:
    path = tmp_path / "m.pth"
    scalars = [np.float64(0.25), np.float32(0.5), np.int64(7), np.int32(-1), np.bool_(True)]
    torch.save({"best_metric": scalars, "model_state_dict": {}}, path)
    names = (b"numpy.core.multiarray", b"numpy._core.multiarray")

    def rename(name: str, content: bytes) -> bytes:
        if name.endswith("data.pkl"):
            for old in names:
                content = content.replace(b"c" + old + b"\n", b"c" + module + b"\n")
            assert module in content
        return content

    rewritten(path, rename)
    assert read_tensors(path).meta["best_metric"] == scalars


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("damage") / "m.pth"
    torch.save({"config": {"a": 1}, "model_state_dict": {"w": torch.ones(2, 3), "n": torch.tensor(1)}}, path)
    return path, path.read_bytes()


@settings(max_examples=300)
@given(st.data())
def test_damage_is_noticed_or_without_effect(small_file: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = small_file
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        damaged[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(
        damaged[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 1]))]
    )
    with suppress(ModelError):  # and nothing else
        state = checked_state(read_tensors(path), SMALL)
        assert torch.equal(state["w"], torch.ones(2, 3))
        assert state["n"] == 1
