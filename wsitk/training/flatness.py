"""Relative flatness of a network's last layer, as a regulariser (Petzka 2021; FAM, arXiv 2307.02337).

For a layer with weights W, rows w_s of d inputs, and the loss' Hessian H with respect to W,

    kappa = 1/d * sum over (s, s') of <w_s, w_s'> Tr H_(s,s')

measures how sharp the minimum is, and unlike the Hessian's trace it does not change when features are scaled
by a and weights by 1/a. For the last layer under the mean cross-entropy it has a closed form, exact and
differentiable in features and weights, with p the probabilities at a pixel and phi its features:

    softmax: kappa = 1/d     * mean ||phi||^2 (sum_s p_s ||w_s||^2 - ||sum_s p_s w_s||^2)
    sigmoid: kappa = 1/(d C) * mean ||phi||^2  sum_s p_s (1 - p_s) ||w_s||^2

It costs about as much as the layer itself. Training minimises loss + strength * kappa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.errors import UsageError

__all__ = ["relative_flatness", "estimated_flatness", "RelativeFlatness", "FlatnessPenalty"]

Likelihood = Literal["softmax", "sigmoid"]
Head = nn.Linear | nn.Conv2d


def relative_flatness(
    energy: Tensor, weight: Tensor, logits: Tensor, likelihood: Likelihood = "softmax"
) -> Tensor:
    """Return kappa, a scalar, of a last layer under the mean cross-entropy.

    `energy` (n,) is ||phi||^2 of each sample or pixel, `weight` (C, d), `logits` (n, C). Gradients flow into
    all three.
    """
    gram = weight @ weight.T
    square = gram.diagonal()
    if likelihood == "softmax":
        p = logits.softmax(dim=1)
        curvature = p @ square - ((p @ gram) * p).sum(dim=1)
    else:
        p = logits.sigmoid()
        curvature = (p * (1 - p)) @ square / len(weight)
    return (energy * curvature).mean() / weight.shape[1]


def estimated_flatness(
    loss: Tensor, weight: Tensor, draws: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return an unbiased estimate of kappa of any layer of weights (C, d, …), from `draws` Hessian products.

    E <WG, H[WG]> over random signs G (d, d) is d * kappa. Differentiable once, and about three backward
    passes a draw; `loss` must still have its graph.
    """
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    matrix = weight.flatten(1)
    inputs, total = matrix.shape[1], weight.new_zeros(())
    for _ in range(draws):
        coins = torch.randint(0, 2, (inputs, inputs), generator=generator, device=weight.device)
        moving = (matrix @ (2 * coins - 1).to(weight.dtype)).view_as(weight)
        # The product must not see that the direction depends on the weights; its share of the gradient,
        # 2 H[WG], is added by a term whose value is 0.
        direction = moving.detach()
        (product,) = torch.autograd.grad((slope * direction).sum(), weight, create_graph=True)
        total = total + (direction * product).sum() + 2 * ((moving - direction) * product.detach()).sum()
    return total / (draws * inputs)


