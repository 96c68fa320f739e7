"""Relative flatness: recorded values, and the Hessian by brute force."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.training.flatness import FlatnessPenalty, RelativeFlatness, estimated_flatness

GOLDEN = Path(__file__).parent / "golden" / "fam"
EXPECTED = json.loads((GOLDEN / "fam_expected.json").read_text())
LAST = {"mlp": "l3", "cnn": "f2"}


class Mlp(nn.Module):
    """tanh(6-5-4)-3, the recorded net."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l3(torch.tanh(self.l2(torch.tanh(self.l1(x)))))
        return y


class Cnn(nn.Module):
    """conv3-4, conv4-6 (3x3, softplus), mean, 6-5 tanh, 5-3, the recorded net."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.f1, self.f2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.c2(F.softplus(self.c1(x))))
        y: Tensor = self.f2(torch.tanh(self.f1(x.mean(dim=(2, 3)))))
        return y


def recorded(name: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, np.ndarray]]:
    """Return the recorded net in float64, its input and labels, and all recorded arrays of it."""
    with np.load(GOLDEN / "fam.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}
    network = {"mlp": Mlp, "cnn": Cnn}[name]().double()
    prefix = "param/"
    state = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}
    network.load_state_dict(state)
    return network, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), arrays


def brute_force(loss: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Return kappa from the whole Hessian of `loss(weight)`, block by block, as the definition says."""
    hessian = torch.autograd.functional.hessian(loss, weight, create_graph=True)
    rows = weight.flatten(1)
    count, inputs = rows.shape
    blocks = hessian.reshape(count, inputs, count, inputs)
    total = weight.new_zeros(())
    for s in range(count):
        for t in range(count):
            total = total + (rows[s] @ rows[t]) * blocks[s, :, t, :].trace()
    return total / inputs


