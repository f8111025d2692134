"""Kronecker-factored Fisher blocks of all layers of one shape, handled as one batch."""

from typing import Any

import torch
from torch import Tensor

from kfac2.curvature.averages import finite_matrices, matrices, running_average
from kfac2.curvature.inverses import INVERSES, Inverse


class KroneckerBlocks:
    """Running factors and damped inverses of ``n`` layers of one shape in ``R`` replicas.

    ``a`` (the paper's A, ``(n, R, d_in, d_in)``) and ``g`` (G, ``(n, R, d_out, d_out)``) are running
    averages, or of the diagonals alone, as rows ``(n, R, 1, d)``; ``seen`` ``(n, R)`` says which have had a
    finite sample, ``attempted`` ``(n,)`` which layers had any sample. ``inverse`` is NaN where no refresh has
    found finite factors.
    """

    def __init__(
        self,
        layers: int,
        replicas: int,
        d_out: int,
        d_in: int,
        inverse: str,
        diagonal: tuple[bool, bool] = (False, False),
        **options: Any,
    ):
        """``diagonal``: whether only the diagonals of G and of A are kept."""
        g_rows, a_rows = (1 if only else d for only, d in zip(diagonal, (d_out, d_in), strict=True))
        self.a = torch.zeros(layers, replicas, a_rows, d_in, **options)
        self.g = torch.zeros(layers, replicas, g_rows, d_out, **options)
        self.seen = torch.zeros(layers, replicas, dtype=torch.bool, device=self.a.device)
        self.attempted = torch.zeros(layers, dtype=torch.bool)
        self._inverse = INVERSES[inverse]
        self.inverse: Inverse = self._inverse.unknown(self.a, self.g)

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

    def refresh_inverse(self, damping: float | Tensor) -> Tensor:
        """Recompute the inverses; one that is not finite leaves its predecessor in place.

        Without a predecessor, finite factors get the identity in its place: a plain step. Returns ``(n, R)``:
        the blocks of attempted layers for which no new inverse was found.
        ``damping`` is λ, or each replica's, ``(R,)``.
        """
        if isinstance(damping, Tensor):
            damping = matrices(damping.to(self.a))
        new = self._inverse.compute(self.a, self.g, damping)
        good = self.seen
        for part in new:
            good = good & finite_matrices(part)
        if not good.all():
            plain = matrices(self.seen & self.missing_inverse())
            identity = self._inverse.identity(self.a, self.g)
            parts = zip(new, self.inverse, identity, strict=True)
            new = type(new)(
                *(torch.where(matrices(good), part, torch.where(plain, one, old)) for part, old, one in parts)
            )
        self.inverse = new
        return ~good & self.attempted[:, None].to(good.device)

    def never_seen(self) -> Tensor:
        """``(n, R)``: blocks of attempted layers that have not had a finite sample."""
        return ~self.seen & self.attempted[:, None].to(self.seen.device)

    def missing_inverse(self) -> Tensor:
        """``(n, R)``: blocks of attempted layers that have no (finite) inverse."""
        good = torch.ones_like(self.seen)
        for part in self.inverse:
            good = good & finite_matrices(part)
        return ~good & self.attempted[:, None].to(good.device)

    def state(self, layer: int) -> dict[str, Tensor]:
        """What is remembered of one layer (views; updates are out of place)."""
        return {name: x[layer] for name, x in self._fields().items()}

    def check_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` where the state of layer ``name`` does not fit."""
        for field, x in self._fields().items():
            if field not in state:
                raise ValueError(f"layer {name!r} has no {field!r}: it was saved with another `inverse`")
            if state[field].shape != x.shape[1:]:
                shapes = f"{tuple(state[field].shape)}, not {tuple(x.shape[1:])}"
                raise ValueError(
                    f"layer {name!r} was saved with another shape or max_factor_dim: its {field} is {shapes}"
                )

    def load(self, states: list[dict[str, Tensor]]) -> None:
        """Take over the (checked) states of all ``n`` layers."""
        new = {
            field: torch.stack([state[field].to(x.device, x.dtype) for state in states])
            for field, x in self._fields().items()
        }
        self.a, self.g, self.seen, self.attempted = (new[f] for f in ("a", "g", "seen", "attempted"))
        self.inverse = type(self.inverse)(*(new[field] for field in self.inverse._fields))

    def _fields(self) -> dict[str, Tensor]:
        own = {"a": self.a, "g": self.g, "seen": self.seen, "attempted": self.attempted}
        return own | self.inverse._asdict()
