"""Damped inverses of Kronecker-factored blocks, batched over any leading axes.

A damping is λ, or a tensor of one per block that broadcasts against matrices ``(..., 1, 1)``.
A block is ``A ⊗ G`` with ``A`` of shape ``(..., d_in, d_in)`` and ``G`` of shape ``(..., d_out, d_out)``;
a factor of which only the diagonal is kept is a row ``(..., 1, d)``, and so are its eigenvectors and inverse.
A gradient is ``(..., d_out, d_in)``. A matrix that cannot be inverted gives NaN in its own slot only; one on
which single precision fails is tried in double precision first.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore

from kfac2.curvature.averages import finite_matrices, matrices
from kfac2.curvature.diagonal import (
    diagonal_eigh,
    diagonal_inverse,
    diagonal_of,
    is_diagonal,
    left_product,
    right_product,
)


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
    def identity(cls, a: Tensor, g: Tensor) -> Self:
        """Leaves a gradient as it is."""
        shape = (*a.shape[:-2], g.shape[-1], a.shape[-1])
        return cls(_identity_like(a), _identity_like(g), a.new_ones(shape))

    @classmethod
    def compute(cls, a: Tensor, g: Tensor, damping: float | Tensor) -> Self:
        eigenvalues_a, eigenvectors_a = eigh_or_nan(a)
        eigenvalues_g, eigenvectors_g = eigh_or_nan(g)
        # The largest number in place of an overflow, because infinity times zero is NaN.
        limits = 0, torch.finfo(a.dtype).max
        products = eigenvalues_g.clamp(*limits)[..., :, None] * eigenvalues_a.clamp(*limits)[..., None, :]
        return cls(eigenvectors_a, eigenvectors_g, 1 / (products + damping))

    def apply(self, gradient: Tensor) -> Tensor:
        rotated = right_product(left_product(self.eigenvectors_g.mT, gradient), self.eigenvectors_a)
        scaled = left_product(self.eigenvectors_g, rotated.mul_(self.reciprocals))
        return right_product(scaled, self.eigenvectors_a.mT)


class TikhonovInverse(NamedTuple):
    """``(A + π√λ I)^{-1} ⊗ (G + √λ/π I)^{-1}``: factored Tikhonov damping (eq. 8 and 9)."""

    inverse_a: Tensor
    inverse_g: Tensor

    @classmethod
    def unknown(cls, a: Tensor, g: Tensor) -> Self:
        """All NaN, in the shapes that ``compute`` gives."""
        return cls(torch.full_like(a, torch.nan), torch.full_like(g, torch.nan))

    @classmethod
    def identity(cls, a: Tensor, g: Tensor) -> Self:
        """Leaves a gradient as it is."""
        return cls(_identity_like(a), _identity_like(g))

    @classmethod
    def compute(cls, a: Tensor, g: Tensor, damping: float | Tensor) -> Self:
        pi = matrices(tikhonov_pi(a, g))
        root = damping**0.5
        return cls(spd_inverse_or_nan(a, pi * root), spd_inverse_or_nan(g, root / pi))

    def apply(self, gradient: Tensor) -> Tensor:
        return right_product(left_product(self.inverse_g, gradient), self.inverse_a)


Inverse = EigenInverse | TikhonovInverse
INVERSES: dict[str, type[EigenInverse] | type[TikhonovInverse]] = {
    "eigen": EigenInverse,
    "tikhonov": TikhonovInverse,
}


def tikhonov_pi(a: Tensor, g: Tensor) -> Tensor:
    """π of eq. 8: ``sqrt((tr A / d_in) / (tr G / d_out))``, float64; 1 where a trace is zero."""
    mean_a = diagonal_of(a).double().mean(-1)
    mean_g = diagonal_of(g).double().mean(-1)
    pi = (mean_a / mean_g).sqrt()
    return torch.where(pi.isfinite() & (pi > 0), pi, torch.ones_like(pi))


def eigh_or_nan(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (in no particular order) and eigenvectors; NaN for a matrix that cannot be decomposed.

    ``torch.linalg.eigh`` raises for the whole batch, and LAPACK may not return on a NaN.
    """
    if is_diagonal(x):
        return diagonal_eigh(x)
    finite = finite_matrices(x)
    safe = torch.where(matrices(finite), x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    try:
        values, vectors = _eigh_of_nonzero_part(safe)
    except LinAlgError:
        values, vectors = torch.full_like(x[..., 0], torch.nan), torch.full_like(x, torch.nan)
    failed = ~values.isfinite().all(-1)  # LAPACK may also give NaN without a word
    if failed.any():
        values[failed], vectors[failed] = _eigh_one_by_one(safe[failed])
    values = values.masked_fill(~finite[..., None], torch.nan)
    return values, vectors.masked_fill(~matrices(finite), torch.nan)


def _eigh_of_nonzero_part(x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` without the rows that are zero in every matrix.

    They are common (dead units, padding around a small map), cost time, and keep LAPACK's single precision from
    converging.
    """
    used = ((x.amax(-1) != 0) | (x.amin(-1) != 0)).reshape(-1, x.shape[-1]).any(0)
    if used.all():
        return torch.linalg.eigh(x)
    values, vectors = torch.zeros_like(x[..., 0]), _identity_like(x)
    index = used.nonzero()
    values[..., used], vectors[..., index, index.T] = torch.linalg.eigh(x[..., index, index.T])
    return values, vectors


def _eigh_one_by_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of matrices ``(k, d, d)``, each in double precision where its own does not do."""
    values, vectors = torch.full_like(x[..., 0], torch.nan), torch.full_like(x, torch.nan)
    for k, matrix in enumerate(x):
        for dtype in dict.fromkeys((x.dtype, torch.float64)):
            try:
                some_values, some_vectors = _eigh_of_nonzero_part(matrix.to(dtype))
            except LinAlgError:
                continue
            if some_values.isfinite().all():
                values[k], vectors[k] = some_values, some_vectors
                break
    return values, vectors


def spd_inverse_or_nan(x: Tensor, shift: Tensor) -> Tensor:
    """``(x + shift I)^{-1}`` of semi-definite matrices by Cholesky; NaN where that is not positive definite."""
    if is_diagonal(x):
        return diagonal_inverse(x, shift)
    shifted = x.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift.squeeze(-1))
    factor, info = torch.linalg.cholesky_ex(shifted)
    bad = (info != 0) | ~finite_matrices(shifted)
    if bad.any():  # cholesky_inverse raises for the whole batch on a singular factor.
        factor = torch.where(matrices(bad), _identity_like(x), factor)
    inverse = torch.cholesky_inverse(factor)
    # The inverse of a semi-definite matrix and a shift is at most 1 / shift, unless rounding ate the shift.
    largest = inverse.diagonal(dim1=-2, dim2=-1).amax(-1) * shift[..., 0, 0]
    bad |= ~(largest <= 1.01)
    if bad.any():
        inverse[bad] = _inverse_by_eigenvalues(x[bad], shift.expand(*bad.shape, 1, 1)[bad]).to(x.dtype)
    return inverse


def _inverse_by_eigenvalues(x: Tensor, shift: Tensor) -> Tensor:
    """``(x + shift I)^{-1}`` in float64, whatever is left of a positive ``shift`` beside ``x``.

    A negative eigenvalue counts as the zero from which rounding moved it. A clearly negative one is no rounding
    (not even TF32's) and gives NaN, as no shift does.
    """
    values, vectors = eigh_or_nan(x.double())
    values = values.masked_fill(values < -0.01 * values.abs().amax(-1, keepdim=True), torch.nan)
    damped = values.clamp(min=0) + shift.squeeze(-1)
    return ((vectors / damped[..., None, :]) @ vectors.mT).masked_fill(shift <= 0, torch.nan)


def _identity_like(x: Tensor) -> Tensor:
    """One identity for each matrix of ``x``."""
    if is_diagonal(x):
        return torch.ones_like(x)
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x).clone()
