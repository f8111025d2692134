"""Layers with positions: the patches of an image, and how maps of two resolutions are compared.

A map holds a layer's inputs or output gradients at all its positions, shape ``(B, d, *grid)``: the
grid is ``(rows, columns)`` of a convolution, ``(positions,)`` of a linear layer on ``(B, positions,
d)``, and ``()`` of one on ``(B, d)``.
"""

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, unfold

Layer: TypeAlias = nn.Linear | nn.Conv2d
Grid: TypeAlias = tuple[int, ...]


def grid_of(x: Tensor) -> Grid:
    """``grid`` of a map ``(B, d, *grid)``."""
    return tuple(x.shape[2:])


def positions(x: Tensor) -> int:
    """``T``, the number of positions of a map."""
    return prod(grid_of(x))


def rows(x: Tensor) -> Tensor:
    """All samples' positions below one another: ``(B, d, *grid) -> (B T, d)``."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 2).flatten(0, 1)


def output_map(layer: Layer, output: Tensor) -> Tensor:
    """A layer's output, or a gradient of its shape, as ``(B, out, *grid)``."""
    return output if isinstance(layer, nn.Conv2d) else output.movedim(-1, 1)


def input_map(layer: Layer, input: Tensor, output: Tensor) -> Tensor:
    """``a``, the layer's inputs (a convolution's patches), with a one appended for a bias."""
    a = patches(layer, input) if isinstance(layer, nn.Conv2d) else input.movedim(-1, 1)
    grid = grid_of(output_map(layer, output))
    a = a.reshape(len(a), -1, *grid)
    ones = torch.ones(len(a), 1 if layer.bias is not None else 0, *grid, dtype=a.dtype)
    return torch.cat([a, ones], dim=1)


def patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """``(B, in · kh · kw, T)``: what the kernel sees at each position, zeros around the image."""
    above_and_below, left_and_right = axis_padding(layer, 0), axis_padding(layer, 1)
    padded = pad(images, (*left_and_right, *above_and_below))
    return unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)


def axis_padding(layer: nn.Conv2d, axis: int) -> tuple[int, int]:
    """Zeros before and after; where ``"same"`` needs an odd number, one more after."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    size = layer.padding[axis]
    assert isinstance(size, int)
    return size, size


def pair_grid(left: Grid, right: Grid) -> Grid:
    """Per axis the smaller; the other's where one has one position; ``()`` if not comparable."""
    if prod(left) == 1:
        return right
    if prod(right) == 1:
        return left
    if len(left) != len(right):
        return ()
    return tuple(map(min, left, right))


def common_grid(grids: Sequence[Grid]) -> Grid:
    """Per axis the smallest of those with several positions; ``()`` if none, or not comparable."""
    several = [grid for grid in grids if prod(grid) > 1]
    if len({len(grid) for grid in several}) != 1:
        return ()
    return tuple(min(sizes) for sizes in zip(*several, strict=True))


def resample(x: Tensor, grid: Grid, mode: str) -> Tensor:
    """A map on another grid: one position is repeated, averaged where the grid is ``()``."""
    if positions(x) == 1:
        return x.reshape(*x.shape[:2], *[1 for _ in grid]).expand(-1, -1, *grid)
    if grid == ():
        return x.flatten(2).mean(dim=2)
    return interpolate(x, size=list(grid), mode=mode)
