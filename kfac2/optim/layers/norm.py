"""Scale and shift of normalisations: adapters that no type has until it is registered."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2.optim.layers.base import Layer, Moments, Totals


class NormLayer(Layer):
    """Scale and shift after ``normalised``: a linear map in each channel, with a block of its own.

    The curvature of batch norms in training mode passes over what the samples share, as everywhere in K-FAC.
    """

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        super().__init__(name, module, with_bias)
        self.row_blocks = self.weight.numel()
        self.outside_coarse = f"its {self.row_blocks} channels have no common a and g"

    def normalised(self, inputs: Tensor) -> Tensor:
        """What is scaled and shifted, in the shape of ``inputs``."""
        raise NotImplementedError

    def channels_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)

    def weight_matrix(self, weights: Tensor) -> Tensor:
        return weights[:, None, :, None]

    def weight_like(self, matrices: Tensor) -> Tensor:
        return matrices[:, 0, :, 0]

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        return (len(inputs),)

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        a, g = (x.flatten(2) for x in self._rows(inputs, gradients))
        return Moments(torch.bmm(a, a.mT), torch.bmm(g, g.mT), a.shape[-1])

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        a, g = (
            x.movedim(2 + axis, 2).flatten(3).sum(-1) if x.dim() > 3 else x
            for x in self._rows(inputs, gradients)
        )
        return Totals(a, g, inputs.numel() // self.row_blocks // a.shape[-1])

    def _rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """``a``, a one appended where there is a bias, and ``g``: ``(channels, d, *axes)``."""
        normalised = self.normalised(inputs.to(self.dtype))
        a, g = (self.channels_last(x).movedim(-1, 0)[:, None] for x in (normalised, gradients.to(self.dtype)))
        return torch.cat([a, torch.ones_like(a)], dim=1) if self.with_bias else a, g


class LayerNormLayer(NormLayer):
    """``nn.LayerNorm`` over the last axis of ``(*axes, d)``."""

    module: nn.LayerNorm

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        assert isinstance(module, nn.LayerNorm)
        return None if len(module.normalized_shape) == 1 else "it normalises more than one axis"

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, self.module.normalized_shape, eps=self.module.eps)

    def channels_last(self, x: Tensor) -> Tensor:
        return x

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        return tuple(inputs.shape[:-1])


class GroupNormLayer(NormLayer):
    """``nn.GroupNorm`` on ``(B, C, *positions)``."""

    module: nn.GroupNorm

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, self.module.num_groups, eps=self.module.eps)


class BatchNormLayer(NormLayer):
    """``nn.BatchNorm1d``, ``2d`` and ``3d`` on ``(B, C, *positions)``."""

    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

    def normalised(self, inputs: Tensor) -> Tensor:
        mean, var, eps = self.module.running_mean, self.module.running_var, self.module.eps
        if self.module.training or mean is None or var is None:
            return F.batch_norm(inputs, None, None, training=True, eps=eps)
        return F.batch_norm(inputs, mean.to(inputs), var.to(inputs), eps=eps)
