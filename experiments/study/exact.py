"""Exact damped natural gradient as an optimizer, with and without curvature between layers.

A batch's Fisher, through its statistics where it has any, is ``F = Mᵀ S M`` with ``S = (1/B) Σ p (1 - p) φ φᵀ``, its
gradient ``g = Mᵀ r`` with ``r = (1/B) Σ (p - y) φ``; M and φ are those of ``experiments.study.linearised``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.study.directions import CORRECTIONS, Curvature, block_diagonal, full, times
from experiments.study.linearised import linearisation_of


class ExactNaturalGradient(torch.optim.Optimizer):
    """Steps along an exact direction, ``lr`` times as long as the quadratic model's best: ``α* = gᵀd / dᵀF_λd``.

    What is no linear layer's weight, such as norms' scales and shifts, is not in F and takes plain gradient steps. Of
    each step it leaves in ``diagnostics`` what the block-diagonal direction does to the logits, beside the full one:
    ``block_cosine`` and ``block_ratio``.

    Args:
        model: a network of one logit: a ``ReplicatedMLP`` with batch norm and no other activation, or one of
            ``ReplicatedLinear`` layers in which samples do not interact.
        lr: factor on the step that minimises the model.
        damping: λ.
        correction: one of ``CORRECTIONS``.
        norm_lr: learning rate of the plain steps.
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
        self.correction, self.norm_lr = CORRECTIONS[correction], norm_lr
        self.diagnostics: dict[str, Tensor] = {}
        self.failures: dict[str, Tensor] = {}
        self._network = linearisation_of(model)
        inside = set(map(id, self._network.weights))
        self._outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]

    def update_curvature(self, output: Tensor, labels: Tensor | None = None) -> None:
        """The next ``step`` is along the curvature of this batch, ``(R, B)`` logits."""
        self.logits = output
        self.batch = self._network.linearised(output)
        output.retain_grad()

    def adapt_damping(self, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
        """λ is fixed."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """The loss of each replica must have been back-propagated as its mean over the batch."""
        (group,) = self.param_groups
        c = self._curvature(group["damping"])
        d = self.correction(c)
        length = (group["lr"] * c.slope(d) / c.curvature(d))[:, None, None]
        self._diagnose(c)
        for weight, change, b in zip(
            self._network.weights, self.batch.pulled(d.u), d.b.unbind(1), strict=True
        ):
            weight.sub_((length * (change + b[:, None, None])).to(weight.dtype))
        for parameter in self._outside:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=self.norm_lr)

    def _curvature(self, damping: float) -> Curvature:
        assert self.logits.grad is not None
        features, T, m, _ = self.batch
        p = self.logits.double().sigmoid()
        weights = p * (1 - p) / p.shape[-1]
        sizes = m.new_tensor([weight[0].numel() for weight in self._network.weights])
        S = (features * weights[:, None]) @ features.mT
        return Curvature(times(features, self.logits.grad.double()), S, T, m, sizes, damping)

    def _diagnose(self, c: Curvature) -> None:
        seen = (c.seen(direction(c)) for direction in (block_diagonal, full))
        block, whole = (times(self.batch.features.mT, each) for each in seen)
        self.diagnostics = {
            "block_cosine": nn.functional.cosine_similarity(block, whole),
            "block_ratio": block.norm(dim=-1) / whole.norm(dim=-1),
        }
