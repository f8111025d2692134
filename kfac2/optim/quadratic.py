"""What a step has done to a batch's loss, and what the loss's quadratic model at the step's begin foretold.

    M(δ) − M(0) = ∇hᵀδ + ½ δᵀFδ,    F = Jᵀ H J,

J the Jacobian of the outputs, H the loss's Hessian in them: the batch's exact generalised Gauss-Newton matrix, which is
the Fisher of the likelihoods there are. One derivative Jδ is all that M takes.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac2.optim.compiled import eager_until, is_compiled

Forward = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]
Values = Mapping[Tensor, Tensor]
"""By parameter."""


class Changes(NamedTuple):
    """Of the batch's loss by one step, per replica ``(R,)``, float64."""

    actual: Tensor
    """``h(θ + δ) − h(θ)``."""
    predicted: Tensor
    """``M(δ) − M(0)``."""


def changes_by_step(
    model: nn.Module, before: Values, forward: Forward, loss: Loss, replicas: int = 1
) -> Changes:
    """What the step from ``before`` (some parameters' values) to the present has done to a batch's loss.

    Both passes draw the same random numbers (dropout), and leave torch's generators and the model's buffers as they
    are.

    Args:
        forward: the output of ``model`` for the batch, ``([R,] B, ...)``.
        loss: of such an output, a scalar or ``(R,)``; twice differentiable.

    Raises:
        TypeError, ValueError: no tensor, or of a wrong shape.
        RuntimeError: an output that does not depend on the parameters.
    """
    step = {p: p.detach() - old for p, old in before.items()}
    with _undisturbed(model, before):
        output, tangent = output_and_tangent(model, forward, before, step)
        old, slope, curvature = quadratic_model(loss, output, tangent, replicas)
    with _undisturbed(model, before), torch.no_grad(), replaced(model, {}):
        new = _per_replica(loss(forward()), replicas)
    return Changes(new - old, slope + curvature / 2)


def quadratic_model(loss: Loss, output: Tensor, tangent: Tensor, replicas: int = 1) -> tuple[Tensor, ...]:
    """h, ``∇hᵀδ`` and ``δᵀFδ``, each ``(R,)``, from an ``output`` and its tangent ``Jδ``."""
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        h = _per_replica(loss(output), replicas)
        (gradient,) = torch.autograd.grad(h.sum(), output, create_graph=True)
        (product,) = torch.autograd.grad(gradient, output, tangent)
    sums = [(x.detach() * tangent).double().reshape(replicas, -1).sum(1) for x in (gradient, product)]
    return h.detach(), *sums


def output_and_tangent(
    model: nn.Module, forward: Forward, point: Values, direction: Values
) -> tuple[Tensor, Tensor]:
    """The output with the parameters at ``point``, and its derivative ``Jδ`` along ``direction``.

    By forward mode; by reverse mode twice where the model has a function without forward mode.
    """
    try:
        with torch.no_grad(), forward_ad.dual_level():
            with warnings.catch_warnings():  # of torch, whose first dual number compiles what it deprecates
                warnings.simplefilter("ignore", FutureWarning)
                duals = {p: forward_ad.make_dual(x, direction[p]) for p, x in point.items()}
            with replaced(model, duals):
                output, tangent = forward_ad.unpack_dual(_checked(forward()))
    except RuntimeError:  # a function without forward mode; an error of the model itself comes again
        return _by_reverse_mode(model, forward, point, direction)
    if tangent is None:
        raise RuntimeError(
            "what forward() returned does not depend on the preconditioned parameters: it must run the "
            "optimizer's model anew on the step's batch"
        )
    return output, tangent


def _by_reverse_mode(
    model: nn.Module, forward: Forward, point: Values, direction: Values
) -> tuple[Tensor, Tensor]:
    """``Jδ`` as the derivative of ``Jᵀu`` by u, which is linear in it."""
    leaves = {p: x.detach().requires_grad_() for p, x in point.items()}
    with torch.enable_grad(), replaced(model, leaves):
        output = _checked(forward())
        u = torch.zeros_like(output, requires_grad=True)
        products = torch.autograd.grad(
            [output], list(leaves.values()), [u], create_graph=True, materialize_grads=True
        )
        along = torch.stack([(x * direction[p]).sum() for p, x in zip(leaves, products, strict=True)]).sum()
        (tangent,) = torch.autograd.grad(along, u)
    return output.detach(), tangent


@contextmanager
def replaced(model: nn.Module, values: Values) -> Iterator[None]:
    """``values`` in place of parameters, and copies in place of all buffers, which a forward pass may change."""
    kept = [(m._parameters, dict(m._parameters), m._buffers, dict(m._buffers)) for m in model.modules()]
    try:
        for parameters, own, buffers, old in kept:
            parameters.update({k: values.get(p, p) for k, p in own.items() if p is not None})  # pyright: ignore
            buffers.update({k: b.clone() for k, b in old.items() if b is not None})
        yield
    finally:
        for parameters, own, buffers, old in kept:
            parameters.update(own)
            buffers.update(old)


@contextmanager
def _undisturbed(model: nn.Module, at: Values) -> Iterator[None]:
    """Eagerly, in full precision, with kernels that have a forward mode, and torch's random numbers put back."""
    device = next(iter(at.values())).device
    end = eager_until() if any(map(is_compiled, model.modules())) else lambda: None
    accelerators = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(accelerators),
            torch.autocast(device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH) if device.type in ("cpu", "cuda") else nullcontext(),
        ):
            yield
    finally:
        end()


def _checked(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        remedy = "return its .logits" if hasattr(output, "logits") else "return the one the loss is of"
        raise TypeError(f"forward() must return one tensor, got {type(output).__name__}: {remedy}")
    return output


def _per_replica(value: Any, replicas: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != replicas:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(output) must be {replicas} number(s), one per replica, got {got}")
    return value.double().reshape(replicas)
