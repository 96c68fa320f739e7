"""CellViT's networks against vectors recorded from the original code (see tests/golden/cellvit)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cellvit_golden import (
    CONFIGS,
    TINY_VIT,
    check_against_golden,
    check_against_statistics,
    deviations,
    filled,
    he_input,
    manifest,
    one_thread,
    quick,
)

from wsitk import torchvision_guard
from wsitk.errors import ModelError
from wsitk.models.cellvit.network import empty_network

PARAMETERS = {
    "cellvit256": 46_750_349,
    "sam_b": 146_094_557,
    "sam_l": 367_847_645,
    "sam_h": 699_741_149,
    "uni": 362_934_749,
    "virchow": 693_963_741,
    "virchow2": 693_973_981,
}
SLOW = [(name, 256, 256) for name in ("sam_b", "uni", "virchow", "sam_h")]
STATISTICS = [
    ("cellvit256", 256, 384),
    ("cellvit256", 512, 512),
    ("sam_b", 1024, 1024),
    ("sam_l", 256, 256),
    ("virchow2", 256, 256),
]
FAST = [
    ("tiny_vit", 64, 64),
    ("tiny_vit", 224, 224),
    ("tiny_vit", 96, 160),
    ("tiny_vit_reg", 64, 64),
    ("tiny_sam", 64, 64),
    ("tiny_sam", 256, 256),
    ("tiny_sam512", 64, 64),
    ("cellvit256", 256, 256),
]


@pytest.mark.parametrize(("name", "h", "w"), FAST)
def test_output_is_the_originals(name: str, h: int, w: int) -> None:
    check_against_golden(quick(name), name, h, w)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "h", "w"), SLOW)
def test_output_of_the_large_variants_is_the_originals(name: str, h: int, w: int) -> None:
    quick.cache_clear()
    check_against_golden(filled(name), name, h, w)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "h", "w"), STATISTICS)
def test_statistics_of_further_cases_are_the_originals(name: str, h: int, w: int) -> None:
    quick.cache_clear()
    check_against_statistics(filled(name), name, h, w)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_state_dict_has_the_originals_names_shapes_and_types(name: str) -> None:
    network = empty_network(CONFIGS[name])
    ours = {(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in network.state_dict().items()}
    assert ours == set(manifest(name))
    if name in PARAMETERS:
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_skip_decoders_run_once() -> None:
    network, calls = quick("tiny_vit"), []
    hooks = [
        getattr(network, f"decoder{i}").register_forward_hook(lambda *_, i=i: calls.append(i))
        for i in range(4)
    ]
    with torch.inference_mode(), one_thread():
        network(he_input(64, 64))
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == [0, 1, 2, 3]


@pytest.mark.parametrize(("h", "w"), [(14, 14), (16, 16), (9, 13)])
def test_both_fused_attentions_equal_the_packages(h: int, w: int) -> None:
    from wsitk.models.cellvit.encoders import sam

    torch.manual_seed(0)
    attention = sam.RelativeAttention(80, 2, use_rel_pos=True, input_size=(14, 14))
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(3, h, w, 80)
    with torch.inference_mode():
        wanted = super(sam.RelativeAttention, attention).forward(x)
        torch.testing.assert_close(attention(x), wanted, atol=1e-5, rtol=0)
        query, key, value = torch.randn(3, 3, 2, h * w, 40).unbind(0)
        terms = attention.relative_terms(query, h, w)
        masked = sam.masked_attention(query, key, value, *terms)
        folded = sam.folded_attention(query, key, value, *terms)
        torch.testing.assert_close(folded, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "folded"), [("tiny_vit", False), ("tiny_sam", False), ("tiny_sam", True)])
def test_half_precision_stays_near(name: str, folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsitk.models.cellvit.encoders import sam

    if folded:  # as on a GPU
        monkeypatch.setattr(sam, "masked_attention", sam.folded_attention)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), one_thread():
        out = quick(name)(he_input(64, 64))
    worst = deviations({key: value.float() for key, value in out.items()}, name, 64, 64)
    assert 1e-4 < max(d for key, d in worst.items() if "map" in key) < 0.3, worst


@pytest.mark.parametrize(
    ("name", "h", "w"), [("tiny_vit", 100, 64), ("tiny_vit", 64, 8), ("tiny_sam", 1040, 64)]
)
def test_a_tile_of_the_wrong_size_is_refused(name: str, h: int, w: int) -> None:
    with pytest.raises(ModelError, match=f"^WSI311 CellViT tile of {h} x {w} px: wanted .*multiples of 16"):
        empty_network(CONFIGS[name])(torch.zeros(1, 3, h, w, device="meta"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 10**9}, "depth is 1000000000, wanted 1 to 64"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"num_heads": 5}, "embed_dim 96 is not a multiple of num_heads 5"),
        ({"extract_layers": (1, 2, 2, 4)}, "wanted four ascending blocks"),
        ({"extract_layers": (1, 2, 3, 5)}, "wanted four ascending blocks of 1 to 4"),
        ({"extract_layers": (0, 2, 3, 4)}, "wanted four ascending blocks"),
        ({"nuclei_classes": 10**6}, "nuclei_classes is 1000000"),
    ],
)
def test_an_impossible_architecture_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TINY_VIT, **change)


def test_heavy_libraries_are_imported_by_those_who_need_them_only() -> None:
    code = """
import sys
import wsitk.torchvision_guard
assert "torch" not in sys.modules
from wsitk.models.cellvit.network import VARIANTS, empty_network
empty_network(VARIANTS["CellViT-256"])
assert not {"timm", "segment_anything", "torchvision"} & sys.modules.keys()
state = wsitk.torchvision_guard.ensure_torchvision()
import timm, segment_anything, torchvision
assert (state == "native") == torchvision.extension._has_ops(), state
assert wsitk.torchvision_guard.ensure_torchvision() == state
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_guard, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"^WSI309 torchvision is not installed; install it"):
        torchvision_guard.ensure_torchvision.__wrapped__()
