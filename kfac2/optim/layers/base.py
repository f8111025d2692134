"""What an adapter is, and what it makes of one call of its layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac2.curvature.diagonal import diagonal_of, is_diagonal

Basis = tuple[Tensor, Tensor]


class Moments(NamedTuple):
    """Sums over rows of one layer's ``a aᵀ`` and ``g gᵀ``; a row is one position of one sample in one call.

    ``a`` ``(R, d_in, d_in)``, ``g`` ``(R, d_out, d_out)``, or their diagonals, ``(R, 1, d)``; their rows are
    ``rows`` in each replica. A layer in ``row_blocks`` has one of each per block: ``(blocks, d_in, d_in)`` and
    ``(blocks, d_out / blocks, d_out / blocks)``.
    """

    a: Tensor
    g: Tensor
    rows: int | Tensor
    """A tensor ``(blocks,)`` where each block has its own."""

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
    """Sums over the positions of each sample: ``a`` ``(R, d_in, B)``, ``g`` ``(R, d_out, B)``.

    A layer in ``row_blocks`` has them per block, as in ``Moments``.
    """

    a: Tensor
    g: Tensor
    positions: int
    """Of one sample."""


def rows_with_gradient(rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``rows`` ``(N, ...)`` and their ``gradients`` ``(N, d)`` those that have one; all if none has."""
    counts = gradients.any(-1)
    return (rows[counts], gradients[counts]) if counts.any() else (rows, gradients)


class Layer:
    """What all adapters share; ``inputs`` and ``gradients`` are the module's own tensors.

    The gradient matrix is ``(R, d_out, d_in)``, with a replica axis R of 1 for an ordinary module; ``d_in``
    counts the bias's column, the last.
    """

    replicated = False
    reduces = False
    """K-FAC-reduce: a sample's positions are averaged before the products, not after (``weight_sharing``)."""
    batch_axis: int | None = None
    """The axis of a call along which the samples run, where the user has said so."""
    diagonal: tuple[bool, bool] = (False, False)
    """Whether only the diagonals of G and of A are kept: what an adapter's class says, and ``max_factor_dim``."""
    factor_dtype: torch.dtype | None = None
    row_blocks = 1
    """Equal parts of the gradient matrix's rows that have Kronecker factors of their own: the groups of a
    convolution. Only where R is 1."""
    outside_coarse: str | None = None
    """Why the layer has no part in the coarse space; None if it has."""
    computed_by: tuple[str, ...] = ("forward",)
    """The methods that a subclass of the module's type must inherit to be the same layer."""
    input_name = "input"
    """What ``forward`` calls its first argument."""
    weight_name, bias_name = "weight", "bias"
    """The module's parameters."""

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        self.name, self.module, self.with_bias = name, module, with_bias
        self.weight: nn.Parameter = getattr(module, self.weight_name)
        self.bias: nn.Parameter | None = getattr(module, self.bias_name) if with_bias else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics: ``factor_dtype``, or else the weight's, float32 at least."""
        return self.factor_dtype or torch.promote_types(self.weight.dtype, torch.float32)

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        """Why this module is left to plain SGD although its type is known; None if it is not."""
        return None

    @property
    def revealed(self) -> tuple[nn.Module, ...]:
        """Further modules that are called while the layer is revealed, and only then."""
        return ()

    @property
    def replicas(self) -> int:
        return self.weight.shape[0] if self.replicated else 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the gradient matrix."""
        d_out, d_in = self.weight_matrix(self.weight.detach().to("meta")[None]).shape[-2:]
        return d_out, d_in + self.with_bias

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """Rows of G and of A."""
        d_out, d_in = self.matrix_shape
        return d_out // self.row_blocks, d_in

    # -- parameters to gradient matrices, and back --------------------------------------------------

    def weight_matrix(self, weights: Tensor) -> Tensor:
        """Tensors like the weight ``(n, *shape)``, such as its gradient, as ``(n, R, d_out, d_in)``, no bias."""
        return (weights if self.replicated else weights[:, None]).flatten(3)

    def weight_like(self, matrices: Tensor) -> Tensor:
        """The inverse of ``weight_matrix``."""
        return matrices.reshape(-1, *self.weight.shape)

    def matrix(self, weights: Tensor, biases: Tensor | None = None) -> Tensor:
        """Tensors like the parameters, ``(n, *shape)``, as gradient matrices ``(n, R, d_out, d_in)``."""
        matrices = self.weight_matrix(weights)
        if biases is None:
            return matrices
        return torch.cat([matrices, biases.reshape(*matrices.shape[:3], 1)], dim=-1)

    def parts(self, matrices: Tensor) -> list[Tensor]:
        """The inverse of ``matrix``: ``(n, *shape)`` for each of ``parameters``."""
        if self.bias is None:
            return [self.weight_like(matrices)]
        columns, last = matrices.split([matrices.shape[-1] - 1, 1], dim=-1)
        return [self.weight_like(columns), last.reshape(-1, *self.bias.shape)]

    # -- a call's statistics ------------------------------------------------------------------------

    def reveal(self) -> Callable[[], None]:
        """Have what the layer multiplies with be called as modules, until the returned function is called: after the
        backward passes, which may run the forward again."""
        return lambda: None

    def input_of(self, args: Any, kwargs: Any) -> Tensor:
        """The input among a call's arguments."""
        return args[0] if args else kwargs[self.input_name]

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        """Sizes of those leading axes of a call's ``maps`` along which the samples may run."""
        raise NotImplementedError

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        """A call's contribution to the Kronecker factors."""
        raise NotImplementedError

    def counting_rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """A call without the rows whose output gradient is zero; the whole of it where rows overlap or share sizes.

        The block is a sum of ``a aᵀ ⊗ g gᵀ``, to which they add nothing, whatever their ``a`` is.
        """
        return inputs, gradients

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
