"""How long an update, and the coarse correction in it, may be."""

import torch
from torch import Tensor


def kl_clip_factor(squared_norm: Tensor, kl_clip: float) -> Tensor:
    """ν = min(1, sqrt(κ / Σ_i η_i² |V_i · ∇_i|)) (eq. 10), one per replica.

    ``squared_norm`` is the sum in the denominator, shape ``(R,)``; 0 gives ν = 1, NaN stays NaN.
    """
    return (kl_clip / squared_norm).sqrt().clamp(max=1)


def ratio_factor(ratio: Tensor, max_ratio: float) -> Tensor:
    """What brings a correction of relative length ``ratio`` ``(R,)`` within ``max_ratio``; NaN stays as it is."""
    return torch.where(ratio > max_ratio, max_ratio / ratio, 1.0)
