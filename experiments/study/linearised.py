"""A batch's logits as a function of the weights, near the present ones: ``Φᵀ M``, Φ ``(K, B)``, M ``(K, n)``.

Under its statistics a deep linear network with batch norm is affine in x, so a batch enters by its first two moments
alone: eleven points that share these give the same statistics, the same coefficients ``c`` of the logits ``cᵀx̃``,
``x̃ = (x, 1)``, and their Jacobian ``M = ∂c/∂θ`` with K = 11; Φ has the columns x̃. Where samples do not interact, M has
a row for each of them, K = B, the Kronecker product of a layer's input and its output's gradient, and Φ is I.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.linalg import helmert
from torch import Tensor, nn

from kfac2.nn import ReplicatedBatchNorm, ReplicatedLinear

Pairs = Sequence[tuple[ReplicatedLinear, ReplicatedBatchNorm]]


class Linearised(NamedTuple):
    """All float64."""

    features: Tensor
    """Φ, ``(R, K, B)``."""
    T: Tensor
    """``M_i M_iᵀ`` of each layer, ``(R, L, K, K)``."""
    m: Tensor
    """``M_i 1``, ``(R, L, K)``."""
    pulled: Callable[[Tensor], list[Tensor]]
    """``M_iᵀ u_i`` of ``u`` ``(R, L, K)``: ``(R, out, in)`` of each layer."""


class Moments:
    """Of a ``ReplicatedMLP`` with batch norm and nothing else between its layers.

    Raises:
        ValueError: another network.
    """

    def __init__(self, model: nn.Module):
        self.pairs, self.last = _layers(model)
        self.weights = [*(linear.weight for linear, _ in self.pairs), self.last.weight]
        model.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._inputs = inputs[0].detach()

    @torch.no_grad()
    def linearised(self, logits: Tensor) -> Linearised:
        """At the batch whose ``logits`` these are."""
        x = self._inputs.double()
        by_layer = coefficients_jacobians(self.pairs, self.last, representatives(x))
        largest = max(M[0, 0].numel() for M in by_layer)
        filled = [nn.functional.pad(M.flatten(2), (0, largest - M[0, 0].numel())) for M in by_layer]
        jacobians = torch.stack(filled, 1)

        def pulled(u: Tensor) -> list[Tensor]:
            changes = torch.einsum("rlkn,rlk->rln", jacobians, u).unbind(1)
            return [
                change[:, : weight[0].numel()].view_as(weight)
                for change, weight in zip(changes, self.weights, strict=True)
            ]

        features = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return Linearised(features, jacobians @ jacobians.mT, jacobians.sum(-1), pulled)


class Samples:
    """Of a network of ``ReplicatedLinear`` layers, each called once, in which samples do not interact."""

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if isinstance(module, ReplicatedLinear)]
        self.weights = [layer.weight for layer in layers]
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = dict.fromkeys(layers)  # pyright: ignore
        for layer in layers:
            layer.register_forward_hook(self._see)

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._seen[layer] = (inputs[0], output)

    def linearised(self, logits: Tensor) -> Linearised:
        """At the batch whose ``logits`` ``(R, B)`` these are; their graph is kept."""
        inputs, outputs = zip(*self._seen.values(), strict=True)
        gradients = torch.autograd.grad(logits.sum(), outputs, retain_graph=True)
        pairs = [(g.double(), a.detach().double()) for g, a in zip(gradients, inputs, strict=True)]
        T = torch.stack([(g.mT @ g) * (a.mT @ a) for g, a in pairs], 1)
        m = torch.stack([g.sum(1) * a.sum(1) for g, a in pairs], 1)

        def pulled(u: Tensor) -> list[Tensor]:
            return [(g * own[:, None]) @ a.mT for (g, a), own in zip(pairs, u.unbind(1), strict=True)]

        return Linearised(torch.eye(T.shape[-1]).to(T).expand(len(T), -1, -1), T, m, pulled)


def linearisation_of(model: nn.Module) -> Moments | Samples:
    """How this network is linearised; raises ``ValueError`` if it has a batch norm and is not affine in x."""
    interacting = any(isinstance(module, ReplicatedBatchNorm) for module in model.modules())
    return (Moments if interacting else Samples)(model)


def coefficients_jacobians(pairs: Pairs, last: ReplicatedLinear, points: Tensor) -> list[Tensor]:
    """Derivatives of the coefficients c by each linear layer's weights, through the statistics of ``points``
    ``(R, d, d + 1)``: ``(R, K, out, in)``."""
    h, passed = points, []
    for linear, norm in pairs:
        z = linear.weight.double() @ h
        centred = z - z.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        gamma, beta = (p.double().view(len(h), -1, 1) for p in (norm.weight, norm.bias))
        normalised = centred * scale
        passed.append((h, normalised[:, :, None], (gamma * scale)[..., None]))
        h = gamma * normalised + beta
    extended = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    cotangents = torch.linalg.inv(extended).mT  # ∂c_k / ∂(logit of a point), (R, K, points)
    jacobians = [(cotangents @ h.mT)[:, :, None]]
    g = last.weight.double().mT[..., None] * cotangents[:, None]  # (R, features, K, points)
    for (linear, _), (h, n, scale) in zip(reversed(pairs), reversed(passed), strict=True):
        g = scale * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
        jacobians.append((g @ h.mT[:, None]).transpose(1, 2))
        g = torch.einsum("roi,rokm->rikm", linear.weight.double(), g)
    return jacobians[::-1]


def representatives(inputs: Tensor) -> Tensor:
    """``d + 1`` points ``(R, d, d + 1)`` with the mean and the covariance of ``inputs`` ``(R, d, B)``: a simplex.

    Raises:
        ValueError: fewer inputs than points.
    """
    mean = inputs.mean(-1, keepdim=True)
    centred = inputs - mean
    size = inputs.shape[1]
    if inputs.shape[-1] <= size:
        raise ValueError(
            f"a batch of {inputs.shape[-1]} samples of {size} features has no definite covariance: make "
            f"training.batch_size, and what it leaves for an epoch's last batch, at least {size + 1}"
        )
    root = torch.linalg.cholesky(centred @ centred.mT / inputs.shape[-1])
    simplex = torch.as_tensor(helmert(size + 1)).to(inputs) * (size + 1) ** 0.5
    return mean + root @ simplex


def _layers(model: nn.Module) -> tuple[Pairs, ReplicatedLinear]:
    *hidden, last = getattr(model, "layers", [model])
    linears = [module for module in hidden[::2] if isinstance(module, ReplicatedLinear)]
    norms = [module for module in hidden[1::2] if isinstance(module, ReplicatedBatchNorm)]
    if (
        2 * len(linears) != len(hidden)
        or len(norms) != len(linears)
        or not isinstance(last, ReplicatedLinear)
    ):
        raise ValueError(
            "the exact natural gradient takes linear layers with batch norm, and nothing between: "
            "problem=deep_linear_mlp problem.activation=identity problem.batch_norm=true"
        )
    return list(zip(linears, norms, strict=True)), last
