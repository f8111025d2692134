"""Coarse spaces that take the two-level correction apart: each changes one thing of ``CoarseSpace``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from experiments.study.forms import SPACES
from experiments.study.lengths import PermutedBySeed, constant, of_length, prolonged_norm, scheduled
from kfac2.curvature import CoarseSpace
from kfac2.curvature.coarse import Blocks
from kfac2.curvature.grams import Maps
from kfac2.curvature.grids import pair_grid
from kfac2.optim.two_level import TwoLevelKFAC


class Diagonal(CoarseSpace):
    """Only the diagonal of F̃_coarse: a correction within layers, none between them."""

    def matrix(self) -> Tensor:
        return _diagonal(super().matrix())


class DampingOnly(CoarseSpace):
    """``Zᵀ Z ∇ / λ``: the coarse Fisher left out, so that every layer has the same, constant, factor."""

    def matrix(self) -> Tensor:
        return torch.zeros_like(self.grams[0])


class NormMatched(CoarseSpace):
    """Another direction in the coarse space, as long in parameter space as the full correction at every step."""

    def solve(self, coarse_gradient: Tensor) -> Tensor:
        full, other = super().solve(coarse_gradient), self.direction(coarse_gradient)
        norm, other_norm = (prolonged_norm(self.sizes, each) for each in (full, other))
        return other * torch.where(other_norm > 0, norm / other_norm, 0.0)

    def direction(self, coarse_gradient: Tensor) -> Tensor:
        """What takes the place of ``(F̃_coarse + λI)^{-1} Z ∇``, ``(R, L)``, of any length."""
        raise NotImplementedError


class Identity(NormMatched):
    """A multiple of ``Zᵀ Z ∇``: the matrix plays no part but in the length."""

    def direction(self, coarse_gradient: Tensor) -> Tensor:
        return coarse_gradient


class DiagonalMatched(NormMatched):
    """The inverse of the damped diagonal of F̃_coarse: a layer's own curvature at the full length."""

    tensors = (*CoarseSpace.tensors, "diagonal_inverse")

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        super().bind(shapes, replicas, device)
        self.diagonal_inverse = torch.zeros_like(self.inverse[..., 0])

    def refresh(self, damping: float | Tensor) -> Tensor:
        failed = super().refresh(damping)
        inverse = 1 / (self.matrix().diagonal(dim1=-2, dim2=-1) + self.per_eigenvalue(damping))
        self.diagonal_inverse = torch.where(failed[:, None], self.diagonal_inverse, inverse)
        return failed

    def direction(self, coarse_gradient: Tensor) -> Tensor:
        return self.diagonal_inverse * coarse_gradient


class Permuted(NormMatched):
    """The inverse of the coarse matrix with its layers permuted, another permutation at each refresh.

    Its spectrum is the full one's; which layers it couples is not.
    """

    counters = (*CoarseSpace.counters, "refreshes")
    refreshes = 0

    def refresh(self, damping: float | Tensor) -> Tensor:
        self.refreshes += 1
        return super().refresh(damping)

    def direction(self, coarse_gradient: Tensor) -> Tensor:
        order = self.permutation()
        return (self.inverse[:, order[:, None], order] @ coarse_gradient[..., None]).squeeze(-1)

    def permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.refreshes)
        return torch.randperm(len(self.sizes), generator=generator).to(self.inverse.device)


