"""The coarse space of two-level K-FAC: one degree of freedom per layer (eq. 5-7, Algorithm 1)."""

from collections.abc import Callable, Iterator, Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac2.curvature.averages import finite_matrices, matrices, running_average
from kfac2.curvature.grams import Maps, add_gram, averaged, on_common_grid, positions, sizes, sums_of_products
from kfac2.curvature.grids import RESAMPLINGS
from kfac2.curvature.inverses import eigh_or_nan

COARSE_FISHERS = ("kronecker", "exact")
COARSE_GRIDS = ("pairwise", "common")
COARSE_DAMPINGS = ("identity", "consistent")

LARGEST_PART = 2**20
"""Numbers of all layers' maps that are put side by side at once: many samples are taken in parts."""

Blocks = Sequence[tuple[Tensor, Tensor]]
"""Layers of one shape: their positions in the coarse space ``(n,)`` and a tensor ``(n, R, d_out, d_in)``."""


class CoarseSample(NamedTuple):
    """Sums over samples of the products behind each Gram ``(k, R, L, L)``, of how many they are ``(R, L, L)``.

    Of a replica whose sums were not finite there are none, and ``rejected`` ``(R,)`` counts them.
    """

    sums: Tensor
    counts: Tensor
    rejected: Tensor

    def plus(self, other: "CoarseSample | None") -> "CoarseSample":
        if other is None:
            return self
        return CoarseSample(*(one + two for one, two in zip(self, other, strict=True)))


