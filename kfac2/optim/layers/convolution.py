"""Convolutions over one to three axes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2.curvature.patches import Window, patch_moments, patch_sums, patch_totals
from kfac2.optim.layers.base import Basis, Layer, Moments, Totals

AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


class ConvolutionLayer(Layer):
    """``nn.Conv1d``, ``Conv2d`` and ``Conv3d`` on inputs ``(B, C, *axes)``: a sample's patches are its positions (KFC).

    Each group of channels has a block of its own.
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d
    computed_by = ("forward", "_conv_forward")

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        super().__init__(name, module, with_bias)
        conv = self.module
        self.spatial = len(conv.kernel_size)
        padding = conv._reversed_padding_repeated_twice  # the numbers that 'same' stands for
        self.window = Window(conv.kernel_size, conv.stride, conv.dilation, tuple(padding))  # pyright: ignore
        self.row_blocks = conv.groups
        if conv.groups > 1:
            self.outside_coarse = f"its {conv.groups} groups have no common a and g"

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        padding_mode = module.padding_mode
        return None if padding_mode == "zeros" else f"padding_mode={padding_mode!r} is not supported"

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        return (len(self._checked(inputs)),)

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        (x, window), g = self._seen(inputs, gradients), gradients.to(self.dtype)
        rows, (only_g, only_a) = g[:, 0].numel(), self.diagonal
        if only_a:
            a = self._input_totals(x.square(), window, rows // len(x)).sum(-1)[:, None]
        else:
            a = patch_moments(x, window, self.with_bias, self.row_blocks)
        if only_g:
            g = self._in_blocks(g.square().flatten(2).sum(-1)).sum(-1)[:, None]
        else:
            g = patch_moments(g, Window.of_one(self.spatial), False, self.row_blocks)
        return Moments(a, g, rows)

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        g = gradients.to(self.dtype).flatten(2)
        positions = g.shape[-1]
        a = self._input_totals(*self._seen(inputs, gradients), positions)
        return Totals(a, self._in_blocks(g.sum(-1)), positions)

    def maps(self, inputs: Tensor, gradients: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        if basis is not None:
            raise NotImplementedError(f"layer {self.name!r}: a convolution's coarse basis is the ones only")
        sums = patch_sums(*self._seen(inputs, gradients)) + self.with_bias
        return sums[None], gradients.to(self.dtype).sum(1)[None]

    def _input_totals(self, x: Tensor, window: Window, positions: int) -> Tensor:
        """Each image's sum of its patches, a one appended where there is a bias: ``(blocks, d_in, B)``."""
        totals = self._in_blocks(patch_totals(x, window))
        if not self.with_bias:
            return totals
        return torch.cat([totals, torch.full_like(totals[:, :1], positions)], dim=1)

    def _in_blocks(self, totals: Tensor) -> Tensor:
        """``(B, channels · entries)`` as ``(blocks, d, B)``."""
        return totals.T.unflatten(0, (self.row_blocks, -1))

    def _seen(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Window]:
        """The images that a window slides over without flipping, and the window."""
        return self._checked(inputs), self.window

    def _checked(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 2 + self.spatial:
            raise self._refuse(inputs, f"(batch, channels, {AXES[self.spatial]})")
        return inputs.to(self.dtype)


class TransposedConvolutionLayer(ConvolutionLayer):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``: convolutions of the input with zeros between its entries.

    The kernel is flipped, the positions are those of the output.
    """

    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d  # pyright: ignore
    computed_by = ("forward", "_output_padding")

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        super().__init__(name, module, with_bias)
        self.window = Window.of_one(self.spatial)._replace(
            kernel=self.module.kernel_size, dilation=self.module.dilation
        )

    def weight_matrix(self, weights: Tensor) -> Tensor:
        of_groups = weights.unflatten(1, (self.row_blocks, -1)).transpose(2, 3)
        return self._flipped(of_groups).flatten(1, 2)[:, None].flatten(3)

    def weight_like(self, matrices: Tensor) -> Tensor:
        of_groups = matrices[:, 0].unflatten(1, (self.row_blocks, -1))
        kernels = self._flipped(of_groups.unflatten(-1, (-1, *self.module.kernel_size)))
        return kernels.transpose(2, 3).flatten(1, 2)

    def _flipped(self, kernels: Tensor) -> Tensor:
        return kernels.flip(tuple(range(-self.spatial, 0)))

    def _seen(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Window]:
        x, layer, padding = self._checked(inputs), self.module, list[int]()
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
        stuffed = x.new_zeros(*x.shape[:2], *sizes)
        stuffed[(..., *(slice(None, None, step) for step in layer.stride))] = x
        for axis in reversed(range(self.spatial)):
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            before = reach - int(layer.padding[axis])
            padding += [before, gradients.shape[2 + axis] + reach - sizes[axis] - before]
        return F.pad(stuffed, padding), self.window
