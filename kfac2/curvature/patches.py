"""Moments and sums of a convolution's input patches, without keeping the patches."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]

LARGEST_UNFOLDING = 2**22
"""Numbers that an unfolding may hold at once: larger batches are taken in parts."""


class Window(NamedTuple):
    """Which inputs a convolution sees at each position; pairs are (vertical, horizontal)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Left, right, top, bottom, as ``torch.nn.functional.pad`` takes it."""


def patch_moment(x: Tensor, window: Window, with_ones: bool) -> Tensor:
    """Sum over batch and positions of ``a aᵀ``, a patch with a one appended: ``(d, d)``.

    ``x`` ``(B, C, H, W)``; ``d`` counts the patch's entries in a weight's order (channel, row, column),
    and the one.
    """
    x = x.contiguous()  # unfolding channels that lie innermost in memory takes several times longer
    per_image = x[0].numel() * window.kernel[0] * window.kernel[1]
    moment = _moment_by_rows if window.stride[0] == 1 else _moment_of_patches
    parts = x.split(max(1, LARGEST_UNFOLDING // per_image))
    return reduce(torch.add, (moment(part, window, with_ones) for part in parts))


def patch_sums(x: Tensor, window: Window) -> Tensor:
    """``1ᵀ a`` of each patch (without the one): ``(B, H_out, W_out)``."""
    padded = F.pad(x.sum(1), window.padding)
    return _slide(_slide(padded, 2, 1, window).sum(-1), 1, 0, window).sum(-1)


def patch_totals(x: Tensor, window: Window) -> Tensor:
    """Each image's sum of its patches (without the one): ``(B, d)``, in a weight's order."""
    rows = _slide(F.pad(x, window.padding), 2, 0, window).sum(2)
    return _slide(rows, 2, 1, window).sum(2).flatten(1)


def _slide(x: Tensor, dim: int, axis: int, window: Window) -> Tensor:
    """All positions of the window along ``dim``; what it sees there is a new last axis."""
    dilation = window.dilation[axis]
    extent = (window.kernel[axis] - 1) * dilation + 1
    return x.unfold(dim, extent, window.stride[axis])[..., ::dilation]


def _moment_of_patches(x: Tensor, window: Window, with_ones: bool) -> Tensor:
    seen = _slide(_slide(F.pad(x, window.padding), 2, 0, window), 3, 1, window)
    patches = seen.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)
    moment = patches @ patches.T
    return _append_one(moment, patches.sum(1), patches.shape[1]) if with_ones else moment


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
    moment = order.reshape(rows * len(lines), rows * len(lines))
    if not with_ones:
        return moment
    line_sums = lines.sum(2)
    sums = torch.stack([line_sums[:, slice(*seen_by(row))].sum(1) for row in range(rows)])
    sums = sums.view(rows, channels, columns).transpose(0, 1).flatten()
    return _append_one(moment, sums, positions * batch * width)


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


def _append_one(moment: Tensor, sums: Tensor, count: int) -> Tensor:
    """The moment of ``[a 1]`` from that of ``a``, its sum and the number of patches."""
    above = torch.cat([moment, sums[:, None]], dim=1)
    below = torch.cat([sums, sums.new_tensor([float(count)])])
    return torch.cat([above, below[None]])