class RandomBasis(CoarseSpace):
    """One fixed random rank-one pattern per layer, ``u_i v_iᵀ``, in place of the ones.

    ``[Z ∇]_i = u_iᵀ ∇_i v_i``; the cheap form holds with ``α = vᵀ a`` and ``γ = uᵀ g``. Drawn layer by layer
    from one ``seed``, and scaled to the length of the ones: ``‖u_i v_iᵀ‖² = n_i``.
    """

    def __init__(self, draw: Callable[[int, torch.Generator], Tensor], weight: float = 1.0, seed: int = 0):
        super().__init__(weight=weight)
        self._draw, self._seed = draw, seed

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        super().bind(shapes, replicas, device)
        generator = torch.Generator().manual_seed(self._seed)
        self.patterns = [tuple(self._unit(size, generator).to(device) for size in shape) for shape in shapes]

    def _unit(self, size: int, generator: torch.Generator) -> Tensor:
        """A pattern of mean square 1."""
        drawn = self._draw(size, generator)
        return drawn / drawn.square().mean().sqrt()

    def basis(self, layer: int) -> tuple[Tensor, Tensor]:
        u, v = self.patterns[layer]
        return u, v

    def restrict(self, blocks: Blocks) -> Tensor:
        return super().restrict(
            [(index, gradients * self._stacked(index, gradients)) for index, gradients in blocks]
        )

    def prolong(self, coefficients: Tensor, blocks: Blocks) -> list[Tensor]:
        scalars = super().prolong(coefficients, blocks)
        return [
            scalar * self._stacked(index, gradients)
            for scalar, (index, gradients) in zip(scalars, blocks, strict=True)
        ]

    def _stacked(self, index: Tensor, gradients: Tensor) -> Tensor:
        """The patterns of some layers of one shape, ``(n, 1, d_out, d_in)``."""
        outer = [torch.outer(*self.patterns[i]) for i in index.tolist()]
        return torch.stack(outer)[:, None].to(gradients)


class Scheduled(CoarseSpace):
    """The full correction in the steps ``first`` to ``last`` (from 1; None: to the end), none in the others."""

    counters = (*CoarseSpace.counters, "steps")
    steps = 0

    def __init__(self, first: int, last: int | None = None, weight: float = 1.0):
        super().__init__(weight=weight)
        self.first, self.last = first, last

    def solve(self, coarse_gradient: Tensor) -> Tensor:
        self.steps += 1
        on = self.first <= self.steps and (self.last is None or self.steps <= self.last)
        return super().solve(coarse_gradient) if on else torch.zeros_like(coarse_gradient)


class Observed(CoarseSpace):
    """The full correction; beside it, a third Gram, the exact coarse Fisher of the same batches, which nothing uses."""

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        super().bind(shapes, replicas, device)
        self.grams = torch.cat([self.grams, torch.zeros_like(self.grams[:1])])

    def features(self, maps: Maps) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        yield from super().features(maps)
        yield from self.exact_features(maps)

    def matrix(self) -> Tensor:
        return self.grams[:2].prod(0)

    def exact_matrix(self) -> Tensor:
        return self.grams[2]


class AuthorsScale(CoarseSpace):
    """Positions scaled as in the authors' code at the paper's date: off the diagonal they are not divided out.

    The diagonal is eq. 7's. An off-diagonal entry multiplies sums over the positions of the pair's grid, where
    ``CoarseSpace`` multiplies means and scales by ``sqrt(T_i T_j)``: ``T² / sqrt(T_i T_j)`` times as large, ``T``
    that grid's positions, which is T between layers of one resolution (64, 256, 1,024 for maps of 8², 16², 32²).
    The matrix is indefinite.
    """

    tensors = (*CoarseSpace.tensors, "factors")

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        super().bind(shapes, replicas, device)
        self.factors = torch.ones_like(self.grams[0, 0])

    def accumulate(self, maps: Maps) -> None:
        grids = {i: tuple(gamma.shape[2:]) for i, (_, gamma) in maps.items()}
        factors = self.factors.cpu()  # one copy to a GPU and back, not one for each pair
        for i, j in combinations(grids, 2):
            together = prod(pair_grid(grids[i], grids[j]))
            factor = together**2 / sqrt(prod(grids[i]) * prod(grids[j]))
            factors[i, j] = factors[j, i] = factor
        self.factors = factors.to(self.factors.device)
        super().accumulate(maps)

    def matrix(self) -> Tensor:
        return self.factors * super().matrix()


