"""Literal two-level K-FAC: Algorithm 1 pair by pair, dense Kronecker products and ``Z``."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.fisher import restriction
from tests.reference.kfac import LiteralKFAC, PerLayer, eye_like, mean_outer


class LiteralTwoLevelKFAC(LiteralKFAC):
    """K-FAC and ``coarse_weight * Z^T (|F_coarse| + λ I)^{-1} Z`` (eq. 6).

    ``coarse_fisher="kronecker"``: ``[F_coarse]_ij`` sums the entries of ``A_ij kron G_ij``, running
    averages of all pairs' covariances being kept (Algorithm 1). ``"exact"``: ``E[p pᵀ]``, ``p_i``
    the sum of the entries of a sample's gradient ``g_i a_iᵀ``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        coarse_fisher: str = "kronecker",
        coarse_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.coarse_fisher = coarse_fisher
        self.coarse_weight = coarse_weight
        self.was_indefinite = False

    def statistics(self, a: PerLayer, g: PerLayer) -> dict[Hashable, Tensor]:
        """The factors, and what the coarse Fisher averages, by pair of layers."""
        statistics = super().statistics(a, g)
        for i, j in lower_triangle(list(a)):
            if self.coarse_fisher == "kronecker":
                statistics["A", i, j] = mean_outer(a[i], a[j])
                statistics["G", i, j] = mean_outer(g[i], g[j])
            else:
                statistics["pp", i, j] = (entry_sums(a[i], g[i]) * entry_sums(a[j], g[j])).mean()
        return statistics

    def coarse_matrix(self) -> Tensor:
        """``F_coarse``, shape ``(L, L)``."""
        names = list(self.preconditioned)
        F_coarse = torch.zeros(len(names), len(names), dtype=torch.float64)
        for i, j in lower_triangle(names):
            entry = self.coarse_entry(i, j)
            F_coarse[names.index(i), names.index(j)] = entry
            F_coarse[names.index(j), names.index(i)] = entry
        return F_coarse

    def coarse_entry(self, i: str, j: str) -> Tensor:
        if self.coarse_fisher == "kronecker":
            return torch.kron(self.averages["A", i, j], self.averages["G", i, j]).sum()
        return self.averages["pp", i, j]

    def form_preconditioner(self) -> Tensor:
        """One level's plus ``coarse_weight * Z^T (|F_coarse| + λ I)^{-1} Z``, shape ``(n, n)``."""
        F_coarse = self.coarse_matrix()
        absolute = matrix_absolute(F_coarse)
        self.was_indefinite |= not torch.allclose(absolute, F_coarse)
        Z = restriction(self.sizes)
        inverse = torch.linalg.inv(absolute + self.damping * eye_like(absolute))
        return super().form_preconditioner() + self.coarse_weight * Z.T @ inverse @ Z


def entry_sums(a: Tensor, g: Tensor) -> Tensor:
    """``p``, shape ``(B,)``: the sum of the entries of every sample's weight gradient ``g aᵀ``."""
    return torch.stack([torch.outer(g_n, a_n).sum() for g_n, a_n in zip(g, a, strict=True)])


def lower_triangle(names: Sequence[str]) -> list[tuple[str, str]]:
    """Algorithm 1's pairs, the diagonal included."""
    return [(i, j) for row, i in enumerate(names) for j in names[: row + 1]]


def matrix_absolute(matrix: Tensor) -> Tensor:
    """``Q |w| Qᵀ``: the matrix itself unless it is indefinite.

    Pairs first seen at different times are averages over different batches, and need not form a
    semi-definite matrix.
    """
    w, Q = torch.linalg.eigh(matrix)
    return Q @ w.abs().diag() @ Q.T
