"""Two-level K-FAC preconditioning for deep learning (Tselepidis, Kohler, Orvieto 2020)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfac2.curvature.coarse import CoarseSpace
    from kfac2.optim.kfac import KFAC, TwoLevelKFAC

__all__ = ["KFAC", "CoarseSpace", "TwoLevelKFAC"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only for those who want the optimizers: figures and records do without."""
    if name == "CoarseSpace":
        from kfac2.curvature.coarse import CoarseSpace

        return CoarseSpace
    if name in __all__:
        from kfac2.optim import kfac

        return getattr(kfac, name)
    raise AttributeError(f"module 'kfac2' has no attribute {name!r}")