class AuthorsAccumulated(AuthorsScale):
    """The authors' code at the paper's date: at each refresh the new off-diagonal is added to the old one.

    The diagonal is the latest one alone, and the matrix is plainly inverted, whatever its eigenvalues' signs.
    """

    tensors = (*AuthorsScale.tensors, "off_diagonal")

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        super().bind(shapes, replicas, device)
        self.off_diagonal = torch.zeros_like(self.grams[0])

    def refresh(self, damping: float | Tensor) -> Tensor:
        latest = super().matrix()
        self.off_diagonal = self.off_diagonal + latest - _diagonal(latest)
        return super().refresh(damping)

    def matrix(self) -> Tensor:
        return self.off_diagonal + _diagonal(super().matrix())

    def damped(self, eigenvalues: Tensor, damping: Tensor) -> Tensor:
        return eigenvalues + damping


def _diagonal(matrix: Tensor) -> Tensor:
    """The matrix without what is off its diagonal."""
    return matrix.diagonal(dim1=-2, dim2=-1).diag_embed()


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (size,), generator=generator).double() * 2 - 1


def gaussian(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


# Schedules count steps, on any problem and with any batch: 49 are an epoch of the deep linear MLP (25,000 samples in
# batches of 512), for which `first_epoch` and `after_epoch_5` are named.
MLP_EPOCH_STEPS = 49
Factory = Callable[..., CoarseSpace]
"""``factory(weight=...)``."""


def random_bases(space: Factory, ending: str = "") -> dict[str, Factory]:
    """Three draws of either kind."""
    return {
        f"{name}{draw_number}{ending}": partial(space, draw, seed=seed)
        for name, draw in (("signs", random_signs), ("gaussian", gaussian))
        for seed, draw_number in enumerate(("", "_2", "_3"))
    }


def by_schedule(step: int) -> float:
    return scheduled(step, MLP_EPOCH_STEPS)


DIRECTIONS = {"full": CoarseSpace, "identity": DampingOnly, "diagonal": Diagonal, "permuted": PermutedBySeed}
VARIANTS: dict[str, Factory] = {
    "full": CoarseSpace,
    "exact": partial(CoarseSpace, "exact"),
    "observed": Observed,
    "diagonal": Diagonal,
    "damping_only": DampingOnly,
    "identity": Identity,
    "diagonal_matched": DiagonalMatched,
    "permuted": Permuted,
    **random_bases(RandomBasis),
    "consistent": partial(CoarseSpace, damping="consistent"),
    "bounded": partial(CoarseSpace, max_ratio=1.0),
    "authors_scale": AuthorsScale,
    "authors_accumulated": AuthorsAccumulated,
    "first_step": partial(Scheduled, 1, 1),
    "first_epoch": lambda **weight: Scheduled(1, MLP_EPOCH_STEPS, **weight),
    "after_epoch_5": lambda **weight: Scheduled(5 * MLP_EPOCH_STEPS + 1, **weight),
    # Directions at a length that no coarse matrix decides.
    **{f"{name}_scheduled": of_length(space, by_schedule) for name, space in DIRECTIONS.items()},
    **{f"{name}_constant": of_length(space, constant) for name, space in DIRECTIONS.items()},
    **random_bases(of_length(RandomBasis, by_schedule), "_scheduled"),
    **SPACES,
}


def two_level_variant(
    model: nn.Module, lr: float = 1e-3, *, coarse: str = "full", coarse_weight: float = 1.0, **options: Any
) -> TwoLevelKFAC:
    """``TwoLevelKFAC`` with one of ``VARIANTS`` as its coarse space.

    Raises:
        ValueError: an unknown variant.
    """
    if coarse not in VARIANTS:
        raise ValueError(f"unknown optimizer.coarse {coarse!r}: choose from {', '.join(VARIANTS)}")
    return TwoLevelKFAC(model, lr, coarse=VARIANTS[coarse](weight=coarse_weight), **options)
