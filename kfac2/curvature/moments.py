"""Second moments of a layer's rows."""

import torch
from torch import Tensor

SMALLEST_HALVED = 256
"""Rows of a matrix from which on two halves are multiplied faster than the whole."""


def second_moment(columns: Tensor, diagonal: bool, with_one: bool = False) -> Tensor:
    """Sum of ``c cᵀ`` over the columns of ``(R, d, N)``: ``(R, d, d)``, or its ``diagonal`` ``(R, 1, d)``.

    ``with_one``: as if a one stood below each column, which copying all of them would put there.
    """
    inner = columns.square().sum(-1)[:, None] if diagonal else _gram(columns)
    if not with_one:
        return inner
    number = inner.new_full((len(inner), 1, 1), columns.shape[-1])
    if diagonal:
        return torch.cat([inner, number], -1)
    sums = columns.sum(-1, keepdim=True)
    return torch.cat([torch.cat([inner, sums], -1), torch.cat([sums.mT, number], -1)], -2)


def _gram(columns: Tensor) -> Tensor:
    """``c cᵀ`` of ``(R, d, N)``; where it pays, a block beside the diagonal is computed once, not twice."""
    d = columns.shape[-2]
    if d < SMALLEST_HALVED:
        return torch.bmm(columns, columns.mT)
    upper, lower = columns.split([d // 2, d - d // 2], dim=-2)
    beside = torch.bmm(lower, upper.mT)
    return torch.cat(
        [torch.cat([_gram(upper), beside.mT], -1), torch.cat([beside, _gram(lower)], -1)],
        -2,
    )
