"""Layers of different resolutions, compared on one grid of positions."""

from collections.abc import Iterable, Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor

RESAMPLINGS = ("nearest", "area")

Grid = tuple[int, ...]
"""Sizes of a feature map's position axes; ``()`` is one position."""


def pair_grid(one: Grid, other: Grid) -> Grid:
    """Where two layers are compared: per axis the smaller size.

    One position, the average of a map, if that is no more than one: repeating a layer with one position
    over the other's grid is averaging the other's map. So too where the axes cannot be compared (a
    sequence and an image).
    """
    return _smallest([one, other])


def common_grid(grids: Iterable[Grid]) -> Grid:
    """Per axis the smallest size among the layers with more than one position, if they can be compared."""
    return _smallest([grid for grid in grids if prod(grid) > 1])


def _smallest(grids: Sequence[Grid]) -> Grid:
    if len({len(grid) for grid in grids}) != 1:
        return ()
    smallest = tuple(min(sizes) for sizes in zip(*grids, strict=True))
    return smallest if prod(smallest) > 1 else ()


def resample(maps: Tensor, grid: Grid, mode: str) -> Tensor:
    """Maps ``(R, n, B, *positions)`` on ``grid``, one of the above: ``(R, n, B, *grid)``.

    ``mode``: ``"nearest"`` or ``"area"``, as ``torch.nn.functional.interpolate`` has them.
    """
    positions = maps.shape[3:]
    if positions == grid:
        return maps
    if not grid:
        return maps.flatten(3).mean(-1)
    return F.interpolate(maps.flatten(0, 1), size=grid, mode=mode).unflatten(0, maps.shape[:2])
