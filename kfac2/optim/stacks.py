"""Layers of one shape, handled as one batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac2.curvature import KroneckerBlocks
from kfac2.curvature.averages import finite_matrices, matrices
from kfac2.optim.layers import Layer, Moments


class StackSample(NamedTuple):
    """Sums over batches of the stack's ``a aᵀ`` and ``g gᵀ``, and how many rows and samples they are of.

    A layer's sum in one replica that is not finite is left out, and counted in ``rejected``.
    """

    a: Tensor
    """``(n, R, d_in, d_in)``."""
    g: Tensor
    """``(n, R, d_out, d_out)``."""
    rows: Tensor
    """``(n, R)``, of ``a``."""
    samples: Tensor
    """``(n, R)``, of ``g``."""
    rejected: Tensor
    """``(n, R)``, int64."""
    present: Tensor
    """``(n,)``: which layers were observed at all."""

    def plus(self, other: "StackSample") -> "StackSample":
        return StackSample(*(one + two for one, two in zip(self, other, strict=True)))


class LayerStack:
    """``n`` layers whose parameters have one shape, and their ``KroneckerBlocks``.

    ``index`` ``(n,)`` are the layers' positions among all; ``groups`` ``(n, 1, 1, d_in)`` the parameter
    group of each column of a gradient matrix (the bias may be in another one than the weight).
    """

    def __init__(self, layers: Sequence[Layer], index: list[int], groups: Tensor, inverse: str):
        first = layers[0]
        self.layers = layers
        self.index = torch.tensor(index, device=first.weight.device)
        self.groups = groups.to(first.weight.device)
        self.blocks = blocks_for(first, len(layers), first.weight.device, inverse)
        self.positions = index

    def sample(self, moments: dict[int, Moments], samples: int) -> StackSample:
        """The stack's part of a batch of ``samples`` samples, checked layer by layer and replica by replica.

        It takes its layers out of ``moments``, so that these do not lie in memory beside all stacks.
        """
        none = Moments(torch.zeros_like(self.blocks.a[0]), torch.zeros_like(self.blocks.g[0]), 0)
        observed = [i in moments for i in self.positions]
        own = [moments.pop(i, none) for i in self.positions]
        present = torch.tensor(observed)
        a = torch.stack([m.a for m in own])
        g = torch.stack([m.g for m in own])
        rows = torch.stack([torch.as_tensor(m.rows).to(a).expand(a.shape[1]) for m in own])
        count = a.new_tensor([[samples * seen] for seen in observed]).expand(a.shape[:2])
        finite = finite_matrices(a) & finite_matrices(g)
        if not finite.all():
            a, g = (torch.where(matrices(finite), x, 0.0) for x in (a, g))
            rows, count = rows * finite, count * finite
        return StackSample(a, g, rows, count, (~finite).long(), present)

    def fold(self, sample: StackSample, decay: float) -> Tensor:
        """Take a sample into the running averages; returns how many were rejected, ``(n, R)``.

        The factors are K-FAC-expand's (Eschenhagen et al. 2023): the mean over rows of ``a aᵀ``, and the mean
        over samples of the sum over a sample's rows of ``g gᵀ``.
        """
        a, g = sample.a / matrices(sample.rows), sample.g / matrices(sample.samples)  # NaN: none was finite
        return torch.maximum(sample.rejected, self.blocks.fold(a, g, sample.present, decay).long())

    def gradients(self, active: list[bool]) -> Tensor:
        """Plain gradients, ``(n, R, d_out, d_in)``; zero for a layer that does not take part."""
        parameters = zip(*(layer.parameters for layer in self.layers), strict=True)
        return self.layers[0].matrix(*(self._stacked(same, active) for same in parameters))

    def _stacked(self, parameters: Sequence[Any], active: list[bool]) -> Tensor:
        grads = [
            p.grad if active[i] and p.grad is not None else torch.zeros_like(p)
            for i, p in zip(self.positions, parameters, strict=True)
        ]
        return torch.stack(grads).to(self.blocks.g.dtype)

    def precondition(self, gradients: Tensor, active: list[bool]) -> Tensor:
        d_out, d_in = self.blocks.g.shape[-1], self.blocks.a.shape[-1]
        blocks = gradients.reshape(len(gradients), -1, d_out, d_in)
        return self.masked(self.blocks.inverse.apply(blocks).reshape(gradients.shape), active)

    def masked(self, updates: Tensor, active: list[bool]) -> Tensor:
        """Zero the layers that do not take part: they may have no inverse, and NaN times 0 is NaN."""
        mine = [active[i] for i in self.positions]
        if all(mine):
            return updates
        mask = torch.tensor(mine, device=updates.device)
        return torch.where(matrices(mask[:, None]), updates, torch.zeros_like(updates))

    def split(self, updates: Tensor, active: list[bool]) -> dict[int, Tensor]:
        """The updates of the layers that take part, shaped like their parameters, by parameter ``id``."""
        parts = self.layers[0].parts(updates)
        pieces: dict[int, Tensor] = {}
        for part, *parameters in zip(parts, *(layer.parameters for layer in self.layers), strict=True):
            shaped = part.to(parameters[0].dtype).unbind()
            for i, parameter, piece in zip(self.positions, parameters, shaped, strict=True):
                if active[i]:
                    pieces[id(parameter)] = piece
        return pieces


def blocks_for(layer: Layer, number: int, device: torch.device | str, inverse: str) -> KroneckerBlocks:
    """Of ``number`` layers like this one; on the device ``"meta"`` they have sizes and take no memory."""
    options = {"dtype": layer.dtype, "device": device}
    blocks = layer.replicas * layer.row_blocks
    return KroneckerBlocks(number, blocks, *layer.factor_sizes, inverse, diagonal=layer.diagonal, **options)


def make_stacks(
    layers: Sequence[Layer], chosen: Iterable[int], group_of: Mapping[nn.Parameter, int], inverse: str
) -> list[LayerStack]:
    """Group the ``chosen`` layers of one kind by the shape, type and device of their weights.

    ``group_of`` gives each parameter's parameter group.
    """
    by_shape: dict[Any, list[int]] = {}
    for i in chosen:
        layer = layers[i]
        kind = type(layer), layer.row_blocks, layer.with_bias, layer.diagonal
        placed = layer.weight.dtype, layer.weight.device
        by_shape.setdefault((layer.weight.shape, *placed, *kind), []).append(i)
    stacks = []
    for index in by_shape.values():
        members = [layers[i] for i in index]
        groups = torch.stack([_column_groups(layer, group_of) for layer in members])[:, None, None, :]
        stacks.append(LayerStack(members, index, groups, inverse))
    return stacks


def regrouped(
    samples: Sequence[StackSample], old: Sequence[LayerStack], new: Sequence[LayerStack]
) -> list[StackSample]:
    """Samples of the stacks ``old`` as samples of ``new``, which hold their layers and others, unobserved."""
    own = {
        i: [part[k] for part in sample]
        for stack, sample in zip(old, samples, strict=True)
        for k, i in enumerate(stack.positions)
    }
    regrouped = []
    for stack in new:
        nothing = [part[0] for part in stack.sample({}, 0)]
        members = [own.get(i, nothing) for i in stack.positions]
        regrouped.append(StackSample(*(torch.stack(parts) for parts in zip(*members, strict=True))))
    return regrouped


def _column_groups(layer: Layer, group_of: Mapping[nn.Parameter, int]) -> Tensor:
    columns = torch.full((layer.matrix_shape[1],), group_of[layer.weight])
    if layer.bias is not None:
        columns[-1] = group_of[layer.bias]
    return columns
