"""Files of weights: what others saved comes out as it was, what would run or expand is refused, unrun."""

from __future__ import annotations

import argparse
import functools
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from wsitk.cli.models import app
from wsitk.errors import ModelError
from wsitk.plainpickle import PLAIN_CALLS, Budget, Inert, MalformedError, interpret
from wsitk.torchfile import checked_state, read_plain, read_tensors, write_safetensors

DATA = os.environ.get("WSITK_TEST_DATA", "")
GOLDEN = Path(DATA) / "golden" / "radiology"
needs_golden = pytest.mark.skipif(
    not (DATA and GOLDEN.is_dir()), reason="WSITK_TEST_DATA has no golden/radiology"
)

STATE = {
    "conv.weight": torch.arange(12.0).reshape(3, 4),
    "conv.bias": torch.tensor([1, 2], dtype=torch.int64),
}


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items()
    )


def refusal(path: Path, read: Any = read_tensors) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


# -- what is read


@needs_golden
@pytest.mark.parametrize(
    ("name", "container", "key"),
    [
        ("universeg_plain.pt", "zip", ""),
        ("tyche_model.pt", "zip", "model"),
        ("cxas_model_module.pth", "zip", "model"),
        ("sam_med2d_optimizer_object.pth", "zip", "model"),
        ("nnunet_v1.model", "zip", "state_dict"),
        ("mirror_net.pt", "zip", "net"),
        ("legacy_nonzip.pth", "legacy", ""),
    ],
)
def test_upstream_containers_give_their_tensors(name: str, container: str, key: str) -> None:
    file = read_tensors(GOLDEN / "containers" / name)
    wanted = np.load(GOLDEN / "containers" / "expected.npz")
    assert (file.container, file.key) == (container, key)
    assert list(file.tensors) == wanted.files
    if name.startswith("sam_med2d"):
        assert file.meta["optimizer"].name == "torch.optim.adam.Adam"
    for entry, tensor in file.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), wanted[entry])


@needs_golden
def test_plan_files_are_plain_values() -> None:
    plans = read_plain(GOLDEN / "stunet" / "plan_files" / "plans.pkl")
    assert (plans["num_classes"], plans["transpose_forward"]) == (104, [0, 1, 2])
    model = read_plain(GOLDEN / "stunet" / "plan_files" / "small_ep4k.model.pkl")
    assert model["name"] == "STUNetTrainer_small"
    stage = model["plans"]["plans_per_stage"][0]
    assert np.asarray(stage["patch_size"]).tolist() == [128, 128, 128]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
     torch.int8, torch.uint8, torch.bool, torch.complex64],
)  # fmt: skip
def test_tensors_come_out_as_torch_reads_them(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    path = tmp_path / "m.pth"
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    state = {"a": base, "b": base.permute(2, 0, 1), "c": base[:, 1], "d": base[0, 0, 0], "e": base[:0],
             "f": nn.Parameter(base, requires_grad=False)}  # fmt: skip
    # views that overlap would make more of the file than it is
    state = {n: t.clone(memory_format=torch.preserve_format) if n != "f" else t for n, t in state.items()}
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=not legacy)
    found = read_tensors(path).tensors
    assert same(found, torch.load(path, weights_only=True))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_lies_beside_the_weights_is_plain(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "m.pth"
    network = nn.Linear(3, 2)
    content = {
        "epoch": np.int64(7), "best": np.float32(0.5), "curve": np.arange(6.0).reshape(2, 3),
        "args": argparse.Namespace(lr=1e-3), "size": torch.Size((1, 2)), "count": Counter({3: 1}),
        "more": defaultdict(list, {"a": [1]}), "set": {1, 2}, "bytes": b"\x00\xff", "where": Path("run"),
         "dtype": torch.float32, "object": functools.partial(print, 1),
        "state_dict": {f"module._orig_mod.{n}": t for n, t in network.state_dict().items()},
    }  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    file = read_tensors(path)
    assert same(file.tensors, network.state_dict())
    meta = file.meta
    assert (meta["epoch"], meta["best"], meta["size"], meta["count"]) == (7, 0.5, (1, 2), {3: 1})
    assert (meta["more"], meta["set"], meta["bytes"]) == ({"a": [1]}, {1, 2}, b"\x00\xff")
    np.testing.assert_array_equal(meta["curve"], content["curve"])
    assert meta["args"].name == "argparse.Namespace"
    assert meta["args"].state == {"lr": 1e-3}
    assert [meta[n].name for n in ("dtype", "object")] == ["torch.float32", "functools.partial"]
    assert isinstance(meta["where"], Inert)
    assert "state_dict" not in meta


def test_a_module_saved_whole_gives_its_state(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    network = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    torch.save(network, path)
    assert same(read_tensors(path).tensors, network.state_dict())


def test_weights_are_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"gen": STATE, "optim": {"a": STATE}, "loss": 3}, path)
    assert read_tensors(path).key == "gen"
    torch.save({"one": STATE, "two": {"x": torch.ones(3)}}, path)
    error = refusal(path)
    assert error.code == "WSI301"
    assert "'one', 'two'" in str(error)
    assert list(read_tensors(path, "two").tensors) == ["x"]
    assert refusal(path, lambda p: read_tensors(p, "three")).code == "WSI301"
    torch.save({"teacher": {"backbone": 1}, "model": {"state_dict": STATE}}, path)
    assert read_tensors(path, "model.state_dict").key == "model.state_dict"
    torch.save({"state_dict": {"w": torch.ones(3).to_sparse()}}, path)
    assert refusal(path).code == "WSI307"


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    weight = torch.randn(100, 100)
    torch.save({"encode": weight, "decode": weight, "rest": torch.ones(60_000)}, path)
    found = read_tensors(path).tensors
    assert found["encode"] is found["decode"]


