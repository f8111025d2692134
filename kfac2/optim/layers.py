"""One adapter per layer type: how a module's tensors become K-FAC statistics and gradient matrices.

Every adapter speaks one layout: samples as columns ``(R, d, B)``, gradient matrices ``(R, d_out, d_in)``,
with a replica axis R of 1 for an ordinary module, and ``d_in`` counting the appended one where there is
a bias. To support another type whose samples are columns, write one class and list it in ``ADAPTERS``.
"""

import torch
from torch import Tensor, nn

from kfac2.nn import ReplicatedLinear


class LinearLayer:
    """``nn.Linear`` on inputs ``(B, d)``."""

    replicated = False

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        self.name, self.module, self.with_bias = name, module, with_bias
        self.weight: nn.Parameter = module.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: nn.Parameter | None = module.bias if with_bias else None  # pyright: ignore
        self.dtype = torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def replicas(self) -> int:
        return self.weight.shape[0] if self.replicated else 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the gradient matrix."""
        d_out, d_in = self.weight.shape[-2:]
        return d_out, d_in + self.with_bias

    def columns(self, x: Tensor) -> Tensor:
        """One column per sample, ``(R, d, B)``; ``x`` is an input or an output gradient."""
        if x.dim() != 2:
            raise ValueError(
                f"layer {self.name!r} got an input of shape {tuple(x.shape)}, but only (batch, features) "
                f"is supported: flatten it, or leave the layer to plain SGD with exclude=[{self.name!r}]"
            )
        return x.T[None].to(self.dtype)

    def input_columns(self, inputs: Tensor) -> Tensor:
        """``(R, d_in, B)``, a one appended to each sample where there is a bias."""
        columns = self.columns(inputs)
        if not self.with_bias:
            return columns
        return torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)

    def gradient_columns(self, gradients: Tensor) -> Tensor:
        """``(R, d_out, B)``."""
        return self.columns(gradients)


class ReplicatedLinearLayer(LinearLayer):
    """``kfac2.nn.ReplicatedLinear`` on inputs ``(R, d, B)``."""

    replicated = True

    def columns(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


ADAPTERS: dict[type[nn.Module], type[LinearLayer]] = {
    nn.Linear: LinearLayer,
    ReplicatedLinear: ReplicatedLinearLayer,
}
