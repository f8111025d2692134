"""K-FAC with two levels."""

from typing import Any

from torch import nn

from kfac2.curvature import CoarseSpace
from kfac2.optim.kfac import KFAC

COARSE_OPTIONS = {
    "coarse_fisher": "fisher",
    "coarse_grid": "grid",
    "resample": "resample",
    "coarse_weight": "weight",
    "coarse_damping": "damping",
    "coarse_max_ratio": "max_ratio",
}
"""What ``CoarseSpace`` calls them."""


class TwoLevelKFAC(KFAC):
    """K-FAC with the coarse-space correction between layers (eq. 6): ``KFAC`` plus a ``CoarseSpace``.

    Args:
        coarse: a ``CoarseSpace`` in place of the options below.
        **options: as for ``KFAC``; and ``coarse_fisher``, ``coarse_grid``, ``resample``, ``coarse_weight``,
            ``coarse_damping`` and ``coarse_max_ratio``, which are those of ``CoarseSpace``. Their defaults are
            the paper's; ``CoarseSpace`` says what to take outside its experiments, and why one level first.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        coarse: CoarseSpace | None = None,
        **options: Any,
    ):
        own = {name: options.pop(name) for name in COARSE_OPTIONS if name in options}
        if coarse is None:
            coarse = CoarseSpace(**{COARSE_OPTIONS[name]: value for name, value in own.items()})
        elif own:
            raise ValueError(f"give either `coarse` or {', '.join(own)}, which it has already")
        super().__init__(model, lr, coarse=coarse, **options)
