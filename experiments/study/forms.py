"""Coarse corrections of the forms and bases of Koroko et al. (2023), beside the paper's, on K-FAC.

Each layer has one or two vectors ``r_i`` of its parameters, the rows of ``R₀``. F is that of the latest refresh's
batch and label draws, ``(1/B) Σ_b j_b j_bᵀ`` with ``j_b = g_b ⊗ a_b`` in each layer: the running averages of K-FAC hold
no products between layers but the coarse ones, and a basis that moves would mix its own past into those. With
``F_λ = F + λI`` and P the one-level inverse, the additive form is the paper's, ``P g + R₀ᵀ M⁻¹ R₀ g``, and the Galerkin
form ``P g + R₀ᵀ M⁻¹ R₀ (g - F_λ P g)``; ``M = R₀ F R₀ᵀ`` plus λI or ``λ R₀ R₀ᵀ``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.study.arms import FORMED
from experiments.study.directions import solve
from kfac2.curvature import CoarseSpace
from kfac2.curvature.averages import matrices
from kfac2.curvature.coarse import Blocks
from kfac2.curvature.grams import Maps

Stacked = list[Tensor]
"""Tensors ``(n, R, d_out, d_in)``, one for each stack of layers of one shape."""
OneLevel = Callable[[Sequence[Tensor]], Stacked]


class Fisher(NamedTuple):
    """A batch's, in stacks of layers: ``a`` ``(n, R, d_in, B)``, ``g`` ``(n, R, d_out, B)`` each, and λ."""

    a: Stacked
    g: Stacked
    damping: Tensor
    """``(R,)``, or a number."""

    def seen(self, x: Stacked) -> list[Tensor]:
        """``j_bᵀ x`` in each layer, ``(n, R, B)``."""
        return [((each @ a) * g).sum(-2) for each, a, g in zip(x, self.a, self.g, strict=True)]

    def times(self, x: Stacked) -> Stacked:
        """``F_λ x``."""
        total = torch.cat(self.seen(x)).sum(0) / self.a[0].shape[-1]
        products = ((g * total[:, None]) @ a.mT for a, g in zip(self.a, self.g, strict=True))
        return [own + matrices(self.damping) * each for own, each in zip(products, x, strict=True)]


Basis = Callable[[Fisher, Stacked, Stacked, OneLevel], list[Stacked]]
"""Of F, the gradients, the one-level updates and P: the vectors, each of all layers."""


def ones(fisher: Fisher, gradients: Stacked, updates: Stacked, one_level: OneLevel) -> list[Stacked]:
    """Nicolaides': the paper's."""
    return [[torch.ones_like(x) for x in gradients]]


def eigenvectors(
    place: int, fisher: Fisher, gradients: Stacked, updates: Stacked, one_level: OneLevel
) -> list[Stacked]:
    """``q_G q_Aᵀ`` of the batch's Kronecker factors, the smallest's (``place`` 0) or the largest's (-1)."""
    vectors = (
        [torch.linalg.eigh((x @ x.mT).double())[1][..., place].to(x) for x in columns]
        for columns in (fisher.g, fisher.a)
    )
    return [[u[..., :, None] * v[..., None, :] for u, v in zip(*vectors, strict=True)]]


def residual(fisher: Fisher, gradients: Stacked, updates: Stacked, one_level: OneLevel) -> list[Stacked]:
    """``P (g - F_λ P g)``: where one level is wrong at this step."""
    products = fisher.times(updates)
    return [one_level([g - product for g, product in zip(gradients, products, strict=True)])]


def krylov(fisher: Fisher, gradients: Stacked, updates: Stacked, one_level: OneLevel) -> list[Stacked]:
    """The residual's vectors and P of them."""
    (first,) = residual(fisher, gradients, updates, one_level)
    return [first, one_level(first)]


BASES: dict[str, Basis] = {
    "ones": ones,
    "smallest": partial(eigenvectors, 0),
    "largest": partial(eigenvectors, -1),
    "residual": residual,
    "krylov": krylov,
}