class CoarseSpace:
    """The correction ``Zᵀ (F̃_coarse + λI)^{-1} Z ∇`` of eq. 6, one scalar per layer.

    The optimizer calls ``accumulate`` after each back-propagation, ``fold`` and ``refresh`` when a
    refresh is due, and ``restrict``, ``solve``, ``prolong`` in every step. A study of another coarse space
    overrides what it changes (as ``experiments/study`` does), and names in ``tensors`` and ``counters`` what
    it must remember.

    With the sums ``α_i = 1ᵀ a_i`` and ``γ_i = 1ᵀ g_i`` of each sample and position,

        [F̃_coarse]_ij = sqrt(T_i T_j) · mean[α_i α_j] · mean[γ_i γ_j]

    over batch and positions, ``T_i`` a layer's number of positions (1 for a linear layer on vectors, where
    it is eq. 7 itself, because ``Σ_kl (A ⊗ G)_kl = (1ᵀA1)(1ᵀG1)``). The scale is KFC's (Grosse and Martens
    2016) on the diagonal; between layers of different resolution the paper gives none.

    Args:
        fisher: ``"kronecker"``: the above. ``"exact"``: ``E[p pᵀ]``, ``p_i`` the sum over positions of
            ``α_i γ_i``, which is ``Z F Zᵀ`` itself where samples do not interact. BatchNorm in training
            mode makes them interact: then the true ``Z F Zᵀ`` is that of the whole batch's logits, another
            matrix. Semi-definite as long as all layers are first seen together.
        grid: where two layers of different resolution are compared. ``"pairwise"``: per axis at the
            smaller size of the two; the matrix may be indefinite. ``"common"``: all at the smallest size
            among the layers with several positions; semi-definite, as ``"exact"`` is. A layer with one
            position is repeated over the grid; if layers cannot be compared (a sequence and an image),
            their maps are averaged.
        resample: how a map is brought to a smaller grid, ``"nearest"`` or ``"area"``.
        weight: factor on the correction; 0 gives one-level K-FAC.
        damping: ``"identity"``: λI, the paper's. ``"consistent"``: ``λ Z Zᵀ = λ diag(n_i)``, ``n_i`` a layer's
            number of parameters: the coarse matrix of the damped Fisher, ``Z (F + λI) Zᵀ`` (Koroko et al. 2023).
        max_ratio: the correction is at most this many times as long as the one-level update, per replica and
            before KL clipping; None: as long as it comes out.

    Outside the paper's experiments try one level first. The paper's λI is small beside matrix entries that grow
    with the layers' sizes: at its damping of 1e-2 the correction was 34 to 121 times as long as the one-level
    update on a MobileNetV3, which diverged, and 3.5 times on a small ViT (0.16 on a plain CNN). If two levels
    are wanted there, take ``damping="consistent"`` (0.02 to 0.08 times on that MobileNetV3), and ``max_ratio=1``
    for safety.
    """

    tensors: tuple[str, ...] = ("grams", "seen", "inverse", "negative_eigenvalues")
    counters: tuple[str, ...] = ("indefinite",)

    def __init__(
        self,
        fisher: str = "kronecker",
        grid: str = "pairwise",
        resample: str = "nearest",
        weight: float = 1.0,
        damping: str = "identity",
        max_ratio: float | None = None,
    ):
        for name, value, choices in (
            ("coarse_fisher", fisher, COARSE_FISHERS),
            ("coarse_grid", grid, COARSE_GRIDS),
            ("resample", resample, RESAMPLINGS),
            ("coarse_damping", damping, COARSE_DAMPINGS),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"coarse_weight must be finite and not negative, got {weight}")
        if max_ratio is not None and not max_ratio >= 0:
            raise ValueError(f"coarse_max_ratio must not be negative (None: no bound), got {max_ratio}")
        self.fisher, self.grid, self.resample, self.weight = fisher, grid, resample, weight
        self.damping, self.max_ratio = damping, max_ratio
        self._bound = False
        self.averaged: frozenset[int] = frozenset()
        """Layers whose positions are averaged before the products (K-FAC-reduce)."""
        self.sample: CoarseSample | None = None
        """What has been accumulated and not yet folded in."""
        self.attempted = False
        """Some layer has been observed, so that there should be a matrix."""
        self.sizes = torch.zeros(0)
        """Number of parameters of each layer, ``(L,)``, float64."""
        self.indefinite = 0
        """How many refreshed matrices had a clearly negative eigenvalue."""

    def bind(self, shapes: Sequence[tuple[int, int]], replicas: int, device: torch.device) -> None:
        """Allocate the state for layers of the gradient matrices' ``shapes`` ``(d_out, d_in)`` in ``replicas``
        replicas: a few ``L × L`` matrices.

        The Grams and the inverse are float64: the coarse Fisher's eigenvalues span more than ten
        decades, and its float32 inverse breaks training.
        """
        if self._bound:
            raise ValueError("this CoarseSpace belongs to another optimizer already: build one for each")
        self._bound = True
        self.sizes = torch.tensor([prod(shape) for shape in shapes], dtype=torch.float64, device=device)
        grams = 2 if self.fisher == "kronecker" else 1
        shape = (replicas, len(shapes), len(shapes))
        self.grams = torch.zeros(grams, *shape, dtype=torch.float64, device=device)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self.inverse = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.negative_eigenvalues = torch.zeros(replicas, dtype=torch.int64, device=device)
        """Per replica, how many eigenvalues of the matrix behind the inverse are clearly negative."""

    def basis(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The pattern ``u vᵀ`` that stands in Z for a layer, ``u`` ``(d_out,)`` and ``v`` ``(d_in,)``; None: ones."""
        return None

    def look_at(self, layer: int, inputs: Tensor, gradients: Tensor) -> None:
        """A call whose α and γ will be accumulated; for spaces that need all of a and g."""

    def accumulate(self, maps: Maps) -> None:
        """Add a batch to the sample under way; a replica whose sums are not finite does not count in it."""
        if not maps:
            return
        sums = torch.zeros_like(self.grams)
        samples, numbers = sizes(maps)
        at_once = max(1, LARGEST_PART // numbers)
        if samples <= at_once:  # hundreds of layers' slices cost as much as what is computed from them
            self._add(sums, maps)
        else:
            for part in torch.arange(samples).split(at_once):
                some = slice(int(part[0]), int(part[-1]) + 1)
                self._add(sums, {i: (alpha[:, some], gamma[:, some]) for i, (alpha, gamma) in maps.items()})
        present = torch.tensor([i in maps for i in range(sums.shape[-1])], device=sums.device)
        finite = finite_matrices(sums).all(0)
        counts = matrices(finite) * (present[:, None] * present[None, :] * samples)
        sums = torch.where(matrices(finite), sums, 0.0)
        self.sample = CoarseSample(sums, counts, (~finite).long()).plus(self.sample)

    def no_sample(self) -> CoarseSample:
        """A sample of nothing, to which others can be added."""
        counts = torch.zeros_like(self.grams[0], dtype=torch.int64)
        return CoarseSample(torch.zeros_like(self.grams), counts, torch.zeros_like(self.negative_eigenvalues))

    def _add(self, sums: Tensor, maps: Maps) -> None:
        for total, (features, scales) in zip(sums, self.features(maps), strict=True):
            add_gram(total, features, scales, self.resample)

    def features(self, maps: Maps) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        """For each Gram: what is averaged pair by pair (α and γ, or p), and each layer's scale ``(L,)``."""
        if self.fisher == "exact":
            yield from self.exact_features(maps)
            return
        ones = self.grams.new_ones(self.grams.shape[-1])
        maps = {i: averaged(*pair) if i in self.averaged else pair for i, pair in maps.items()}
        yield self._on_grid({i: alpha for i, (alpha, _) in maps.items()}), ones
        gammas = {i: gamma for i, (_, gamma) in maps.items()}
        scales = [sqrt(prod(positions(gammas[i]))) if i in gammas else 1.0 for i in range(len(ones))]
        yield self._on_grid(gammas), ones.new_tensor(scales)

    def exact_features(self, maps: Maps) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        """p of each layer and sample, without a scale."""
        yield (
            {i: sums_of_products(*pair) for i, pair in maps.items()},
            self.grams.new_ones(self.grams.shape[-1]),
        )

    def _on_grid(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        return features if self.grid == "pairwise" else on_common_grid(features, self.resample)

    def fold(self, decay: float) -> Tensor:
        """Take the sample into the running averages; returns ``(R,)``, how many batches were not finite.

        A replica's batch is taken or rejected as a whole, so that the Grams stay semi-definite.
        """
        if self.sample is None:
            return torch.zeros_like(self.negative_eigenvalues)
        sums, counts, rejected = self.sample
        sample = sums / counts.clamp(min=1)
        finite = finite_matrices(sample).all(0)
        take = (counts > 0) & matrices(finite)
        self.grams = running_average(self.grams, sample, take, self.seen, decay)
        self.seen = self.seen | take
        self.attempted = True
        self.discard_sample()
        return torch.maximum(rejected, (~finite).long())

    def matrix(self) -> Tensor:
        """F̃_coarse ``(R, L, L)``, float64: the Hadamard product of the running Grams."""
        return self.grams.prod(0)

    def refresh(self, damping: float | Tensor) -> Tensor:
        """Recompute ``(F̃_coarse + λI)^{-1}`` as ``Q (|w| + λ)^{-1} Qᵀ``; a failed one is not taken.

        λ is one for all replicas, or each one's ``(R,)``.

        The absolute value changes nothing for a semi-definite matrix and gives a clearly negative
        eigenvalue a small step, not one of size 1/λ. Without an earlier inverse, a finite matrix whose
        inverse fails gets zero in its place: no correction. Returns ``(R,)``: replicas with no new inverse.
        """
        # With λ diag(n_i), rows and columns are first scaled to where that is λI.
        scale = self.sizes.rsqrt() if self.damping == "consistent" else torch.ones_like(self.sizes)
        values, vectors = eigh_or_nan(scale[:, None] * self.matrix() * scale)
        vectors = scale[:, None] * vectors
        damping = self.per_eigenvalue(damping)
        inverse = (vectors / self.damped(values, damping)[:, None, :]) @ vectors.mT
        threshold = (1e-6 * values.abs().amax(-1, keepdim=True)).clamp(min=damping)
        negative = (values < -threshold).sum(-1)
        self.indefinite += int((negative > 0).sum())
        seen = self.seen.diagonal(dim1=-2, dim2=-1)
        inverse = torch.where(seen[:, :, None] & seen[:, None, :], inverse, 0.0)
        good = finite_matrices(inverse) & seen.any(-1)
        without = matrices(seen.any(-1) & ~self.has_inverse())
        old = self.inverse.masked_fill(without, 0.0)
        self.inverse = torch.where(matrices(good), inverse, old)
        self.negative_eigenvalues = torch.where(good, negative, self.negative_eigenvalues)
        return ~good

    def per_eigenvalue(self, damping: float | Tensor) -> Tensor:
        """λ, or each replica's ``(R,)``, as what broadcasts against ``(R, L)``."""
        return torch.as_tensor(damping, dtype=self.inverse.dtype, device=self.inverse.device)[..., None]

    def damped(self, eigenvalues: Tensor, damping: Tensor) -> Tensor:
        """What the coarse matrix's eigenvalues are divided by, ``(R, L)``."""
        return eigenvalues.abs() + damping

    def has_inverse(self) -> Tensor:
        """``(R,)``: which replicas have a (finite) inverse."""
        return finite_matrices(self.inverse)

    def corrections(
        self, blocks: Blocks, updates: Sequence[Tensor], one_level: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """What is added to the one-level ``updates`` of the gradients in ``blocks``, and broadcasts to their shapes.

        ``one_level`` applies the one-level inverse to tensors of these shapes.
        """
        return self.prolong(self.solve(self.restrict(blocks)), blocks)

    def restrict(self, blocks: Blocks) -> Tensor:
        """``Z ∇`` (eq. 5): each layer's summed gradient, ``(R, L)``, float64."""
        coarse = torch.zeros(self.inverse.shape[:2], dtype=torch.float64, device=self.inverse.device)
        for index, gradients in blocks:
            coarse[:, index] = gradients.sum((-2, -1)).T.double()
        return coarse

    def solve(self, coarse_gradient: Tensor) -> Tensor:
        """``(F̃_coarse + λI)^{-1} Z ∇``, ``(R, L)``."""
        return (self.inverse @ coarse_gradient[..., None]).squeeze(-1)

    def prolong(self, coefficients: Tensor, blocks: Blocks) -> list[Tensor]:
        """``weight · Zᵀ β``: one scalar per layer, ``(n, R, 1, 1)`` for each of ``blocks``."""
        return [
            matrices(self.weight * coefficients[:, index].T).to(gradients.dtype)
            for index, gradients in blocks
        ]

    def to(self, device: torch.device) -> None:
        """Move the state; a sample under way is forgotten."""
        for name in ("sizes", *self.tensors):
            setattr(self, name, getattr(self, name).to(device))
        self.discard_sample()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.tensors, *self.counters)}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` where the state belongs to another number of layers or another Fisher."""
        for name in self.tensors:
            old, new = getattr(self, name), state[name]
            if new.shape != old.shape:
                raise ValueError(
                    f"coarse {name} has shape {tuple(new.shape)}, not {tuple(old.shape)}: it was "
                    "saved with other layers, replicas or another coarse_fisher"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checked state."""
        for name in self.tensors:
            old = getattr(self, name)
            setattr(self, name, state[name].to(old.device, old.dtype))
        for name in self.counters:
            setattr(self, name, state[name])
        self.attempted = bool(self.seen.any())
        self.discard_sample()

    def discard_sample(self) -> None:
        """Forget what was accumulated since the last ``fold``."""
        self.sample = None
