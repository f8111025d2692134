"""SGD and Adam with K-FAC's calls, so that a trainer needs no branch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _FirstOrder:
    diagnostics: dict[str, Tensor] = {}
    failures: dict[str, Tensor] = {}

    def update_curvature(self, output: Tensor, labels: Tensor | None = None) -> None:
        """First-order methods have no curvature."""

    def adapt_damping(self, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
        """First-order methods have no damping."""


class SGD(_FirstOrder, torch.optim.SGD):
    """``torch.optim.SGD``, built from a model; ``likelihood`` and ``generator`` are ignored."""

    def __init__(
        self, model: nn.Module, lr: float, *, likelihood: Any = None, generator: Any = None, **options: Any
    ):
        super().__init__(model.parameters(), lr=lr, fused=True, **options)


class Adam(_FirstOrder, torch.optim.Adam):
    """``torch.optim.Adam``, built from a model; ``momentum`` is β₁."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.9,
        likelihood: Any = None,
        generator: Any = None,
        **options: Any,
    ):
        super().__init__(model.parameters(), lr=lr, betas=(momentum, 0.999), fused=True, **options)
