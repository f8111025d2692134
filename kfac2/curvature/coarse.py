"""The coarse space of two-level K-FAC: one degree of freedom per layer (eq. 5-7, Algorithm 1)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kfac2.curvature.averages import finite_matrices, matrices, running_average
from kfac2.curvature.inverses import eigh_or_nan

COARSE_FISHERS = ("kronecker", "exact")
COARSE_GRIDS = ("pairwise", "common")
RESAMPLINGS = ("nearest", "area")

Blocks = Iterable[tuple[Tensor, Tensor]]
"""Layers of one shape: their positions in the coarse space ``(n,)`` and a tensor ``(n, R, d_out, d_in)``."""


class CoarseSpace:
    """The correction ``Zᵀ (F̃_coarse + λI)^{-1} Z ∇`` of eq. 6, one scalar per layer.

    The optimizer calls ``project`` for each layer as its gradient arrives, ``accumulate`` after each
    back-propagation, ``fold`` and ``refresh`` when a refresh is due, and ``restrict``, ``solve``,
    ``prolong`` in every step. A study of another coarse space overrides what it changes.

    Args:
        fisher: ``"kronecker"``: ``E[α αᵀ] ∘ E[γ γᵀ]`` with the per-sample sums ``α_i = 1ᵀ a_i`` and
            ``γ_i = 1ᵀ g_i``, equal to eq. 7 without its L² covariances, because
            ``Σ_kl (A ⊗ G)_kl = (1ᵀA1)(1ᵀG1)``. ``"exact"``: ``E[p pᵀ]``, ``p_i = α_i γ_i``, which is
            ``Z F Zᵀ`` itself where samples do not interact. BatchNorm in training mode makes them
            interact: then the true ``Z F Zᵀ`` is that of the whole batch's logits, another matrix.
            Both are semi-definite as long as all layers are first seen together.
        grid, resample: how feature maps of different resolutions are compared. Layers with one
            position (every layer supported so far) have one resolution, so these change nothing.
        weight: factor on the correction; 0 gives one-level K-FAC.
    """

    def __init__(
        self,
        fisher: str = "kronecker",
        grid: str = "pairwise",
        resample: str = "nearest",
        weight: float = 1.0,
    ):
        for name, value, choices in (
            ("coarse_fisher", fisher, COARSE_FISHERS),
            ("coarse_grid", grid, COARSE_GRIDS),
            ("resample", resample, RESAMPLINGS),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"coarse_weight must be finite and not negative, got {weight}")
        self.fisher, self.grid, self.resample, self.weight = fisher, grid, resample, weight
        self._bound = False
        self.indefinite = 0
        """How many refreshed matrices had a clearly negative eigenvalue."""

    def bind(self, layers: int, replicas: int, device: torch.device) -> None:
        """Allocate the state for ``layers`` layers in ``replicas`` replicas: a few ``L × L`` matrices.

        The Grams and the inverse are float64: the coarse Fisher's eigenvalues span more than ten
        decades, and its float32 inverse breaks training.
        """
        if self._bound:
            raise ValueError("this CoarseSpace belongs to another optimizer already: build one for each")
        self._bound = True
        grams = 2 if self.fisher == "kronecker" else 1
        shape = (replicas, layers, layers)
        self.grams = torch.zeros(grams, *shape, dtype=torch.float64, device=device)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self.inverse = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.discard_sample()

    def project(self, layer: int, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample sums of one layer, α and γ, each ``(R, B)``.

        ``layer`` is its position; ``a`` ``(R, d_in, B)`` and ``g`` ``(R, d_out, B)`` hold a column per sample.
        """
        return a.sum(1), g.sum(1)

    def accumulate(self, sums: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Add a batch to the sample under way; ``sums`` maps a layer's position to its α and γ."""
        nothing = (torch.zeros_like(next(iter(sums.values()))[0]),) * 2
        pairs = [sums.get(i, nothing) for i in range(self.grams.shape[-1])]
        alphas = torch.stack([alpha for alpha, _ in pairs], dim=1)
        gammas = torch.stack([gamma for _, gamma in pairs], dim=1)
        features = torch.stack([alphas, gammas]).double()
        if self.fisher == "exact":
            features = features.prod(0, keepdim=True)
        self._sum += features @ features.mT
        present = torch.tensor([i in sums for i in range(len(pairs))], device=self.grams.device)
        self._count += present[:, None] * present[None, :] * features.shape[-1]

    def fold(self, decay: float) -> Tensor:
        """Take the sample into the running averages; returns ``(R,)``: replicas whose sample was not finite.

        A replica's sample is taken or rejected as a whole, so that the Grams stay semi-definite.
        """
        sample = self._sum / self._count.clamp(min=1)
        finite = finite_matrices(sample).all(0)
        take = (self._count > 0) & matrices(finite)
        self.grams = running_average(self.grams, sample, take, self.seen, decay)
        self.seen = self.seen | take
        self.discard_sample()
        return ~finite

    def matrix(self) -> Tensor:
        """F̃_coarse ``(R, L, L)``, float64: the Hadamard product of the running Grams."""
        return self.grams.prod(0)

    def refresh(self, damping: float) -> Tensor:
        """Recompute ``(F̃_coarse + λI)^{-1}`` as ``Q (|w| + λ)^{-1} Qᵀ``; a failed one is not taken.

        The absolute value changes nothing for a semi-definite matrix and gives a clearly negative
        eigenvalue a small step, not one of size 1/λ. Returns ``(R,)``: replicas with no new inverse.
        """
        values, vectors = eigh_or_nan(self.matrix())
        inverse = (vectors / (values.abs() + damping)[:, None, :]) @ vectors.mT
        threshold = (1e-6 * values.abs().amax(-1)).clamp(min=damping)
        self.indefinite += int((values.amin(-1) < -threshold).sum())
        seen = self.seen.diagonal(dim1=-2, dim2=-1)
        inverse = torch.where(seen[:, :, None] & seen[:, None, :], inverse, 0.0)
        good = finite_matrices(inverse) & seen.any(-1)
        self.inverse = torch.where(matrices(good), inverse, self.inverse)
        return ~good

    def has_inverse(self) -> Tensor:
        """``(R,)``: which replicas have a (finite) inverse."""
        return finite_matrices(self.inverse)

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

    def state_dict(self) -> dict[str, Any]:
        return {
            "grams": self.grams,
            "seen": self.seen,
            "inverse": self.inverse,
            "indefinite": self.indefinite,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` where the state belongs to another number of layers or another Fisher."""
        for name in ("grams", "seen", "inverse"):
            old, new = getattr(self, name), state[name]
            if new.shape != old.shape:
                raise ValueError(
                    f"coarse {name} has shape {tuple(new.shape)}, not {tuple(old.shape)}: it was "
                    "saved with other layers, replicas or another coarse_fisher"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checked state."""
        for name in ("grams", "seen", "inverse"):
            old = getattr(self, name)
            setattr(self, name, state[name].to(old.device, old.dtype))
        self.indefinite = state["indefinite"]
        self.discard_sample()

    def discard_sample(self) -> None:
        """Forget what was accumulated since the last ``fold``."""
        self._sum = torch.zeros_like(self.grams)
        self._count = torch.zeros(self.grams.shape[-2:], dtype=torch.int64, device=self.grams.device)
