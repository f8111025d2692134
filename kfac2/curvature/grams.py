"""Products of layers' maps, pair by pair: sums over samples, means over positions."""

from itertools import combinations_with_replacement
from math import prod

import torch
from torch import Tensor

from kfac2.curvature.grids import Grid, common_grid, pair_grid, resample

Maps = dict[int, tuple[Tensor, Tensor]]
"""By a layer's position: α and γ of each sample and position, ``(R, B, *positions)``."""


def add_gram(total: Tensor, features: dict[int, Tensor], scales: Tensor, mode: str) -> None:
    """Add ``scale_i scale_j Σ_samples mean_positions[x_i x_j]`` to ``total`` ``(R, L, L)``, in place, float64.

    ``features``: x by a layer's position, ``(R, B, *positions)``; two of different resolution are brought to
    one grid, with the resampling ``mode``. ``scales`` ``(L,)``.
    """
    for (rows, left), (columns, right) in combinations_with_replacement(_by_grid(features), 2):
        gram = scales[rows, None] * scales[columns] * _gram(left, right, mode)
        total[:, rows[:, None], columns] += gram
        if left is not right:
            total[:, columns[:, None], rows] += gram.mT


def on_common_grid(features: dict[int, Tensor], mode: str) -> dict[int, Tensor]:
    """All at the smallest size among those with several positions."""
    grid = common_grid(positions(x) for x in features.values())
    return {
        i: x if prod(positions(x)) == 1 else resample(x[:, None], grid, mode)[:, 0]
        for i, x in features.items()
    }


def averaged(alpha: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of α and the sum of γ over positions, ``(R, B)``."""
    rows = (*alpha.shape[:2], -1)
    return alpha.reshape(rows).mean(-1), gamma.reshape(rows).sum(-1)


def sums_of_products(alpha: Tensor, gamma: Tensor) -> Tensor:
    """``Σ_positions α γ``, float64, ``(R, B)``."""
    return (alpha.double() * gamma.double()).reshape(*alpha.shape[:2], -1).sum(-1)


def sizes(maps: Maps) -> tuple[int, int]:
    """The number of samples, and how many numbers one sample's α (or γ) are in all layers."""
    alphas = [alpha for alpha, _ in maps.values()]
    samples = alphas[0].shape[1]
    return samples, sum(alpha.numel() for alpha in alphas) // samples


def positions(x: Tensor) -> Grid:
    return tuple(x.shape[2:])


def _by_grid(features: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Layers of one resolution side by side: their positions ``(n,)`` and maps ``(R, n, B, *positions)``."""
    members: dict[Grid, list[int]] = {}
    for i, x in features.items():
        members.setdefault(positions(x), []).append(i)
    return [
        (
            torch.tensor(index, device=features[index[0]].device),
            torch.stack([features[i] for i in index], dim=1),
        )
        for index in members.values()
    ]


def _gram(left: Tensor, right: Tensor, mode: str) -> Tensor:
    """Sum over the batch, mean over positions: ``(R, n, m)``, float64."""
    grid = pair_grid(left.shape[3:], right.shape[3:])
    one = resample(left, grid, mode).flatten(2).double()
    other = one if right is left else resample(right, grid, mode).flatten(2).double()
    return one @ other.mT / prod(grid)
