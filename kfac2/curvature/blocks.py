"""Kronecker-factored Fisher blocks of all layers of one shape, handled as one batch."""

from typing import Any

import torch
from torch import Tensor

from kfac2.curvature.averages import finite_matrices, matrices, running_average
from kfac2.curvature.inverses import INVERSES, Inverse


class KroneckerBlocks:
    """Running factors and damped inverses of ``n`` layers of one shape in ``R`` replicas.

    ``a`` (the paper's A, ``(n, R, d_in, d_in)``) and ``g`` (G, ``(n, R, d_out, d_out)``) are running
    averages; ``seen`` ``(n, R)`` says which have had a finite sample, ``attempted`` ``(n,)`` which
    layers had any sample. ``inverse`` is NaN where there never was one.
    """

    def __init__(self, layers: int, replicas: int, d_out: int, d_in: int, inverse: str, **options: Any):
        self.a = torch.zeros(layers, replicas, d_in, d_in, **options)
        self.g = torch.zeros(layers, replicas, d_out, d_out, **options)
        self.seen = torch.zeros(layers, replicas, dtype=torch.bool, device=self.a.device)
        self.attempted = torch.zeros(layers, dtype=torch.bool)
        self._compute_inverse = INVERSES[inverse].compute
        unknown = self._compute_inverse(self.a, self.g, 1.0)
        self.inverse: Inverse = type(unknown)(*(torch.full_like(x, torch.nan) for x in unknown))

    def fold(self, a: Tensor, g: Tensor, present: Tensor, decay: float) -> Tensor:
        """Take one sample of the factors into the running averages.

        ``present`` ``(n,)``: the layers that were observed at all. Returns ``(n, R)``: the present
        samples rejected because they were not finite.
        """
        finite = finite_matrices(a) & finite_matrices(g)
        take = finite & present[:, None].to(finite.device)
        seen = matrices(self.seen)
        self.a = running_average(self.a, a, matrices(take), seen, decay)
        self.g = running_average(self.g, g, matrices(take), seen, decay)
        self.seen = self.seen | take
        self.attempted = self.attempted | present
        return ~finite & present[:, None].to(finite.device)

    def refresh_inverse(self, damping: float) -> Tensor:
        """Recompute the inverses; one that is not finite leaves its predecessor in place.

        Returns ``(n, R)``: the blocks of attempted layers for which no new inverse was found.
        """
        new = self._compute_inverse(self.a, self.g, damping)
        good = self.seen
        for part in new:
            good = good & finite_matrices(part)
        merged = (torch.where(matrices(good), part, old) for part, old in zip(new, self.inverse, strict=True))
        self.inverse = type(self.inverse)(*merged)
        return ~good & self.attempted[:, None].to(good.device)

    def missing_inverse(self) -> Tensor:
        """``(n, R)``: blocks of attempted layers that have no (finite) inverse."""
        good = torch.ones_like(self.seen)
        for part in self.inverse:
            good = good & finite_matrices(part)
        return ~good & self.attempted[:, None].to(good.device)

    def state(self, layer: int) -> dict[str, Tensor]:
        """What is remembered of one layer (views; updates are out of place)."""
        parts = {name: part[layer] for name, part in self.inverse._asdict().items()}
        attempted = self.attempted[layer]
        return {
            "a": self.a[layer],
            "g": self.g[layer],
            "seen": self.seen[layer],
            "attempted": attempted,
            **parts,
        }

    def load(self, states: list[dict[str, Tensor]]) -> None:
        """Take over the states of all ``n`` layers; raises ``ValueError`` on other names or shapes."""
        fields = {"a": self.a, "g": self.g, "seen": self.seen, "attempted": self.attempted}
        fields |= self.inverse._asdict()
        loaded = {name: self._stack(name, old, states) for name, old in fields.items()}
        self.a, self.g, self.seen = loaded["a"], loaded["g"], loaded["seen"]
        self.attempted = loaded["attempted"]
        self.inverse = type(self.inverse)(*(loaded[name] for name in self.inverse._fields))

    @staticmethod
    def _stack(name: str, old: Tensor, states: list[dict[str, Tensor]]) -> Tensor:
        if any(name not in state for state in states):
            raise ValueError(f"the state has no {name!r}: it was saved with another `inverse`")
        new = torch.stack([state[name] for state in states])
        if new.shape != old.shape:
            raise ValueError(f"{name!r} has shape {tuple(new.shape[1:])}, not {tuple(old.shape[1:])}")
        return new.to(old.device, old.dtype)
