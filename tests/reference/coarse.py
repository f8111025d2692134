"""Literal two-level K-FAC: Algorithm 1 pair by pair of layers, dense Kronecker products and ``Z``."""

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.fisher import restriction
from tests.reference.kfac import LiteralKFAC, PerLayer, eye_like, mean_outer
from tests.reference.maps import common_grid, grid_of, pair_grid, positions, resample, rows


class LiteralTwoLevelKFAC(LiteralKFAC):
    """K-FAC and ``coarse_weight * Z^T (|F_coarse| + λ I)^{-1} Z`` (eq. 6).

    ``coarse_fisher="kronecker"``: ``[F_coarse]_ij`` sums the entries of ``A_ij kron G_ij``, running
    averages of all pairs' covariances being kept (Algorithm 1), on the grid of ``coarse_grid``. ``Z`` has
    no row for layers in ``outside_coarse``.
    ``"exact"``: ``E[p pᵀ]``, ``p_i`` the sum of the entries of a sample's gradient ``Σ_t g_it a_itᵀ``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        coarse_fisher: str = "kronecker",
        coarse_grid: str = "pairwise",
        resample: str = "nearest",
        coarse_weight: float = 1.0,
        outside_coarse: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.coarse_fisher = coarse_fisher
        self.coarse_grid = coarse_grid
        self.resample = resample
        self.coarse_weight = coarse_weight
        self.outside_coarse = outside_coarse
        self.was_indefinite = False
        self.indefinite = 0

    def statistics(self, a: PerLayer, g: PerLayer) -> dict[Hashable, Tensor]:
        """The factors, and what the coarse Fisher averages, by pair of layers."""
        statistics = super().statistics(a, g)
        for i, j in lower_triangle([name for name in self.layers if name in a]):
            if self.coarse_fisher == "kronecker":
                statistics["A", i, j] = mean_outer(*self.on_one_grid(a, i, j))
                scale = sqrt(positions(g[i]) * positions(g[j]))
                statistics["G", i, j] = scale * mean_outer(*self.on_one_grid(g, i, j))
            else:
                statistics["pp", i, j] = (entry_sums(a[i], g[i]) * entry_sums(a[j], g[j])).mean()
        return statistics

    def on_one_grid(self, maps: PerLayer, i: str, j: str) -> tuple[Tensor, Tensor]:
        """The maps of a pair of layers on the grid on which they are compared."""
        if self.coarse_grid == "pairwise":
            grid = pair_grid(grid_of(maps[i]), grid_of(maps[j]))
        else:
            grid = common_grid([grid_of(x) for x in maps.values()])
        return resample(maps[i], grid, self.resample), resample(maps[j], grid, self.resample)

    def coarse_matrix(self) -> Tensor:
        """``F_coarse``, shape ``(L, L)``."""
        names = [name for name in self.preconditioned if name not in self.outside_coarse]
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
        w = torch.linalg.eigvalsh(F_coarse)
        self.indefinite += bool((w < -max(self.damping, 1e-6 * w.abs().max().item())).any())
        inside = [name not in self.outside_coarse for name in self.preconditioned]
        Z = restriction(self.sizes)[inside]
        inverse = torch.linalg.inv(absolute + self.damping * eye_like(absolute))
        return super().form_preconditioner() + self.coarse_weight * Z.T @ inverse @ Z


def entry_sums(a: Tensor, g: Tensor) -> Tensor:
    """``p``, shape ``(B,)``: the sum of the entries of every sample's gradient ``Σ_t g_t a_tᵀ``."""
    return torch.stack([(rows(g_n[None]).T @ rows(a_n[None])).sum() for g_n, a_n in zip(g, a, strict=True)])


def lower_triangle(names: Sequence[str]) -> list[tuple[str, str]]:
    """Algorithm 1's pairs, the diagonal included."""
    return [(i, j) for row, i in enumerate(names) for j in names[: row + 1]]


def matrix_absolute(matrix: Tensor) -> Tensor:
    """``Q |w| Qᵀ``: the matrix itself unless it is indefinite.

    Pairs first seen at different times are averages over different batches, and pairs compared on
    different grids over different positions: neither need form a semi-definite matrix.
    """
    w, Q = torch.linalg.eigh(matrix)
    return Q @ w.abs().diag() @ Q.T
