"""Corrections whose length is set from outside: a direction of the coarse space, a ratio to the one-level step."""

from collections.abc import Callable
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kfac2.curvature import CoarseSpace

SCHEDULE = Path(__file__).with_name("lengths.csv")
FAR = 1e9
"""Longer than any correction is to be: the bound on the ratio cuts it."""


class OfLength(CoarseSpace):
    """The direction of the coarse space that it is mixed into, always ``ratio(step)`` times as long as the one-level
    step, steps counted from 1. Where that direction is zero there is no correction."""

    steps = 0

    @staticmethod
    def ratio(step: int) -> float:
        raise NotImplementedError

    def solve(self, coarse_gradient: Tensor) -> Tensor:
        self.steps += 1
        self.max_ratio = self.ratio(self.steps)
        direction = super().solve(coarse_gradient)
        norm = prolonged_norm(self.sizes, direction)
        return direction * torch.where(norm > 0, FAR / norm, 0.0)


class PermutedBySeed(CoarseSpace):
    """The inverse of the coarse matrix with its layers permuted, each replica's by one permutation of its own."""

    def solve(self, coarse_gradient: Tensor) -> Tensor:
        order = self.permutations()
        rows = torch.arange(len(order), device=order.device)[:, None, None]
        inverse = self.inverse[rows, order[:, :, None], order[:, None, :]]
        return (inverse @ coarse_gradient[..., None]).squeeze(-1)

    def permutations(self) -> Tensor:
        """``(R, L)``."""
        replicas, layers = self.inverse.shape[:2]
        generators = [torch.Generator().manual_seed(replica) for replica in range(replicas)]
        orders = [torch.randperm(layers, generator=generator) for generator in generators]
        return torch.stack(orders).to(self.inverse.device)


def prolonged_norm(sizes: Tensor, coefficients: Tensor) -> Tensor:
    """``‖Zᵀβ‖``, ``(R, 1)``: the length in parameter space, where ``‖Zᵀβ‖² = Σ_i n_i β_i²``."""
    return (sizes * coefficients.square()).sum(-1, keepdim=True).sqrt()


def of_length(space: type[CoarseSpace], ratio: Callable[[int], float]) -> Callable[..., CoarseSpace]:
    """``space``, with its corrections as long as ``ratio`` says."""
    own: dict[str, Any] = {"ratio": staticmethod(ratio), "counters": (*space.counters, "steps")}
    return type(f"{space.__name__}OfLength", (OfLength, space), own)


@cache
def schedule() -> tuple[float, ...]:
    """Epoch by epoch, the full correction's length relative to the one-level step at the paper's settings on the deep
    linear MLP: means over an epoch's steps, medians over ten seeds."""
    return tuple(pd.read_csv(SCHEDULE)["ratio"])


def scheduled(step: int, steps_per_epoch: int) -> float:
    """The schedule's ratio at a step; after its last epoch, that epoch's."""
    return schedule()[min((step - 1) // steps_per_epoch, len(schedule()) - 1)]


def constant(_: int) -> float:
    """The geometric mean of the schedule over its epochs."""
    return exp(sum(map(log, schedule())) / len(schedule()))