def slope(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return the gradient of `value` in all `parameters`, in one row."""
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_recorded_value_and_gradient(name: str) -> None:
    network, x, y, arrays = recorded(name)
    layer = LAST[name]
    with RelativeFlatness(network.get_submodule(layer)) as flatness:
        loss = F.cross_entropy(network(x), y)
        kappa = flatness()
    facts = EXPECTED[name]
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-12)
    assert kappa.item() == pytest.approx(facts[f"{layer}.weight"]["reference_exact_normalised"], rel=1e-12)
    kappa.backward()
    for key, parameter in network.named_parameters():
        gradient = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(
            gradient, arrays[f"{layer}.weight/grad_kappa_reference/{key}"], atol=1e-14, rtol=1e-10
        )


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_recorded_value_of_the_sigmoid_form(name: str) -> None:
    network, x, _, _ = recorded(name)
    with RelativeFlatness(network.get_submodule(LAST[name]), "sigmoid") as flatness:
        network(x)
        assert flatness().item() == pytest.approx(EXPECTED[name]["bce_exact"], rel=1e-12)


def test_recorded_value_of_a_dense_head() -> None:
    with np.load(GOLDEN / "fam.npz") as file:
        phi, weight = torch.from_numpy(file["dense/phi"]), torch.from_numpy(file["dense/W"])
    head = nn.Conv2d(4, 3, 1, bias=False).double()
    head.load_state_dict({"weight": weight[:, :, None, None]})
    with RelativeFlatness(head) as flatness:
        head(phi)
        assert flatness().item() == pytest.approx(EXPECTED["dense_1x1conv"]["exact"], rel=1e-12)


HEADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(4, 3), (7, 4), 1),
    "linear over tokens": (lambda: nn.Linear(4, 3), (2, 5, 4), 1),
    "1x1": (lambda: nn.Conv2d(4, 3, 1), (2, 4, 4, 5), 1),
    "3x3 zeros": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5), 1),
    "3x3 without padding": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5), 1),
    "3x3 reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 5), 1),
    "3x3 reflect, 2x2 pixels": (
        lambda: nn.Conv2d(2, 8, 3, padding=1, padding_mode="reflect"),
        (2, 2, 3, 4),
        2,
    ),
}


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_closed_form_is_the_brute_force_hessian(name: str, likelihood: str) -> None:
    make, shape, shuffle = HEADS[name]
    torch.manual_seed(1)
    head = make().double()
    phi = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def logits(weight: Tensor) -> Tensor:
        y = torch.func.functional_call(head, {"weight": weight}, (phi,))
        y = F.pixel_shuffle(y, shuffle) if shuffle > 1 else y
        return y.movedim(1, -1).flatten(0, -2) if isinstance(head, nn.Conv2d) else y.flatten(0, -2)

    classes = logits(head.weight).shape[1]
    labels = torch.arange(len(logits(head.weight))) % classes
    hot = F.one_hot(labels, classes).double()

    def loss(weight: Tensor) -> Tensor:
        if likelihood == "softmax":
            return F.cross_entropy(logits(weight), labels)
        return F.binary_cross_entropy_with_logits(logits(weight), hot)

    with RelativeFlatness(head, likelihood, shuffle) as flatness:  # type: ignore[arg-type]  # a parameter
        head(phi)
        kappa = flatness()
    exact = brute_force(loss, head.weight)
    torch.testing.assert_close(kappa, exact, rtol=1e-10, atol=1e-14)
    ours = torch.autograd.grad(kappa, [phi, *head.parameters()])
    theirs = torch.autograd.grad(exact, [phi, *head.parameters()])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [0.01, 0.5, 4.0, 300.0])
def test_scaling_features_up_and_weights_down_changes_nothing(scale: float) -> None:
    network, _, _, arrays = recorded("mlp")
    phi = torch.from_numpy(arrays["phi"])
    head = network.get_submodule("l3")
    assert isinstance(head, nn.Linear)
    with RelativeFlatness(head) as flatness:
        head(phi)
        before = flatness().item()
        head.weight.data /= scale
        head(scale * phi)
        assert flatness().item() == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("layer", ["c2", "f1", "f2"])
def test_the_estimate_agrees_with_the_hessian_in_value_and_gradient(layer: str) -> None:
    network, x, y, _ = recorded("cnn")
    weight = network.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    others = [p for p in network.parameters() if p.shape == weight.shape or p.ndim == 1]
    draws, batches = 16, 40
    generator = torch.Generator().manual_seed(5)
    values, slopes = [], []
    for _ in range(batches):
        estimate = estimated_flatness(F.cross_entropy(network(x), y), weight, draws, generator)
        values.append(estimate.item())
        slopes.append(slope(estimate, others))

    def loss(changed: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(network, {f"{layer}.weight": changed}, (x,)), y)

    exact = brute_force(loss, weight)
    error = np.std(values, ddof=1) / np.sqrt(batches)
    assert abs(np.mean(values) - exact.item()) < 4 * error
    reference = slope(exact, others)
    drawn = torch.stack(slopes)
    # Of some hundred entries, a few may lie four errors off; the error over all of them may not.
    off = (drawn.mean(0) - reference).norm()
    assert off < 3 * (drawn.std(0) / batches**0.5).norm()
    assert off < 0.5 * reference.norm()


def test_auto_sets_one_percent_of_the_first_loss_and_keeps_it() -> None:
    network, x, y, _ = recorded("mlp")
    with RelativeFlatness(network.get_submodule("l3")) as flatness:
        penalty = FlatnessPenalty(flatness)
        loss = F.cross_entropy(network(x), y)
        term, kappa = penalty(loss)
        assert term.item() == pytest.approx(0.01 * loss.item(), rel=1e-12)
        assert not kappa.requires_grad
        chosen = penalty.strength
        network(2 * x)
        again, other = penalty(loss)
        assert penalty.strength == chosen
        assert again.item() == pytest.approx(chosen * other.item(), rel=1e-12)
        resumed = FlatnessPenalty(flatness)
        resumed.load_state_dict(json.loads(json.dumps(penalty.state_dict())))
        network(x)
        assert resumed(100 * loss)[0].item() == pytest.approx(term.item(), rel=1e-12)


def test_auto_waits_while_the_head_is_zero() -> None:
    head = nn.Linear(3, 2)
    nn.init.zeros_(head.weight)
    with RelativeFlatness(head) as flatness:
        penalty = FlatnessPenalty(flatness)
        logits = head(torch.ones(4, 3))
        term, kappa = penalty(logits.sum())
        assert (term.item(), kappa.item(), penalty.strength) == (0, 0, None)
        nn.init.ones_(head.weight[:1])
        penalty(head(torch.ones(4, 3)).sum())
        assert penalty.strength is not None


def test_a_step_on_the_penalty_makes_the_head_flatter() -> None:
    network, x, _, _ = recorded("cnn")
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    seen = []
    with RelativeFlatness(network.get_submodule("f2")) as flatness:
        for _ in range(5):
            network(x)
            kappa = flatness()
            optimiser.zero_grad()
            kappa.backward()
            optimiser.step()
            seen.append(kappa.item())
    assert seen == sorted(seen, reverse=True)


def test_half_precision_is_measured_in_float32() -> None:
    head = nn.Conv2d(4, 3, 1)
    phi = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with RelativeFlatness(head) as flatness:
        head(phi)
        full = flatness()
        with torch.autocast("cpu", torch.bfloat16):
            head(phi)
            half = flatness()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.02)


def test_nothing_is_kept_in_evaluation_or_after_closing() -> None:
    head = nn.Linear(3, 2)
    flatness = RelativeFlatness(head)
    with pytest.raises(UsageError, match="WSI893"):
        flatness()
    with torch.no_grad():
        head(torch.ones(1, 3))
    with pytest.raises(UsageError, match="WSI893"):
        flatness()
    head(torch.ones(1, 3))
    flatness()
    with pytest.raises(UsageError, match="WSI893"):
        flatness()
    flatness.close()
    head(torch.ones(1, 3))
    with pytest.raises(UsageError, match="WSI893"):
        flatness()
    assert not head._forward_hooks


@pytest.mark.parametrize(
    ("head", "shuffle"),
    [
        (nn.ReLU(), 1),
        (nn.Linear(3, 4), 2),
        (nn.Conv2d(4, 4, 3, stride=2), 1),
        (nn.Conv2d(4, 4, 3, dilation=2), 1),
        (nn.Conv2d(4, 4, 3, groups=2), 1),
        (nn.Conv2d(4, 6, 1), 2),
        (nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"), 1),
    ],
)
def test_layers_without_a_closed_form_are_refused(head: nn.Module, shuffle: int) -> None:
    with pytest.raises(UsageError, match="WSI892"):
        RelativeFlatness(head, shuffle=shuffle)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_makes_no_sense_is_refused(strength: float) -> None:
    with pytest.raises(UsageError, match="WSI894"):
        FlatnessPenalty(lambda: torch.zeros(()), strength)
