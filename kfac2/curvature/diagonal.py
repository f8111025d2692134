"""Kronecker factors of which only the diagonal is kept: a row ``(..., 1, d)`` in place of ``(..., d, d)``."""

import torch
from torch import Tensor

from kfac2.curvature.averages import finite_matrices, matrices


def is_diagonal(x: Tensor) -> bool:
    """Whether ``x`` is the row (or, transposed, the column) of a diagonal; one number is a full matrix."""
    return x.shape[-2] != x.shape[-1]


def diagonal_of(x: Tensor) -> Tensor:
    """``(..., d)`` of either kind."""
    return x.flatten(-2) if is_diagonal(x) else x.diagonal(dim1=-2, dim2=-1)


def left_product(factor: Tensor, x: Tensor) -> Tensor:
    """``factor @ x``."""
    return factor.flatten(-2)[..., :, None] * x if is_diagonal(factor) else factor @ x


def right_product(x: Tensor, factor: Tensor) -> Tensor:
    """``x @ factor``."""
    return x * factor.flatten(-2)[..., None, :] if is_diagonal(factor) else x @ factor


def diagonal_eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., d)`` and eigenvectors, the row of an identity; NaN where ``x`` is not finite."""
    bad = ~finite_matrices(x)
    vectors = torch.ones_like(x).masked_fill(matrices(bad), torch.nan)
    return diagonal_of(x).masked_fill(bad[..., None], torch.nan), vectors


def diagonal_inverse(x: Tensor, shift: Tensor) -> Tensor:
    """``1 / (x + shift)``, a row again; NaN where ``x`` is not finite, infinite where the sum is zero."""
    values, _ = diagonal_eigh(x)
    return 1 / (values.clamp(min=0)[..., None, :] + shift).to(x.dtype)
