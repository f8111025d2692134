"""How close K-FAC's directions come to the exact natural gradient ``F_λ⁻¹ g``, and why."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from experiments.records import PCG_LIMIT
from experiments.study.fisher import DampedFisher
from kfac2.optim.preconditioner import Preconditioner

Operator = Callable[[Tensor], Tensor]
PCG_TOLERANCE = 1e-6  # of the residual, relative


class Layout:
    """Vectors ``(n,)`` of all preconditioned parameters, layer by layer, and the optimizer's blocks.

    Of one replica; a layer's entries are those of its gradient matrix, row by row.
    """

    def __init__(self, preconditioner: Preconditioner):
        self.stacks = preconditioner.stacks
        self.shapes = [layer.matrix_shape for layer in preconditioner.layers]
        ends = np.cumsum([d_out * d_in for d_out, d_in in self.shapes])
        self.parts = [
            slice(int(end - a * b), int(end)) for end, (a, b) in zip(ends, self.shapes, strict=True)
        ]
        self.size = int(ends[-1])

    def blocks(self, vector: Tensor) -> list[Tensor]:
        """Per stack ``(n, 1, d_out, d_in)``."""
        matrices = [vector[part].view(1, *shape) for part, shape in zip(self.parts, self.shapes, strict=True)]
        return [torch.stack([matrices[i] for i in stack.index.tolist()]) for stack in self.stacks]

    def vector(self, blocks: list[Tensor]) -> Tensor:
        pieces: dict[int, Tensor] = {}
        for stack, block in zip(self.stacks, blocks, strict=True):
            pieces |= dict(zip(stack.index.tolist(), block, strict=True))
        return torch.cat([pieces[i].reshape(-1) for i in range(len(pieces))])

    def ones(self) -> Tensor:
        """``Z`` of eq. 5, ``(L, n)``."""
        Z = torch.zeros(len(self.parts), self.size, dtype=torch.float64)
        for row, part in zip(Z, self.parts, strict=True):
            row[part] = 1
        return Z


def preconditioners(preconditioner: Preconditioner, fisher: DampedFisher) -> dict[str, Operator]:
    """Approximations of ``F_λ⁻¹``, all symmetric but ``galerkin``.

    ``one_level``, ``two_level``: the optimizer's own, from its running factors. ``block_diagonal``: the exact
    blocks. ``true_coarse``: two levels with ``Z F Zᵀ`` in place of F̃_coarse. ``consistent_coarse``: with ``Z F_λ Zᵀ``
    in place of the damped matrix, too. ``galerkin``: one level
    and the coarse correction of its residual, ``β = (Z F_λ Zᵀ)⁻¹ Z (g - F_λ P₁ g)``, the best for this Z.
    ``deflated``: multiplicative and symmetric, ``Q + (I - Q F_λ) P₁ (I - F_λ Q)`` with
    ``Q = Zᵀ (Z F_λ Zᵀ)⁻¹ Z`` (balancing Neumann-Neumann).
    """
    layout = Layout(preconditioner)
    Z = layout.ones()
    coarse_space = preconditioner.coarse
    assert coarse_space is not None
    true = fisher.coarse(Z)
    damped_as_optimizer = true + fisher.damping * torch.eye(len(Z), dtype=Z.dtype)
    damped_consistently = true + fisher.damping * Z @ Z.T

    def one_level(g: Tensor) -> Tensor:
        blocks = layout.blocks(g)
        return layout.vector(
            [stack.blocks.inverse.apply(b) for stack, b in zip(layout.stacks, blocks, strict=True)]
        )

    def own_coarse(g: Tensor) -> Tensor:
        blocks = list(zip([stack.index for stack in layout.stacks], layout.blocks(g), strict=True))
        coefficients = coarse_space.solve(coarse_space.restrict(blocks))
        corrections = coarse_space.prolong(coefficients, blocks)
        return layout.vector([c.expand_as(b) for c, (_, b) in zip(corrections, blocks, strict=True)])

    factors = [torch.linalg.cholesky(fisher.block(part)) for part in layout.parts]

    def block_diagonal(g: Tensor) -> Tensor:
        solved = [
            torch.cholesky_solve(g[part, None], factor)
            for part, factor in zip(layout.parts, factors, strict=True)
        ]
        return torch.cat(solved)[:, 0]

    def coarse_solve(g: Tensor, damped: Tensor = damped_consistently) -> Tensor:
        return Z.T @ torch.linalg.solve(damped, Z @ g)

    def galerkin(g: Tensor) -> Tensor:
        start = one_level(g)
        return start + coarse_solve(g - fisher.apply(start))

    def deflated(g: Tensor) -> Tensor:
        first = coarse_solve(g)
        fine = one_level(g - fisher.apply(first))
        return first + fine - coarse_solve(fisher.apply(fine))

    return {
        "none": lambda g: g,
        "one_level": one_level,
        "two_level": lambda g: one_level(g) + own_coarse(g),
        "block_diagonal": block_diagonal,
        "true_coarse": lambda g: one_level(g) + coarse_solve(g, damped_as_optimizer),
        "consistent_coarse": lambda g: one_level(g) + coarse_solve(g),
        "galerkin": galerkin,
        "deflated": deflated,
    }


def direction_errors(v: Tensor, g: Tensor, fisher: DampedFisher) -> dict[str, float]:
    """How far ``v`` is from ``x = F_λ⁻¹ g``.

    ``error``: ``‖v - x‖ / ‖x‖`` in the F_λ norm; ``scaled_error``: the same at the best multiple of v (the sine of
    the angle in that norm); ``cosine``: Euclidean.
    """
    x = fisher.solve(g)
    scale = (v @ g) / (v @ fisher.apply(v))
    return {
        "error": fisher.norm(v - x) / fisher.norm(x),
        "scaled_error": fisher.norm(scale * v - x) / fisher.norm(x),
        "cosine": torch.nn.functional.cosine_similarity(v, x, dim=0).item(),
    }


def pcg_iterations(operator: Operator, g: Tensor, fisher: DampedFisher, limit: int = PCG_LIMIT) -> int:
    """Iterations of conjugate gradients on ``F_λ x = g`` with a symmetric positive definite preconditioner, until
    the residual is ``PCG_TOLERANCE`` of ``‖g‖``; ``limit`` if they do not suffice."""

    def wrapped(function: Operator) -> LinearOperator:
        def multiply(v: np.ndarray) -> np.ndarray:
            return function(torch.from_numpy(np.ascontiguousarray(v).reshape(-1))).numpy()

        return LinearOperator((len(g), len(g)), multiply, dtype=np.float64)  # pyright: ignore

    count = 0

    def counted(_: Any) -> None:
        nonlocal count
        count += 1

    _, failed = cg(
        wrapped(fisher.apply),
        g.numpy(),
        rtol=PCG_TOLERANCE,
        maxiter=limit,
        M=wrapped(operator),
        callback=counted,
    )
    return limit if failed else count


def coarse_numbers(matrix: Tensor, true: Tensor) -> dict[str, float]:
    """Of a coarse Fisher ``(L, L)`` beside the true ``Z F Zᵀ``, in the Frobenius norm: ``distance`` and ``size``
    relative to the true one, their ``cosine``, the share ``off_diagonal`` of its squared norm, the same
    ``normalised`` to a unit diagonal; and ``condition``, the ratio of its extreme eigenvalues' moduli."""
    diagonal = matrix.diagonal()
    scale = diagonal.clamp(min=torch.finfo(matrix.dtype).tiny).rsqrt()
    values = torch.linalg.eigvalsh(matrix).abs()
    return {
        "distance": ((matrix - true).norm() / true.norm()).item(),
        "size": (matrix.norm() / true.norm()).item(),
        "cosine": torch.nn.functional.cosine_similarity(matrix.flatten(), true.flatten(), dim=0).item(),
        "off_diagonal": _off_diagonal_share(matrix),
        "normalised_off_diagonal": _off_diagonal_share(scale[:, None] * matrix * scale),
        "condition": (values.max() / values.min()).item(),
    }


def _off_diagonal_share(matrix: Tensor) -> float:
    total = matrix.square().sum()
    return ((total - matrix.diagonal().square().sum()) / total).item()
