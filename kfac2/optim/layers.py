"""One adapter per layer type: how a module's tensors become K-FAC statistics and gradient matrices.

Every adapter speaks one layout: gradient matrices ``(R, d_out, d_in)`` with a replica axis R of 1 for an
ordinary module, and ``d_in`` counting the appended one where there is a bias. To support another type,
write one class with ``axes``, ``moments``, ``totals`` and ``maps``, and list it in ``ADAPTERS``.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac2.curvature.diagonal import diagonal_of, is_diagonal, second_moment
from kfac2.curvature.patches import Window, patch_moment, patch_sums, patch_totals
from kfac2.nn import ReplicatedLinear

Basis = tuple[Tensor, Tensor]


class Moments(NamedTuple):
    """Sums over rows of one layer's ``a aᵀ`` and ``g gᵀ``; a row is one position of one sample in one call.

    ``a`` ``(R, d_in, d_in)``, ``g`` ``(R, d_out, d_out)``, or their diagonals, ``(R, 1, d)``; their rows are
    ``rows`` in each replica.
    """

    a: Tensor
    g: Tensor
    rows: int

    def plus(self, other: "Moments | None") -> "Moments":
        if other is None:
            return self
        return Moments(self.a + other.a, self.g + other.g, self.rows + other.rows)

    def reduced_to(self, diagonal: tuple[bool, bool]) -> "Moments":
        """With only the ``diagonal`` of G and of A, from an adapter that has made the whole matrix."""
        g, a = (
            diagonal_of(x)[:, None] if only and not is_diagonal(x) else x
            for x, only in zip((self.g, self.a), diagonal, strict=True)
        )
        return Moments(a, g, self.rows)


class Totals(NamedTuple):
    """Sums over the positions of each sample: ``a`` ``(R, d_in, B)``, ``g`` ``(R, d_out, B)``."""

    a: Tensor
    g: Tensor
    positions: int
    """Of one sample."""


class Layer:
    """What all adapters share; ``inputs`` and ``gradients`` are the module's own tensors."""

    replicated = False
    reduces = False
    """K-FAC-reduce: a sample's positions are averaged before the products, not after (``weight_sharing``)."""
    batch_axis: int | None = None
    """The axis of a call along which the samples run, where the user has said so."""
    diagonal: tuple[bool, bool] = (False, False)
    """Whether only the diagonals of G and of A are kept (``max_factor_dim``)."""
    factor_dtype: torch.dtype | None = None

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        self.name, self.module, self.with_bias = name, module, with_bias
        self.weight: nn.Parameter = module.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: nn.Parameter | None = module.bias if with_bias else None  # pyright: ignore

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics: ``factor_dtype``, or else the weight's, float32 at least."""
        return self.factor_dtype or torch.promote_types(self.weight.dtype, torch.float32)

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        """Why this module is left to plain SGD although its type is known; None if it is not."""
        return None

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

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        """Sizes of those leading axes of a call's ``maps`` along which the samples may run."""
        raise NotImplementedError

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        """A call's contribution to the Kronecker factors."""
        raise NotImplementedError

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        """A call's sums over all axes but ``axis``."""
        raise NotImplementedError

    def maps(self, inputs: Tensor, gradients: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        """``1ᵀ a`` and ``1ᵀ g`` of each row of a call, ``(R, *axes)``, which may have further axes.

        With a ``basis`` ``(u, v)``, ``(d_out,)`` and ``(d_in,)``, they are ``vᵀ a`` and ``uᵀ g``.
        """
        raise NotImplementedError

    def _refuse(self, inputs: Tensor, expected: str) -> ValueError:
        return ValueError(
            f"layer {self.name!r} got an input of shape {tuple(inputs.shape)}, but only {expected} is "
            f"supported: reshape it, or leave the layer to plain SGD with exclude=[{self.name!r}]"
        )


class LinearLayer(Layer):
    """``nn.Linear`` on inputs ``(*axes, d)``, one of the axes the batch."""

    def columns(self, x: Tensor) -> Tensor:
        """One column per row, ``(R, d, N)``; ``x`` is an input or an output gradient."""
        return x.flatten(0, -2).T[None].to(self.dtype)

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        if inputs.dim() < 2:
            raise self._refuse(inputs, "(batch, features) or (batch, positions, features)")
        return tuple(inputs.shape[:-1])

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        self.axes(inputs)
        a, g = self._input_columns(inputs), self.columns(gradients)
        only_g, only_a = self.diagonal
        return Moments(second_moment(a, only_a), second_moment(g, only_g), a.shape[-1])

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        axes = self.axes(inputs)
        a, g = (
            x.unflatten(2, axes).movedim(2 + axis, 2).flatten(3).sum(-1) if len(axes) > 1 else x
            for x in (self._input_columns(inputs), self.columns(gradients))
        )
        return Totals(a, g, prod(axes) // axes[axis])

    def maps(self, inputs: Tensor, gradients: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        a, g = self._input_columns(inputs), self.columns(gradients)
        if basis is not None:
            u, v = basis
            a, g = a * v[:, None].to(a), g * u[:, None].to(g)
        axes = self.axes(inputs)
        return a.sum(1).unflatten(1, axes), g.sum(1).unflatten(1, axes)

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


class Conv2dLayer(Layer):
    """``nn.Conv2d`` on inputs ``(B, C, H, W)``: one sample's patches are its positions (KFC)."""

    module: nn.Conv2d

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        super().__init__(name, module, with_bias)
        conv = self.module
        padding = conv._reversed_padding_repeated_twice  # the numbers that 'same' stands for
        self.window = Window(conv.kernel_size, conv.stride, conv.dilation, tuple(padding))  # pyright: ignore

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1:
            return f"a convolution in {module.groups} groups has no Kronecker block here"
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} is not supported"
        return None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight[0].numel() + self.with_bias

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        return (len(self._checked(inputs)),)

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        x, g = self._checked(inputs), gradients.to(self.dtype)
        rows, (only_g, only_a) = g[:, 0].numel(), self.diagonal
        if only_a:
            a = patch_totals(x.square(), self.window).sum(0, keepdim=True)
            a = torch.cat([a, a.new_full((1, self.with_bias), rows)], dim=1)
        else:
            a = patch_moment(x, self.window, self.with_bias)
        g = g.square().sum((0, 2, 3))[None] if only_g else patch_moment(g, Window(), False)
        return Moments(a[None], g[None], rows)

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        a, g = patch_totals(self._checked(inputs), self.window), gradients.to(self.dtype)
        positions = g[0, 0].numel()
        if self.with_bias:
            a = torch.cat([a, a.new_full((len(a), 1), positions)], dim=1)
        return Totals(a.T[None], g.sum((2, 3)).T[None], positions)

    def maps(self, inputs: Tensor, gradients: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        if basis is not None:
            raise NotImplementedError(f"layer {self.name!r}: a convolution's coarse basis is the ones only")
        sums = patch_sums(self._checked(inputs), self.window) + self.with_bias
        return sums[None], gradients.to(self.dtype).sum(1)[None]

    def _checked(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 4:
            raise self._refuse(inputs, "(batch, channels, height, width)")
        return inputs.to(self.dtype)


ADAPTERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv2d: Conv2dLayer,
    ReplicatedLinear: ReplicatedLinearLayer,
}
