"""Damped inverses of Kronecker-factored blocks, batched over any leading axes.

A block is ``A ⊗ G`` with ``A`` of shape ``(..., d_in, d_in)`` and ``G`` of shape ``(..., d_out, d_out)``;
a gradient is ``(..., d_out, d_in)``. A matrix that cannot be inverted gives NaN in its own slot only.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore

from kfac2.curvature.averages import finite_matrices, matrices


class EigenInverse(NamedTuple):
    """``(A ⊗ G + λI)^{-1}``, exact, from the eigenvectors of A and G (Martens & Grosse 2015)."""

    eigenvectors_a: Tensor
    eigenvectors_g: Tensor
    reciprocals: Tensor
    """``1 / (λ_G λ_Aᵀ + λ)``, shape ``(..., d_out, d_in)``."""

    @classmethod
    def unknown(cls, a: Tensor, g: Tensor) -> Self:
        """All NaN, in the shapes that ``compute`` gives."""
        shape = (*a.shape[:-2], g.shape[-1], a.shape[-1])
        return cls(torch.full_like(a, torch.nan), torch.full_like(g, torch.nan), a.new_full(shape, torch.nan))

    @classmethod
    def compute(cls, a: Tensor, g: Tensor, damping: float) -> Self:
        eigenvalues_a, eigenvectors_a = eigh_or_nan(a)
        eigenvalues_g, eigenvectors_g = eigh_or_nan(g)
        products = eigenvalues_g.clamp(min=0)[..., :, None] * eigenvalues_a.clamp(min=0)[..., None, :]
        return cls(eigenvectors_a, eigenvectors_g, 1 / (products + damping))

    def apply(self, gradient: Tensor) -> Tensor:
        rotated = self.eigenvectors_g.mT @ gradient @ self.eigenvectors_a
        return self.eigenvectors_g @ (rotated * self.reciprocals) @ self.eigenvectors_a.mT


class TikhonovInverse(NamedTuple):
    """``(A + π√λ I)^{-1} ⊗ (G + √λ/π I)^{-1}``: factored Tikhonov damping (eq. 8 and 9)."""

    inverse_a: Tensor
    inverse_g: Tensor

    @classmethod
    def unknown(cls, a: Tensor, g: Tensor) -> Self:
        """All NaN, in the shapes that ``compute`` gives."""
        return cls(torch.full_like(a, torch.nan), torch.full_like(g, torch.nan))

    @classmethod
    def compute(cls, a: Tensor, g: Tensor, damping: float) -> Self:
        pi = matrices(tikhonov_pi(a, g))
        root = damping**0.5
        return cls(spd_inverse_or_nan(a, pi * root), spd_inverse_or_nan(g, root / pi))

    def apply(self, gradient: Tensor) -> Tensor:
        return self.inverse_g @ gradient @ self.inverse_a


Inverse = EigenInverse | TikhonovInverse
INVERSES: dict[str, type[EigenInverse] | type[TikhonovInverse]] = {
    "eigen": EigenInverse,
    "tikhonov": TikhonovInverse,
}


def tikhonov_pi(a: Tensor, g: Tensor) -> Tensor:
    """π of eq. 8: ``sqrt((tr A / d_in) / (tr G / d_out))``; 1 where a trace is zero."""
    mean_a = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_g = g.diagonal(dim1=-2, dim2=-1).mean(-1)
    pi = (mean_a / mean_g).sqrt()
    return torch.where(pi.isfinite() & (pi > 0), pi, torch.ones_like(pi))


def eigh_or_nan(x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` that gives NaN for a matrix it cannot decompose, not an error for all.

    The batched routine raises for the whole batch, and LAPACK may not return on a NaN.
    """
    finite = finite_matrices(x)
    safe = torch.where(matrices(finite), x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    try:
        values, vectors = torch.linalg.eigh(safe)
    except LinAlgError:
        values, vectors = _eigh_one_by_one(safe)
    values = values.masked_fill(~finite[..., None], torch.nan)
    return values, vectors.masked_fill(~matrices(finite), torch.nan)


def _eigh_one_by_one(x: Tensor) -> tuple[Tensor, Tensor]:
    values = x.new_full(x.shape[:-1], torch.nan)
    vectors = torch.full_like(x, torch.nan)
    flat_values, flat_vectors = values.view(-1, x.shape[-1]), vectors.view(-1, *x.shape[-2:])
    for k, matrix in enumerate(x.reshape(-1, *x.shape[-2:])):
        try:
            flat_values[k], flat_vectors[k] = torch.linalg.eigh(matrix)
        except LinAlgError:
            continue
    return values, vectors


def spd_inverse_or_nan(x: Tensor, shift: Tensor) -> Tensor:
    """``(x + shift I)^{-1}`` by Cholesky; NaN where the matrix is not positive definite."""
    shifted = x.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift.squeeze(-1))
    factor, info = torch.linalg.cholesky_ex(shifted)
    bad = matrices((info != 0) | ~finite_matrices(shifted))
    if not bad.any():
        return torch.cholesky_inverse(factor)
    # cholesky_inverse raises for the whole batch on a singular factor.
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.cholesky_inverse(torch.where(bad, identity, factor)).masked_fill(bad, torch.nan)
