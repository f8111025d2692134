"""Damped natural gradients of a Fisher of rank K, in all layers together, in each, and with coarse corrections.

The Fisher is ``F = Mᵀ S M``, the gradient ``g = Mᵀ r`` with M ``(K, n)`` the Jacobian of K numbers; layers are kept
apart by their Jacobians' Grams ``T_i = M_i M_iᵀ`` and sums ``m_i = M_i 1``. Every inverse is one of K × K or L × L
matrices (Woodbury). R replicas side by side, float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Direction(NamedTuple):
    """``d_i = M_iᵀ u_i + b_i 1`` layer by layer: ``u`` ``(R, L, K)``, ``b`` ``(R, L)``."""

    u: Tensor
    b: Tensor


@dataclass(frozen=True)
class Curvature:
    """What a batch says of the layers' weights; all float64."""

    r: Tensor
    """``(R, K)``."""
    S: Tensor
    """``(R, K, K)``."""
    T: Tensor
    """``(R, L, K, K)``."""
    m: Tensor
    """``(R, L, K)``."""
    sizes: Tensor
    """Number of weights of each layer, ``(L,)``."""
    damping: float

    def seen(self, d: Direction) -> Tensor:
        """``M d``, ``(R, K)``."""
        return times(self.T, d.u).sum(1) + torch.einsum("rlk,rl->rk", self.m, d.b)

    def slope(self, d: Direction) -> Tensor:
        """``gᵀ d``, ``(R,)``."""
        return (self.r * self.seen(d)).sum(-1)

    def curvature(self, d: Direction) -> Tensor:
        """``dᵀ F_λ d``, ``(R,)``."""
        seen = self.seen(d)
        squares = (d.u * times(self.T, d.u)).sum(-1) + 2 * d.b * (self.m * d.u).sum(-1) + self.sizes * d.b**2
        return (seen * times(self.S, seen)).sum(-1) + self.damping * squares.sum(-1)

    def restricted(self, d: Direction) -> Tensor:
        """``Z d``, the layers' sums, ``(R, L)``."""
        return (self.m * d.u).sum(-1) + self.sizes * d.b

    def restricted_product(self, d: Direction) -> Tensor:
        """``Z F_λ d``, ``(R, L)``."""
        return times(self.m, times(self.S, self.seen(d))) + self.damping * self.restricted(d)

    def coarse(self) -> Tensor:
        """``Z F Zᵀ``, ``(R, L, L)``."""
        return self.m @ self.S @ self.m.mT

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor]:
        """LU factors of ``λI + S T_i``, most of a step's time where K is large; NaN in a diverged replica."""
        matrices = self.S[:, None] @ self.T
        matrices.diagonal(dim1=-2, dim2=-1).add_(self.damping)
        return torch.linalg.lu_factor_ex(matrices)[:2]

    def blocks_solve(self, rhs: Tensor) -> Tensor:
        """``(λI + S T_i)⁻¹`` of each layer, on ``(R, L, K)``: ``P_i M_iᵀ rhs = M_iᵀ`` of this."""
        return torch.linalg.lu_solve(*self._blocks, rhs[..., None]).squeeze(-1)

    def blocks_of_ones(self) -> Direction:
        """``P_i 1`` in each layer, by Woodbury."""
        u = -self.blocks_solve(times(self.S[:, None], self.m)) / self.damping
        return Direction(u, torch.ones_like(u[..., 0]) / self.damping)


def full(c: Curvature) -> Direction:
    """``F_λ⁻¹ g``."""
    u = solve(c.S @ c.T.sum(1) + c.damping * identity(c.S), c.r)
    return Direction(u[:, None].expand_as(c.m), torch.zeros_like(c.m[..., 0]))


def block_diagonal(c: Curvature) -> Direction:
    """``P g``, P the inverse of F_λ's blocks."""
    return Direction(c.blocks_solve(c.r[:, None].expand_as(c.m)), torch.zeros_like(c.m[..., 0]))


def additive(c: Curvature) -> Direction:
    """``P g + Zᵀ (Z F Zᵀ + λI)⁻¹ Z g`` (the paper's eq. 6, with exact matrices)."""
    u, b = block_diagonal(c)
    matrix = c.coarse() + c.damping * identity(c.coarse())
    return Direction(u, b + solve(matrix, times(c.m, c.r)))


def galerkin(c: Curvature) -> Direction:
    """``v = P g`` with the error's F_λ-norm minimised over the range of Zᵀ (Koroko et al. 2023)."""
    return _corrected(c, block_diagonal(c))


def residual_corrected(c: Curvature) -> Direction:
    """``(I - Q F_λ) P (I - F_λ Q) g + Q g``, ``Q = Zᵀ (Z F_λ Zᵀ)⁻¹ Z`` (m3 of Tselepidis' later code)."""
    beta = solve(_damped_coarse(c), times(c.m, c.r))
    r = c.r - times(c.S, torch.einsum("rlk,rl->rk", c.m, beta))
    u, ones = c.blocks_solve(r[:, None].expand_as(c.m)), c.blocks_of_ones()
    scale = c.damping * beta
    return _corrected(c, Direction(u - scale[..., None] * ones.u, -scale * ones.b))


def inverse_of_sum(c: Curvature) -> Direction:
    """The inverse of the blocks plus ``Zᵀ C° Z``'s pull-back, C° the coarse Fisher off its diagonal: nothing is counted
    twice."""
    v, ones = block_diagonal(c), c.blocks_of_ones()
    coarse = c.coarse()
    off = coarse - coarse.diagonal(dim1=-2, dim2=-1).diag_embed()
    matrix = identity(coarse) + off * c.restricted(ones)[:, None, :]
    y = solve(matrix, times(off, c.restricted(v)))
    return Direction(v.u - y[..., None] * ones.u, v.b - y * ones.b)


CORRECTIONS: dict[str, Callable[[Curvature], Direction]] = {
    "full": full,
    "block_diagonal": block_diagonal,
    "additive": additive,
    "galerkin": galerkin,
    "residual_corrected": residual_corrected,
    "inverse_of_sum": inverse_of_sum,
}


def _corrected(c: Curvature, d: Direction) -> Direction:
    """``d + Zᵀ (Z F_λ Zᵀ)⁻¹ Z (g - F_λ d)``."""
    return Direction(d.u, d.b + solve(_damped_coarse(c), times(c.m, c.r) - c.restricted_product(d)))


def _damped_coarse(c: Curvature) -> Tensor:
    """``Z F_λ Zᵀ``."""
    return c.coarse() + c.damping * c.sizes.diag()


def solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """NaN where a diverged replica's matrix has no inverse."""
    return torch.linalg.solve_ex(matrix, rhs[..., None])[0].squeeze(-1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