class Formed(CoarseSpace):
    """A correction of one of ``FORMS`` over one of ``BASES``; for ``ReplicatedLinear`` layers without biases.

    Vectors are as long as the ones, ``‖r_i‖² = n_i``, so that λI is as weak beside M for all of them.
    """

    def __init__(self, form: str, basis: Basis, damping: str, weight: float = 1.0):
        super().__init__("exact", weight=weight)
        self.form, self.basis_of, self.damped_by = form, basis, damping
        self.coming: dict[int, tuple[Tensor, Tensor]] = {}
        self.batch: dict[int, tuple[Tensor, Tensor]] = {}
        self.damping_value: Tensor = torch.zeros(())

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        super().bind(shapes, replicas, device)
        self.shapes = list(shapes)

    def look_at(self, layer: int, inputs: Tensor, gradients: Tensor) -> None:
        if inputs.dim() != 3 or (gradients.shape[1], inputs.shape[1]) != self.shapes[layer]:
            raise ValueError("these coarse corrections are for ReplicatedLinear layers without biases")
        self.coming[layer] = inputs, gradients

    def accumulate(self, maps: Maps) -> None:
        super().accumulate(maps)
        self.batch, self.coming = self.coming, {}

    def refresh(self, damping: float | Tensor) -> Tensor:
        self.damping_value = torch.as_tensor(damping).to(self.sizes)
        return super().refresh(damping)

    def corrections(self, blocks: Blocks, updates: Sequence[Tensor], one_level: OneLevel) -> list[Tensor]:
        gradients, updates = [g for _, g in blocks], list(updates)
        fisher = self._fisher(blocks)
        vectors = [_scaled(x) for x in self.basis_of(fisher, gradients, updates, one_level)]
        seen = torch.cat([p for x in vectors for p in fisher.seen(x)]).movedim(1, 0).double()
        M = seen @ seen.mT / seen.shape[-1] + matrices(self.damping_value) * self._damping(vectors)
        right = gradients
        if self.form == "galerkin":
            right = [g - product for g, product in zip(gradients, fisher.times(updates), strict=True)]
        beta = solve(M, _inner(vectors, right)).split([len(x) for x in gradients] * len(vectors), dim=-1)
        total = [torch.zeros_like(x) for x in gradients]
        for place, own in enumerate(beta):
            vector, stack = vectors[place // len(total)], place % len(total)
            total[stack] += self.weight * matrices(own.T).to(total[stack]) * vector[stack]
        return total

    def _fisher(self, blocks: Blocks) -> Fisher:
        index = [own.tolist() for own, _ in blocks]
        a, g = ([torch.stack([self.batch[i][k] for i in own]) for own in index] for k in (0, 1))
        return Fisher(a, g, self.damping_value.to(a[0]))

    def _damping(self, vectors: list[Stacked]) -> Tensor:
        """I, or ``R₀ R₀ᵀ``, ``(R, K, K)``; vectors of different layers are orthogonal."""
        numbers = sum(len(x) for x in vectors[0])
        if self.damped_by == "identity":
            return torch.eye(numbers * len(vectors)).to(self.sizes)
        rows = [[_inner([x], y).diag_embed() for y in vectors] for x in vectors]
        return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch": self.batch, "damping_value": self.damping_value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch, self.damping_value = state["batch"], state["damping_value"]


def _inner(vectors: list[Stacked], x: Stacked) -> Tensor:
    """``R₀ x``, ``(R, K)``, float64."""
    products = [
        (r.double() * own).sum((-2, -1)) for vector in vectors for r, own in zip(vector, x, strict=True)
    ]
    return torch.cat(products).T


def _scaled(x: Stacked) -> Stacked:
    """Each layer's vector with a mean square of 1; zero stays zero."""
    return [each / each.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=1e-30) for each in x]


def space(name: str) -> Callable[..., CoarseSpace]:
    form, basis, damping = name.split("_")
    return partial(Formed, form, BASES[basis], damping)


SPACES = {name: space(name) for name in FORMED}
