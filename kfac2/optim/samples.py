"""Where a batch's samples are in the calls of one layer, and one batch from several calls.

A layer may fold positions into the batch (windows, frames), have time first, or be called several times:
on the whole batch (a recurrent loop), or on parts of it (two passes whose outputs are concatenated).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac2.curvature.moments import second_moment
from kfac2.optim.layers import Layer, Moments, Totals
from kfac2.optim.options import by_layer, check_choice

Axes = tuple[int, ...]
"""Sizes of the axes of one call along which the samples may run."""

WEIGHT_SHARINGS = ("expand", "reduce")
MOST_POSITION_AXES = 3  # that interpolation knows


def set_sharing(
    layers: Sequence[Layer],
    weight_sharing: str | Mapping[str, str],
    batch_axis: int | Mapping[str, int] | None,
) -> None:
    """Tell the layers what the user knows of their positions; raises ``ValueError`` for what cannot be."""
    names = [layer.name for layer in layers]
    sharing = by_layer("weight_sharing", weight_sharing, names, "expand")
    axes = by_layer("batch_axis", batch_axis, names, None)
    for layer, how, axis in zip(layers, sharing, axes, strict=True):
        check_choice("weight_sharing", how, WEIGHT_SHARINGS)
        if axis is not None and not (isinstance(axis, int) and axis >= 0):
            raise ValueError(f"batch_axis must be an axis counted from 0, got {axis!r}")
        layer.reduces, layer.batch_axis = how == "reduce", axis


def batch_axis(calls: Sequence[Axes], samples: int, given: int | None = None) -> int | None:
    """The axis of all ``calls`` along which the samples run, or None if that is not established.

    It is the ``given`` one, or the only one whose size is the number of samples, in each call or in all
    of them together. Two such axes (as many time steps as samples) decide nothing.
    """
    shared = min(len(axes) for axes in calls)
    if given is not None and given < shared:
        return given
    sizes = [[axes[k] for axes in calls] for k in range(shared)]
    fitting = [k for k, of in enumerate(sizes) if sum(of) == samples or set(of) == {samples}]
    if fitting:
        return fitting[0] if len(fitting) == 1 or samples == 1 else None
    return 0 if shared == 1 and max(sizes[0]) < samples else None


def samples_first(maps: Tensor, axis: int, samples: int) -> Tensor:
    """``(R, *axes)`` as ``(R, B, *positions)``.

    An axis several times as long as the batch holds the rows of each sample together.
    """
    maps = maps.movedim(1 + axis, 1) if axis else maps
    folded, rest = divmod(maps.shape[1], samples)
    return maps.unflatten(1, (samples, folded)) if folded > 1 and not rest else maps


def joined_maps(calls: Sequence[Tensor], samples: int) -> Tensor | None:
    """Maps ``(R, b, *positions)`` of a layer's calls, in call order, as one ``(R, B, *positions)``.

    Calls on the whole batch are further positions of it; calls on parts of it stand one after the other.
    None where they are neither.
    """
    sizes = [x.shape[1] for x in calls]
    alike = len(calls) == 1 or len({x.shape[2:] for x in calls}) == 1
    if set(sizes) == {samples}:
        if len(calls) == 1:
            maps = calls[0]
        elif alike:
            maps = torch.stack(list(calls), dim=2)
        else:
            maps = torch.cat([x.reshape(*x.shape[:2], -1) for x in calls], dim=2)
    elif sum(sizes) == samples and alike:
        maps = torch.cat(list(calls), dim=1)
    else:
        return None
    return maps if maps.dim() - 2 <= MOST_POSITION_AXES else maps.flatten(2)


def reduced_moments(calls: Sequence[Totals], samples: int, diagonal: tuple[bool, bool]) -> Moments | None:
    """K-FAC-reduce's moments: of each sample's mean of ``a`` and sum of ``g``, over positions and calls.

    The calls go together as those of ``joined_maps``; None where they do not. ``diagonal``: whether only the
    diagonals of G and of A are wanted.
    """
    calls = [_folded(call, samples) for call in calls]
    sizes = [call.a.shape[-1] for call in calls]
    if set(sizes) == {samples}:
        a = torch.stack([call.a for call in calls]).sum(0) / sum(call.positions for call in calls)
        g = torch.stack([call.g for call in calls]).sum(0)
    elif sum(sizes) == samples:
        a = torch.cat([call.a / call.positions for call in calls], dim=-1)
        g = torch.cat([call.g for call in calls], dim=-1)
    else:
        return None
    only_g, only_a = diagonal
    return Moments(second_moment(a, only_a), second_moment(g, only_g), samples)


def _folded(call: Totals, samples: int) -> Totals:
    """Of an axis several times as long as the batch: the rows of each sample stand together."""
    folded, rest = divmod(call.a.shape[-1], samples)
    if folded <= 1 or rest:
        return call
    a, g = (x.unflatten(-1, (samples, folded)).sum(-1) for x in (call.a, call.g))
    return Totals(a, g, call.positions * folded)