def test_safetensors_are_read_and_written(tmp_path: Path) -> None:
    source, out = tmp_path / "m.pth", tmp_path / "m.safetensors"
    shared = torch.arange(6.0)
    torch.save({"model": {"module.a": shared[:3], "module.b": shared[3:].reshape(3, 1).T}}, source)
    write_safetensors(read_tensors(source), out)
    again = read_tensors(out)
    assert again.container == "safetensors"
    assert again.meta["source_sha256"] == read_tensors(source).sha256
    assert same(again.tensors, read_tensors(source).tensors)
    content = bytearray(out.read_bytes())
    content[:8] = struct.pack("<Q", 1 << 50)
    out.write_bytes(content)
    assert refusal(out).code == "WSI303"


def test_convert_on_the_command_line(tmp_path: Path) -> None:
    source, out = tmp_path / "m.pth", tmp_path / "m.safetensors"
    torch.save({"state_dict": STATE, "epoch": 3}, source, _use_new_zipfile_serialization=False)
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "2 tensors of 'state_dict'" in result.output
    assert same(read_tensors(out).tensors, dict(sorted(STATE.items())))


# -- what is refused


class Evil:
    """What an evil file holds: a call, made when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, Any]:
    touch = f"touch '{marker}'"
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Evil(os.system, (touch,)),
        "eval": Evil(eval, (code,)),
        "exec": Evil(exec, (code,)),
        "open": Evil(open, (str(marker), "w")),
        "Popen": Evil(subprocess.Popen, (["touch", str(marker)],)),
        "getattr": Evil(getattr, (Evil(__import__, ("os",)), "system")),
        "chain": Evil(map, (eval, [code])),
        "import": Evil(__import__, ("antigravity",)),
        "attrgetter": Evil(operator.attrgetter, ("system",)),
        "methodcaller": Evil(operator.methodcaller, ("system", touch)),
        "torch.load": Evil(torch.load, (str(marker),)),
        "torch.hub": Evil(torch.hub.load, ("evil/repo", "model")),
        "from_type": Evil(torch._tensor._rebuild_from_type_v2, (os.mkdir, torch.Tensor, (str(marker),), {})),
        "state": Evil(OrderedDict, (), {"x": Evil(os.mkdir, (str(marker),))}),
        "items": Evil(OrderedDict, (), None, None, iter([("k", Evil(os.mkdir, (str(marker),)))])),
        "key": {"a": [{"b": (Evil(os.mkdir, (str(marker),)),)}]},
    }


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("place", ["beside", "within", "instead"])
@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_would_run_code_is_refused_by_name(
    tmp_path: Path, name: str, container: str, place: str
) -> None:
    marker, path = tmp_path / "owned", tmp_path / "m.pth"
    evil = attacks(marker)[name]
    content = {
        "beside": {"state_dict": STATE, "extra": evil},
        "within": {"state_dict": {"w": evil}},
        "instead": evil,
    }[place]
    if container == "plain":
        path.write_bytes(pickle.dumps({"plans": evil}))
        error = refusal(path, read_plain)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
        error = refusal(path)
    assert error.code == "WSI302"
    assert "asks to call" in str(error)
    assert not marker.exists()


RAW = {
    "global": b"cposix\nsystem\n(S'touch {}'\ntR.",
    "inst": b"(S'touch {}'\niposix\nsystem\n.",
    "obj": b"(cposix\nsystem\nS'touch {}'\no.",
    "stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x07touch {}\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x07touch {}\x85R.",
    "memo": b"cposix\nsystem\np0\n0g0\n(S'touch {}'\ntR.",
    "called inert": b"cfunctools\npartial\n(cposix\nsystem\nS'touch {}'\ntR(tR.",
    "called value": b"I1\n(tR.",
    "reconstructor": b"ccopy_reg\n_reconstructor\n(csubprocess\nPopen\nc__builtin__\nobject\nNtR.",
    "newobj": b"\x80\x02csubprocess\nPopen\n)\x81.",
    "builtins getattr": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\nS'x'\ntR.",
}


@pytest.mark.parametrize("name", RAW)
def test_opcodes_written_by_hand_are_refused(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "owned", tmp_path / "m.pkl"
    pickled = RAW[name].replace(b"touch {}", b"touch %b" % os.fsencode(marker))
    text = os.fsencode(marker) + b"touch "
    pickled = pickled.replace(b"\x8c\x07touch", b"\x8c" + bytes([len(text)]) + b"touch")
    path.write_bytes(pickled)
    assert refusal(path, read_plain).code == "WSI302"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    assert refusal(path).code == "WSI302"
    assert not marker.exists()


def test_plain_files_hold_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(pickle.dumps({"args": argparse.Namespace(a=1)}))
    error = refusal(path, read_plain)
    assert error.code == "WSI302"
    assert "argparse.Namespace" in str(error)
    path.write_bytes(pickle.dumps(np.array([{}], dtype=object)))
    assert refusal(path, read_plain).code == "WSI303"


# -- what would expand


def test_a_small_file_that_expands_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"w": torch.zeros(1).expand(1 << 30)}, path)
    assert path.stat().st_size < 1600
    error = refusal(path)
    assert error.code == "WSI306"
    assert str(4 << 30) in str(error)
    torch.save({"w": torch.zeros(1).expand(1 << 30)}, path, _use_new_zipfile_serialization=False)
    assert refusal(path).code == "WSI306"


def test_a_storage_has_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    for legacy in (False, True):
        torch.save({"w": torch.zeros(250)}, path, _use_new_zipfile_serialization=not legacy)
        content = path.read_bytes()
        assert content.count(b"K\xfa") >= 2  # the storage's count and the tensor's shape, as BININT1
        path.write_bytes(content.replace(b"K\xfa", b"K\xff"))
        if not legacy:
            with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(content)) as old:
                for entry in old.infolist():
                    archive.writestr(entry.filename, old.read(entry).replace(b"K\xfa", b"K\xff"))
        assert refusal(path).code == "WSI306"


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    base = torch.zeros(100_000)
    torch.save({str(i): base[i:] for i in range(50)}, path)
    assert refusal(path).code == "WSI306"


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    assert refusal(path).code == "WSI306"


def laughs(depth: int, width: int) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = [value] * width
    return value


def test_values_that_multiply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    for bomb in (laughs(12, 10), {"a": laughs(40, 2)}):
        path.write_bytes(pickle.dumps(bomb))
        assert path.stat().st_size < 1500
        assert refusal(path, read_plain).code == "WSI306"
    loop: list[Any] = []
    loop.append(loop)
    path.write_bytes(pickle.dumps(loop))
    assert refusal(path, read_plain).code == "WSI306"
    # a text of 10 kB, encoded a thousand times
    calls = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR" * 1000
    text = b"X" + struct.pack("<I", 10_000) + b"a" * 10_000 + b"q\x00"
    path.write_bytes(b"\x80\x02(" + text + calls + b"l.")
    assert refusal(path, read_plain).code == "WSI306"
    # a tuple of tuples a hundred thousand deep, as a key: Python's hash of it would overrun the stack
    path.write_bytes(b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.")
    assert refusal(path, read_plain).code == "WSI303"
    for array in (b"K\x01", b"J\xff\xff\xff\x7f"):
        path.write_bytes(
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01("
            + array
            + b"tcnumpy\ndtype\n(X\x02\x00\x00\x00"
            b"f8tR\x89C\x00tb."
        )
        assert refusal(path, read_plain).code == "WSI306"


def test_numbers_are_not_sizes() -> None:
    for pickled in (b"c__builtin__\nbytearray\n(I9999999999\ntR.", b"c__builtin__\nlist\n(I9999999999\ntR."):
        with pytest.raises(MalformedError):
            interpret(io.BytesIO(pickled), PLAIN_CALLS, Budget(100))


# -- against Python's own

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.integers(0, 5))
def test_plain_values_survive_every_protocol(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert interpret(io.BytesIO(content), PLAIN_CALLS, Budget(10 * len(content))) == value


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_survive_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pkl"
    arrays = {
        "c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"), "text": np.array(["a", "bc"]), "none": np.empty((0, 3)),
        "flag": np.array([True, False]), "scalar": np.float16(0.5), "same": np.ones(2),
    }  # fmt: skip
    arrays["again"] = arrays["same"]
    path.write_bytes(pickle.dumps(arrays, protocol))
    found = read_plain(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert np.asarray(found[name]).dtype.kind == array.dtype.kind


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    torch.save({"model": STATE, "lr": [1e-3]}, path, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    with suppress(ModelError):
        read_tensors(path)


def test_checked_states_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(STATE, path)
    state = checked_state(read_tensors(path), STATE)
    assert [t.dtype for t in state.values()] == [torch.float32, torch.int64]
    with pytest.raises(ModelError, match="WSI301"):
        checked_state(read_tensors(path), {**STATE, "more": torch.ones(1)})
    torch.save(STATE | {"conv.weight": torch.full((3, 4), float("nan"))}, path)
    with pytest.raises(ModelError, match="WSI307"):
        checked_state(read_tensors(path), STATE)


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    assert refusal(path).code == "WSI303"
    for content in (b"", b"PK", b"<html>404</html>", json.dumps({}).encode(), pickle.dumps([1]), bytes(100)):
        path.write_bytes(content)
        assert refusal(path).code == "WSI303"
    assert refusal(tmp_path).code == "WSI303"