@final
class RelativeFlatness:
    """Measures kappa of a network's head after each forward pass; a context manager that lets go of it.

    `head` is the layer that gives the logits: linear, (…, d) -> (…, C), or a convolution of any size without
    stride, dilation or groups, whose d inputs are all numbers under its kernel. With `shuffle` r its channels
    are the classes of r x r finer pixels, in `pixel_shuffle`'s order. Raises UsageError WSI892 for other
    layers.
    """

    def __init__(self, head: nn.Module, likelihood: Likelihood = "softmax", shuffle: int = 1) -> None:
        self.head = _checked(head, shuffle)
        self.likelihood: Likelihood = likelihood
        self.shuffle = shuffle
        self._seen: tuple[Tensor, Tensor] | None = None
        self._hook = self.head.register_forward_hook(self._remember)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the head and of what was seen."""
        self._hook.remove()
        self._seen = None

    def __call__(self) -> Tensor:
        """Return kappa of the batch that last went through the head, in float32 or wider.

        Raises UsageError WSI893 if there was none since the last call: a graph is used once.
        """
        if self._seen is None:
            raise UsageError("WSI893", "flatness asked for before a forward pass; run the network first")
        (features, logits), self._seen = self._seen, None
        wide = torch.promote_types(features.dtype, torch.float32)
        # Autocast would take the matrix products back to half precision.
        with torch.autocast(features.device.type, enabled=False):
            return self._measure(features.to(wide), logits.to(wide), self.head.weight.to(wide))

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = (inputs[0], output) if torch.is_grad_enabled() else None

    def _measure(self, features: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.head, nn.Linear):
            energy = features.square().sum(dim=-1).flatten()
            return relative_flatness(energy, weight, logits.flatten(0, -2), self.likelihood)
        energy = _energy_under(self.head, features).flatten()
        # Classes of different fine pixels share no sample, so the Hessian has no entries between them, and
        # kappa is the mean over the fine pixels of what each one's rows give.
        parts = self.shuffle**2
        rows = weight.reshape(-1, parts, weight[0].numel()).unbind(1)
        maps = logits.movedim(1, -1).reshape(len(energy), -1, parts).unbind(2)
        each = [relative_flatness(energy, w, z, self.likelihood) for w, z in zip(rows, maps, strict=True)]
        return torch.stack(each).mean()


@final
class FlatnessPenalty:
    """The term to add to a loss: strength * kappa.

    `strength` is a number, or ``"auto"``: then the first call sets it so that the term is `share` of the loss
    (published values run from 0.1 to 3e6, so that no number suits all). `state_dict` holds what was set, for
    runs that are resumed.
    """

    def __init__(
        self, measure: Callable[[], Tensor], strength: float | Literal["auto"] = "auto", share: float = 0.01
    ) -> None:
        if strength != "auto" and not 0 <= strength < float("inf"):
            raise UsageError("WSI894", f"--fam {strength}: wanted auto, or a number from 0 on")
        self.measure = measure
        self.share = share
        self.strength: float | None = None if strength == "auto" else float(strength)

    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return (strength * kappa to be added to `loss`, kappa detached for the log)."""
        kappa = self.measure()
        if self.strength is None:
            # A head of zeros is perfectly flat; dividing by its kappa would set an absurd strength for good.
            value = float(kappa.detach())
            if not value > 0:
                return 0 * kappa, kappa.detach()
            self.strength = self.share * float(loss.detach()) / value
        return self.strength * kappa, kappa.detach()

    def state_dict(self) -> dict[str, float | None]:
        """Return what `load_state_dict` takes."""
        return {"strength": self.strength}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore the strength that an earlier run set."""
        self.strength = state["strength"]


def _energy_under(head: nn.Conv2d, features: Tensor) -> Tensor:
    """Return ||phi||^2 (N, H, W): the sum of squares under the kernel, with the layer's own padding."""
    squares = features.square().sum(dim=1, keepdim=True)
    if head.padding_mode == "zeros":
        box = squares.new_ones(1, 1, *head.kernel_size)
        return F.conv2d(squares, box, padding=head.padding).squeeze(1)
    widths = [side for size in reversed(head.kernel_size) for side in (size // 2, size // 2)]
    padded = F.pad(squares, widths, mode=head.padding_mode)
    return F.conv2d(padded, squares.new_ones(1, 1, *head.kernel_size)).squeeze(1)


def _checked(head: nn.Module, shuffle: int) -> Head:
    """Return `head` as one of the layers whose closed form is known. Raises UsageError WSI892."""
    if isinstance(head, nn.Linear) and shuffle == 1:
        return head
    if isinstance(head, nn.Conv2d):
        plain = head.stride == head.dilation == (1, 1) and head.groups == 1
        # Zeros may be padded at will; of the other paddings, those that keep the size.
        padded = head.padding_mode == "zeros" or head.padding == tuple(k // 2 for k in head.kernel_size)
        if plain and padded and head.out_channels % shuffle**2 == 0:
            return head
    raise UsageError(
        "WSI892",
        f"flatness of {head!r} with shuffle {shuffle}; wanted the linear layer, or the convolution without "
        "stride, dilation and groups, that gives the logits",
    )
