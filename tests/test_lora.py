"""LoRA: adapters that start as nothing, learn alone, and vanish into plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from cellvit_golden import TINY_SAM, TINY_VIT, one_thread
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.models.cellvit.compact import TinyViTEncoder
from wsitk.models.cellvit.config import CellViTConfig
from wsitk.models.cellvit.encoders import build_encoder
from wsitk.models.cellvit.training.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    load_lora_state,
    lora_names,
    lora_state,
    merge_lora,
)

TINY_TIMM = CellViTConfig("timm", 48, 4, 3, (1, 2, 3, 4), patch=14, packed_glu=True, register_tokens=2)
# Encoder, side of its image, and how many linear layers take adapters: without and with the perceptrons.
ENCODERS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "vit": (lambda: build_encoder(TINY_VIT), 32, 8, 16),
    "sam": (lambda: build_encoder(TINY_SAM), 64, 8, 16),
    "timm": (lambda: build_encoder(TINY_TIMM), 28, 8, 16),
    "compact": (TinyViTEncoder, 256, 20, 40),
}
CONFIG = LoraConfig(rank=3, alpha=6.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return an encoder in evaluation mode, none of whose layers is trivial, and an image for it."""
    torch.manual_seed(3)
    make, side, _, _ = ENCODERS[name]
    encoder = make().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder, torch.randn(1, 3, side, side)


def outputs(encoder: nn.Module, x: Tensor) -> Tensor:
    found = encoder(x)
    maps = found[0] if isinstance(found, tuple) else found
    return torch.cat([m.flatten() for m in maps])


def stirred(encoder: nn.Module) -> None:
    """Give the adapters weights as large as a long training would."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name in lora_names(encoder):
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_adapters_start_as_nothing_and_merge_exactly(name: str, mlp: bool) -> None:
    encoder, x = made(name)
    names = list(encoder.state_dict())
    with torch.no_grad():
        plain = outputs(encoder, x)
        added = add_lora(encoder, replace(CONFIG, mlp=mlp))
        assert len(added) == 2 * ENCODERS[name][3 if mlp else 2]
        assert torch.equal(outputs(encoder, x), plain)
    stirred(encoder)
    with torch.inference_mode():
        adapted = outputs(encoder, x)
    assert (adapted - plain).abs().max() > 1e-3
    merged = copy.deepcopy(encoder)
    assert merge_lora(merged) == len(added) // 2
    assert list(merged.state_dict()) == names
    assert all(p.requires_grad for p in merged.parameters())
    with torch.inference_mode():
        off = (outputs(merged, x) - adapted).abs().max() / adapted.abs().max()
        assert off < 1e-6
    wide, y = encoder.double(), x.double()
    with torch.inference_mode():
        before = outputs(wide, y)
        merge_lora(wide)
        torch.testing.assert_close(outputs(wide, y), before, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_only_adapters_learn(name: str) -> None:
    encoder, x = made(name)
    added = add_lora(encoder, CONFIG)
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == set(added)
    rest = {n: p.clone() for n, p in encoder.named_parameters() if n not in added}
    optimiser = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = (outputs(encoder, x) - 1).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    now = dict(encoder.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in rest.items())
    assert all(now[n].grad is not None for n in added)


def test_a_layer_is_base_plus_scaled_product() -> None:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(5, 4).double()
    layer = LoraLinear(base, LoraConfig(rank=2, alpha=3.0), generator)
    with torch.no_grad():
        layer.up.normal_(generator=generator)
    x = torch.randn(7, 5, dtype=torch.float64)
    by_hand = x @ (base.weight + 1.5 * layer.up @ layer.down).T + base.bias
    torch.testing.assert_close(layer(x), by_hand)
    torch.testing.assert_close(layer.merged()(x), by_hand)


def test_half_precision_layers_merge_to_the_nearest_half() -> None:
    layer = LoraLinear(nn.Linear(5, 4).bfloat16(), CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.up.fill_(0.3)
    exact = layer.base.weight.double() + 2.0 * layer.up.double() @ layer.down.double()
    assert torch.equal(layer.merged().weight, exact.bfloat16())


def test_the_seed_decides_the_adapters_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, third = (nn.ModuleDict({"qkv": nn.Linear(6, 18)}) for _ in range(3))
    torch.set_rng_state(state)
    for encoder, seed in ((first, 1), (second, 1), (third, 2)):
        add_lora(encoder, replace(CONFIG, seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(lora_state(first)["qkv.down"], lora_state(second)["qkv.down"])
    assert not torch.equal(lora_state(first)["qkv.down"], lora_state(third)["qkv.down"])


def test_dropout_is_on_in_training_only() -> None:
    encoder = nn.ModuleDict({"qkv": nn.Linear(6, 18)})
    add_lora(encoder, replace(CONFIG, dropout=0.5))
    stirred(encoder)
    x = torch.ones(2, 6)
    layer = encoder["qkv"]
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapters_alone_carry_a_tuning() -> None:
    encoder, x = made("vit")
    other = copy.deepcopy(encoder)
    add_lora(encoder, CONFIG)
    stirred(encoder)
    state = lora_state(encoder)
    assert sum(v.numel() for v in state.values()) < 0.1 * sum(p.numel() for p in encoder.parameters())
    add_lora(other, replace(CONFIG, seed=5))
    load_lora_state(other, state)
    with torch.inference_mode():
        assert torch.equal(outputs(other, x), outputs(encoder, x))
    with pytest.raises(UsageError, match="WSI899"):
        load_lora_state(other, {n: v for n, v in state.items() if "blocks.0" not in n})
    wider = copy.deepcopy(other)
    merge_lora(wider)
    add_lora(wider, replace(CONFIG, rank=4))
    with pytest.raises(UsageError, match="WSI899"):
        load_lora_state(wider, state)


def test_places_without_adapters_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI898"):
        add_lora(nn.Sequential(nn.Linear(3, 3)), CONFIG)
    encoder = nn.ModuleDict({"qkv": nn.Linear(6, 18), "proj": nn.Conv2d(3, 6, 2)})
    assert add_lora(encoder, CONFIG) == ("qkv.down", "qkv.up")
    with pytest.raises(UsageError, match="WSI898"):
        add_lora(encoder, CONFIG)
    assert merge_lora(nn.Linear(3, 3)) == 0


@pytest.mark.parametrize("change", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"dropout": 1.0}])
def test_settings_that_make_no_sense_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted a rank"):
        LoraConfig(**change)  # type: ignore[arg-type]  # of mixed types
