"""The Levenberg-Marquardt rule, literally: one replica, dense matrices, float64, plain numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


def output_hessian(output: Tensor, likelihood: str) -> Tensor:
    """Of the mean over samples of the negative log-likelihood, in outputs ``(B, k)``: dense, ``(B k, B k)``."""
    blocks = []
    for row in output:
        if likelihood == "gaussian":
            block = torch.eye(len(row), dtype=row.dtype)
        elif likelihood == "bernoulli":
            p = 1 / (1 + torch.exp(-row))
            block = torch.diag(p * (1 - p))
        else:
            p = torch.exp(row) / torch.exp(row).sum()
            block = torch.diag(p) - torch.outer(p, p)
        blocks.append(block / len(output))
    return torch.block_diag(*blocks)


def jacobian(model: nn.Module, names: Sequence[str], point: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Of all outputs in the named parameters, dense, ``(B k, n)``."""

    def flat_output(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), inputs).flatten()

    parts = torch.autograd.functional.jacobian(flat_output, tuple(point))
    return torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in values])


def literal_changes(
    model: nn.Module,
    names: Sequence[str],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    likelihood: str,
) -> tuple[float, float]:
    """``h(θ + δ) − h(θ)`` and ``∇hᵀδ + ½ δᵀFδ``; the parameters that are not named stay as they are."""

    def value(point: Sequence[Tensor]) -> Tensor:
        return loss(functional_call(model, dict(zip(names, point, strict=True)), inputs))

    point = [x.detach().clone().requires_grad_() for x in before]
    gradient = flat(torch.autograd.grad(value(point), point))
    J = jacobian(model, names, before, inputs)
    output = functional_call(model, dict(zip(names, before, strict=True)), inputs).detach()
    F = J.T @ output_hessian(output, likelihood) @ J
    delta = flat(after) - flat(before)
    actual = value(after) - value(before)
    return float(actual), float(gradient @ delta + delta @ F @ delta / 2)


def literal_rule(damping: float, actual: float, predicted: float, interval: int) -> float:
    """The next λ, without bounds."""
    if predicted >= 0:
        return damping / (19 / 20) ** interval
    rho = actual / predicted
    if rho < 1 / 4:
        return damping / (19 / 20) ** interval
    if rho > 3 / 4:
        return damping * (19 / 20) ** interval
    return damping
