"""Running averages that reject non-finite samples."""

import torch
from torch import Tensor


def decay_at(iteration: int, factor_decay: float) -> float:
    """Decay of the running averages, ε_t = min(1 - 1/t, factor_decay) (Algorithm 1, line 2).

    ``iteration`` is t, counted from 1.
    """
    return min(1 - 1 / iteration, factor_decay)


def running_average(old: Tensor, new: Tensor, take: Tensor, seen: Tensor, decay: float) -> Tensor:
    """``decay * old + (1 - decay) * new`` where ``take``; ``new`` itself where nothing was ``seen``.

    ``take`` and ``seen`` are boolean and broadcast against the averages; where ``take`` is false the
    old value stays, even if the new one is NaN. Returns a new tensor: a held state dict stays as it was.
    """
    average = torch.lerp(new, old, decay)
    if bool(take.all()) and bool(seen.all()):
        return average
    return torch.where(take, torch.where(seen, average, new), old)


def matrices(mask: Tensor) -> Tensor:
    """Append two axes, so that a mask over matrices broadcasts over their entries."""
    return mask[..., None, None]


def finite_matrices(x: Tensor) -> Tensor:
    """Which of the matrices ``(..., d, e)`` have only finite entries: ``(...)``, boolean."""
    # NaN propagates through both; a boolean per entry would take seven times as long.
    return x.amax((-2, -1)).isfinite() & x.amin((-2, -1)).isfinite()
