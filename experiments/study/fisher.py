"""The exact Fisher of a binary classifier's whole batch of logits, damped, in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kfac2.nn import ReplicatedBatchNorm


class DampedFisher:
    """``F_λ = Sᵀ S + λI`` with ``S = diag(sqrt(p (1 - p) / B)) J``, ``J`` ``(B, n)`` the Jacobian of the batch's
    logits; solved in the batch's dimension (Woodbury).

    With batch norm in training mode every logit depends on every sample, so that this F is not an average
    of per-sample matrices.
    """

    def __init__(self, jacobian: Tensor, logits: Tensor, damping: float):
        if damping <= 0:
            raise ValueError(f"damping must be positive, got {damping}")
        p = logits.sigmoid()
        self.root = (p * (1 - p) / len(p)).sqrt()[:, None] * jacobian
        self.damping = damping
        gram = self.root @ self.root.T
        self._gram = gram + damping * torch.eye(len(gram), dtype=gram.dtype)

    def apply(self, v: Tensor) -> Tensor:
        """``F_λ v``, ``(n,)`` or ``(n, k)``."""
        return self.root.T @ (self.root @ v) + self.damping * v

    def solve(self, g: Tensor) -> Tensor:
        """``F_λ⁻¹ g``, ``(n,)``."""
        return (g - self.root.T @ torch.linalg.solve(self._gram, self.root @ g)) / self.damping

    def norm(self, v: Tensor) -> float:
        """``‖v‖_F = sqrt(vᵀ F_λ v)``."""
        return (v @ self.apply(v)).sqrt().item()

    def block(self, part: slice) -> Tensor:
        """A diagonal block of F_λ, dense."""
        own = self.root[:, part]
        return own.T @ own + self.damping * torch.eye(own.shape[1], dtype=own.dtype)

    def coarse(self, Z: Tensor) -> Tensor:
        """``Z F Zᵀ`` without damping, ``(L, L)`` for ``Z`` ``(L, n)``."""
        rows = self.root @ Z.T
        return rows.T @ rows


def logit_jacobian(
    model: nn.Module, inputs: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """The logits ``(B,)`` of the whole batch and their Jacobian ``(B, n)``, a backward pass per sample.

    ``n`` counts the entries of ``parameters`` one after the other. The model, of one replica, maps
    ``inputs`` to ``(1, B)`` or ``(B,)``; its mode and buffers are left as they were.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = model(inputs).reshape(-1)
    rows = []
    for i in range(len(logits)):
        grads = torch.autograd.grad(logits[i], parameters, retain_graph=True)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    model.load_state_dict(buffers, strict=False)
    return logits.detach(), torch.stack(rows)


@contextmanager
def frozen_statistics(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Inside, batch norms use the statistics of this batch as constants, so that samples do not interact."""
    was_training = model.training
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms = [module for module in model.modules() if isinstance(module, ReplicatedBatchNorm)]
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().reshape(1, -1, args[0].shape[-1])
        seen.append((rows.mean(-1), rows.var(-1, unbiased=False)))

    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    with torch.no_grad():
        model.train()(inputs)
    for handle in handles:
        handle.remove()
    for norm, (mean, variance) in zip(norms, seen, strict=True):
        norm._buffers.update(running_mean=mean, running_var=variance)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        model.load_state_dict(saved, strict=False)
