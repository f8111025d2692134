"""KL clipping (eq. 10)."""

from torch import Tensor


def kl_clip_factor(squared_norm: Tensor, kl_clip: float) -> Tensor:
    """ν = min(1, sqrt(κ / Σ_i η_i² |V_i · ∇_i|)) (eq. 10), one per replica.

    ``squared_norm`` is the sum in the denominator, shape ``(R,)``; 0 gives ν = 1, NaN stays NaN.
    """
    return (kl_clip / squared_norm).sqrt().clamp(max=1)
