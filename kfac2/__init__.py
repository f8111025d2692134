"""Two-level K-FAC preconditioning for deep learning (Tselepidis, Kohler, Orvieto 2020)."""

from kfac2.curvature.coarse import CoarseSpace
from kfac2.optim.kfac import KFAC, TwoLevelKFAC

__all__ = ["KFAC", "CoarseSpace", "TwoLevelKFAC"]
__version__ = "0.1.0"
