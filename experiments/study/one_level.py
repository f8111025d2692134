"""One-level relatives of K-FAC, which say what its two factors and its label draws are for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac2 import KFAC
from kfac2.optim.layers import Moments


class FOOF(KFAC):
    """Gradient descent on neurons (Benzing 2022): K-FAC with G = I, ``∇ (A + λI)⁻¹``."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for layer in self.preconditioner.layers:
            layer.moments = partial(_with_identity, layer.moments)


def _with_identity(moments: Callable[..., Moments], inputs: Tensor, gradients: Tensor) -> Moments:
    """``gradients`` ``(R, d_out, B)``: G is a mean over B samples."""
    a, g, rows = moments(inputs, gradients)
    identity = torch.eye(g.shape[-1]).to(g).expand_as(g)
    return Moments(a, identity * gradients.shape[-1], rows)


class EmpiricalKFAC(KFAC):
    """K-FAC with the data's labels in place of drawn ones, for binary logits ``(R, B)``.

    The labels are read off the gradient of the mean loss, ``(p - y) / B``, while it is back-propagated.
    """

    def update_curvature(self, output: Tensor, *args: Any, **options: Any) -> None:
        if self.refresh_is_due:
            self._hook = output.register_hook(partial(self._observe, output))

    def _observe(self, output: Tensor, gradient: Tensor) -> None:
        self._hook.remove()  # before another loss is back-propagated through the same output
        labels = (output.detach().sigmoid() - gradient * output.shape[-1]).round()
        with torch.enable_grad():
            super().update_curvature(output, labels=labels)
