"""Linear layers."""

from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfac2.curvature.moments import second_moment
from kfac2.optim.layers.base import Basis, Layer, Moments, Totals, rows_with_gradient


class LinearLayer(Layer):
    """``nn.Linear`` on inputs ``(*axes, d)``, one of the axes the batch."""

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "its nn.MultiheadAttention does not call it, and is itself not preconditioned"
        return None

    def columns(self, x: Tensor) -> Tensor:
        """One column per row, ``(R, d, N)``; ``x`` is an input or an output gradient."""
        return x.flatten(0, -2).T[None].to(self.dtype)

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        if inputs.dim() < 2:
            raise self._refuse(inputs, "(batch, features) or (batch, positions, features)")
        return tuple(inputs.shape[:-1])

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        self.axes(inputs)
        a, g = self.columns(inputs), self.columns(gradients)
        only_g, only_a = self.diagonal
        return Moments(second_moment(a, only_a, self.with_bias), second_moment(g, only_g), a.shape[-1])

    def counting_rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return rows_with_gradient(inputs.flatten(0, -2), gradients.flatten(0, -2))

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        axes = self.axes(inputs)
        a, g = (
            x.unflatten(2, axes).movedim(2 + axis, 2).flatten(3).sum(-1) if len(axes) > 1 else x
            for x in (self._input_columns(inputs), self.columns(gradients))
        )
        return Totals(a, g, prod(axes) // axes[axis])

    def maps(self, inputs: Tensor, gradients: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        a, g, of_bias = self.columns(inputs), self.columns(gradients), torch.ones(())
        if basis is not None:
            u, v = basis
            of_bias = v[-1]
            a, g = a * v[: a.shape[1], None].to(a), g * u[:, None].to(g)
        axes, alpha, gamma = self.axes(inputs), a.sum(1), g.sum(1)
        if self.with_bias:
            alpha += of_bias.to(alpha)
        if len(axes) == 1:  # in a deep network the calls that change nothing cost as much as the sums
            return alpha, gamma
        return alpha.unflatten(1, axes), gamma.unflatten(1, axes)

    def _input_columns(self, inputs: Tensor) -> Tensor:
        """``(R, d_in, N)``, a one appended where there is a bias."""
        columns = self.columns(inputs)
        if not self.with_bias:
            return columns
        return torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)


class ReplicatedLinearLayer(LinearLayer):
    """``kfac2.nn.ReplicatedLinear`` on inputs ``(R, d, B)``."""

    replicated = True

    def columns(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        return (inputs.shape[-1],)

    def counting_rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, gradients  # their number would be each replica's own


class TransposedLinearLayer(LinearLayer):
    """A linear layer with its weight as ``(in, out)``: ``Conv1D`` of transformers."""

    input_name = "x"

    def weight_matrix(self, weights: Tensor) -> Tensor:
        return weights.mT[:, None]

    def weight_like(self, matrices: Tensor) -> Tensor:
        return matrices[:, 0].mT
