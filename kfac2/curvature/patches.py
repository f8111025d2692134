"""Moments and sums of a convolution's input patches, without keeping the patches."""

from collections.abc import Callable
from functools import partial, reduce
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]

LARGEST_UNFOLDING = 2**22
"""Numbers that an unfolding may hold at once: larger batches are taken in parts."""


class Window(NamedTuple):
    """Which inputs a convolution sees at each position, with an entry for each of its one to three axes."""

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    """Before and after, the last axis first, as ``torch.nn.functional.pad`` takes it."""

    @staticmethod
    def of_one(axes: int) -> "Window":
        """Each position by itself."""
        ones = (1,) * axes
        return Window(ones, ones, ones, (0,) * (2 * axes))


def patch_moment(x: Tensor, window: Window, with_ones: bool) -> Tensor:
    """Sum over batch and positions of ``a aᵀ``, a patch with a one appended: ``(d, d)``.

    ``x`` ``(B, C, *axes)``; ``d`` counts the patch's entries in a weight's order (the channel first), and
    the one.
    """
    return patch_moments(x, window, with_ones, groups=1)[0]


def patch_moments(x: Tensor, window: Window, with_ones: bool, groups: int) -> Tensor:
    """``patch_moment`` of each of the channels' ``groups``: ``(groups, d, d)``."""
    x = x.contiguous()  # unfolding channels that lie innermost in memory takes several times longer
    if groups == 1 and len(window.kernel) == 2 and window.stride[0] == 1:
        moment = partial(_moment_by_rows, window=window, with_ones=with_ones)
    else:
        moment = partial(_moments_of_patches, window=window, with_ones=with_ones, groups=groups)
    parts = x.split(max(1, LARGEST_UNFOLDING // (x[0].numel() * prod(window.kernel))))
    return reduce(torch.add, map(moment, parts))


def patch_sums(x: Tensor, window: Window) -> Tensor:
    """``1ᵀ a`` of each patch (without the one): ``(B, *positions)``."""
    sums = F.pad(x.sum(1), window.padding)
    for axis in reversed(range(len(window.kernel))):
        sums = _slide(sums, 1 + axis, axis, window).sum(-1)
    return sums


def patch_totals(x: Tensor, window: Window) -> Tensor:
    """Each sample's sum of its patches (without the one): ``(B, d)``, in a weight's order."""
    totals = F.pad(x, window.padding)
    for axis in range(len(window.kernel)):
        totals = _slide(totals, 2, axis, window).sum(2)
    return totals.flatten(1)


def _slide(x: Tensor, dim: int, axis: int, window: Window) -> Tensor:
    """All positions of the window along ``dim``; what it sees there is a new last axis."""
    dilation = window.dilation[axis]
    extent = (window.kernel[axis] - 1) * dilation + 1
    return x.unfold(dim, extent, window.stride[axis])[..., ::dilation]


def _moments_of_patches(x: Tensor, window: Window, with_ones: bool, groups: int) -> Tensor:
    axes = len(window.kernel)
    seen = F.pad(x, window.padding)
    for axis in range(axes):
        seen = _slide(seen, 2 + axis, axis, window)
    positions, taps = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    patches = seen.permute(1, *taps, 0, *positions).flatten(1 + axes)
    patches = patches.reshape(groups, -1, patches.shape[-1])
    moments = patches @ patches.mT
    return _append_one(moments, patches.sum(-1), patches.shape[-1]) if with_ones else moments


def _moment_by_rows(x: Tensor, window: Window, with_ones: bool) -> Tensor:
    """For vertical stride 1: a third of the patches' work for a 3×3 kernel, and exact.

    Kernel rows u and v meet the same pairs of image rows as u+1 and v+1 do, but for a few at the border.
    So the product of image rows that lie ``v - u`` apart is computed once for all such pairs, and the
    border's rows are added to each.
    """
    (rows, columns), dilation, (left, right, top, bottom) = window.kernel, window.dilation[0], window.padding
    unfolded = _slide(F.pad(x, (left, right)), 3, 1, window).permute(1, 4, 2, 0, 3)
    channels, _, height, batch, width = unfolded.shape
    lines = unfolded.reshape(channels * columns, height, batch * width)
    positions = height + top + bottom - (rows - 1) * dilation

    def product(span: Span, lag: int) -> Tensor:
        above, below = lines[:, slice(*span)], lines[:, span[0] + lag : span[1] + lag]
        return above.flatten(1) @ below.flatten(1).T

    def seen_by(row: int, lag: int = 0) -> Span:
        """The image rows that kernel row ``row`` meets while one ``lag`` below is met too."""
        first = row * dilation - top
        start = max(0, first)
        return start, max(start, min(height - lag, first + positions))

    moment = lines.new_zeros(rows, len(lines), rows, len(lines))
    for apart in range(rows):
        lag = apart * dilation
        spans = [seen_by(row, lag) for row in range(rows - apart)]
        for row, block in enumerate(_products_of_spans(spans, lambda span, lag=lag: product(span, lag))):
            moment[row, :, row + apart] = block
            moment[row + apart, :, row] = block.T
    order = moment.view(rows, channels, columns, rows, channels, columns).permute(1, 0, 2, 4, 3, 5)
    moment = order.reshape(1, rows * len(lines), rows * len(lines))
    if not with_ones:
        return moment
    line_sums = lines.sum(2)
    sums = torch.stack([line_sums[:, slice(*seen_by(row))].sum(1) for row in range(rows)])
    sums = sums.view(rows, channels, columns).transpose(0, 1).flatten()
    return _append_one(moment, sums[None], positions * batch * width)


def _products_of_spans(spans: list[Span], product: Callable[[Span], Tensor]) -> list[Tensor]:
    """``product`` of each span, computed once where all of them overlap."""
    start, stop = max(span[0] for span in spans), min(span[1] for span in spans)
    if start >= stop:
        return [product(span) for span in spans]
    shared = product((start, stop))
    blocks = []
    for first, last in spans:
        ends = [product(span) for span in ((first, start), (stop, last)) if span[0] < span[1]]
        blocks.append(sum(ends, shared))
    return blocks


def _append_one(moments: Tensor, sums: Tensor, count: int) -> Tensor:
    """The moments of ``[a 1]`` from those of ``a``, their sums and the number of patches."""
    above = torch.cat([moments, sums[..., None]], dim=-1)
    below = F.pad(sums, (0, 1), value=float(count))
    return torch.cat([above, below[..., None, :]], dim=-2)
