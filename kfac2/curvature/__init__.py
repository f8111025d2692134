"""Curvature on plain tensors: Kronecker factors, damped inverses, the coarse Fisher, KL clipping."""

from kfac2.curvature.blocks import KroneckerBlocks
from kfac2.curvature.clipping import kl_clip_factor, ratio_factor
from kfac2.curvature.coarse import CoarseSpace
from kfac2.curvature.inverses import INVERSES, EigenInverse, TikhonovInverse

__all__ = [
    "INVERSES",
    "CoarseSpace",
    "EigenInverse",
    "KroneckerBlocks",
    "TikhonovInverse",
    "kl_clip_factor",
    "ratio_factor",
]
