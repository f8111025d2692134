"""Two-level K-FAC preconditioning for deep learning (Tselepidis, Kohler, Orvieto 2020)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfac2.curvature.coarse import CoarseSpace
    from kfac2.optim.adaptive import LevenbergMarquardt
    from kfac2.optim.kfac import KFAC
    from kfac2.optim.layers import register_layer
    from kfac2.optim.two_level import TwoLevelKFAC

_HOMES = {
    "KFAC": "kfac2.optim.kfac",
    "CoarseSpace": "kfac2.curvature.coarse",
    "LevenbergMarquardt": "kfac2.optim.adaptive",
    "TwoLevelKFAC": "kfac2.optim.two_level",
    "register_layer": "kfac2.optim.layers",
}
__all__ = ["KFAC", "CoarseSpace", "LevenbergMarquardt", "TwoLevelKFAC", "register_layer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only for those who want the optimizers: figures and records do without."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kfac2' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
