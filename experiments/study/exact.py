"""Exact damped natural gradient on the deep linear MLP, with and without curvature between layers.

Under its statistics the network is affine in x, so a batch enters by its first two moments alone: eleven points that
share these give the same statistics, the same coefficients ``c`` of the logits ``cᵀx̃``, ``x̃ = (x, 1)``, and their
Jacobian ``M = ∂c/∂θ``, ``(K, n)`` with K = 11. The batch's Fisher through its statistics is ``F = Mᵀ S M`` with
``S = (1/B) Σ p (1 - p) x̃ x̃ᵀ``, its gradient ``g = Mᵀ r`` with ``r = (1/B) Σ (p - y) x̃``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy.linalg import helmert
from torch import Tensor, nn

from experiments.study.directions import CORRECTIONS, Curvature, block_diagonal, full, times
from kfac2.nn import ReplicatedBatchNorm, ReplicatedLinear


class Affine(NamedTuple):
    """The network as a function of its parameters at one batch's statistics."""

    jacobians: Tensor
    """M_i of each linear layer's weights, ``(R, L, K, out · in)``, filled up with zeros to the largest layer's size."""
    norms: Tensor
    """The same of each norm's scale and shift, ``(R, L - 1, features, K, 2)``."""


def linearise(
    pairs: Sequence[tuple[ReplicatedLinear, ReplicatedBatchNorm]], last: ReplicatedLinear, points: Tensor
) -> Affine:
    """Derivatives of the coefficients c by all parameters, through the statistics of ``points`` ``(R, d, d + 1)``."""
    h, passed = points, []
    for linear, norm in pairs:
        z = linear.weight.double() @ h
        centred = z - z.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        gamma, beta = (p.double().view(len(h), -1, 1) for p in (norm.weight, norm.bias))
        normalised = centred * scale
        passed.append((h, normalised, (gamma * scale)[..., None]))
        h = gamma * normalised + beta
    extended = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    cotangents = torch.linalg.inv(extended).mT  # ∂c_k / ∂(logit of a point), (R, K, points)
    jacobians, norms = [cotangents @ h.mT], []
    g = last.weight.double().mT[..., None] * cotangents[:, None]  # (R, features, K, points)
    for (linear, _), (h, n, scale) in zip(reversed(pairs), reversed(passed), strict=True):
        n = n[:, :, None]
        along = (g * n).mean(-1, keepdim=True)
        norms.append(torch.cat([along, g.mean(-1, keepdim=True)], -1) * g.shape[-1])
        g = scale * (g - g.mean(-1, keepdim=True) - n * along)
        jacobians.append((g @ h.mT[:, None]).transpose(1, 2).flatten(2))
        g = torch.einsum("roi,rokm->rikm", linear.weight.double(), g)
    largest = max(m.shape[-1] for m in jacobians)
    filled = [nn.functional.pad(m, (0, largest - m.shape[-1])) for m in reversed(jacobians)]
    none = points.new_zeros(len(points), 0, 0, points.shape[-1], 2)
    return Affine(torch.stack(filled, 1), torch.stack(norms[::-1], 1) if norms else none)


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


class ExactNaturalGradient(torch.optim.Optimizer):
    """Steps along an exact direction, ``lr`` times as long as the quadratic model's best: ``α* = gᵀd / dᵀF_λd``.

    Norms' scales and shifts are not in F; they take plain gradient steps. Of each step it leaves in ``diagnostics``
    what the block-diagonal direction does to the logits, beside the full one: ``block_cosine`` and ``block_ratio``.

    Args:
        model: a ``ReplicatedMLP`` with batch norm and no other activation; another one is refused in the first step.
        lr: factor on the step that minimises the model.
        damping: λ.
        correction: one of ``CORRECTIONS``.
        norm_lr: learning rate of scales and shifts.
        momentum, weight_decay: must be 0.

    Raises:
        ValueError: another network, an unknown correction, momentum or weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        damping: float,
        correction: str = "full",
        norm_lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        likelihood: Any = None,
        generator: Any = None,
    ):
        if correction not in CORRECTIONS:
            raise ValueError(
                f"unknown optimizer.correction {correction!r}: choose from {', '.join(CORRECTIONS)}"
            )
        if momentum or weight_decay:
            raise ValueError("the exact natural gradient has no momentum and no weight decay: set both to 0")
        if damping <= 0:
            raise ValueError(f"optimizer.damping must be positive, got {damping}")
        super().__init__(model.parameters(), {"lr": lr, "damping": damping})
        self.model, self.correction, self.norm_lr = model, CORRECTIONS[correction], norm_lr
        self.diagnostics: dict[str, Tensor] = {}
        self.failures: dict[str, Tensor] = {}
        model.register_forward_pre_hook(self._see_inputs)

    def _see_inputs(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self.inputs = inputs[0].detach()

    def update_curvature(self, output: Tensor, labels: Tensor | None = None) -> None:
        """The next ``step`` is along the curvature of this batch, ``(R, B)`` logits."""
        self.logits = output
        output.retain_grad()

    def adapt_damping(self, forward: Any, loss: Any) -> None:
        """λ is fixed."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """The loss of each replica must have been back-propagated as its mean over the batch."""
        (group,) = self.param_groups
        pairs, last = _layers(self.model)
        x = self.inputs.double()
        affine = linearise(pairs, last, representatives(x))
        weights = [*(linear.weight for linear, _ in pairs), last.weight]
        sizes = [weight[0].numel() for weight in weights]
        c = self._curvature(x, affine, sizes, group["damping"])
        d = self.correction(c)
        length = group["lr"] * c.slope(d) / c.curvature(d)
        self._diagnose(c, x)
        changes = torch.einsum("rlkn,rlk->rln", affine.jacobians, d.u) + d.b[..., None]
        _subtract(weights, length[:, None, None] * changes)
        gradients = torch.einsum("rlfki,rk->irlf", affine.norms, self.norm_lr * c.r)
        for values, name in zip(gradients, ("weight", "bias"), strict=True):
            _subtract([getattr(norm, name) for _, norm in pairs], values)

    def _curvature(self, x: Tensor, affine: Affine, sizes: list[int], damping: float) -> Curvature:
        assert self.logits.grad is not None
        extended = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        p = self.logits.double().sigmoid()
        weights = p * (1 - p) / p.shape[-1]
        return Curvature(
            times(extended, self.logits.grad.double()),
            (extended * weights[:, None]) @ extended.mT,
            affine.jacobians @ affine.jacobians.mT,
            affine.jacobians.sum(-1),
            x.new_tensor(sizes),
            damping,
        )

    def _diagnose(self, c: Curvature, x: Tensor) -> None:
        extended = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        block, whole = (times(extended.mT, c.seen(direction(c))) for direction in (block_diagonal, full))
        self.diagnostics = {
            "block_cosine": nn.functional.cosine_similarity(block, whole),
            "block_ratio": block.norm(dim=-1) / whole.norm(dim=-1),
        }


def _layers(model: nn.Module) -> tuple[list[tuple[ReplicatedLinear, ReplicatedBatchNorm]], ReplicatedLinear]:
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


def _subtract(parameters: list[nn.Parameter], changes: Tensor) -> None:
    """``changes`` ``(R, L, n)``, of which each parameter takes what it has room for."""
    for parameter, change in zip(parameters, changes.unbind(1), strict=True):
        own = parameter.view(len(change), -1)
        own.sub_(change[:, : own.shape[1]].to(own.dtype))
