"""Embeddings."""

import torch
from torch import Tensor, nn

from kfac2.curvature.moments import second_moment
from kfac2.optim.layers.base import Basis, Layer, Moments, Totals, rows_with_gradient


class EmbeddingLayer(Layer):
    """``nn.Embedding`` on indices ``(*axes)``, one of the axes the batch.

    It is a linear layer without bias on rows that are one at the index and zero elsewhere (zero
    altogether at ``padding_idx``). So its input factor is diagonal: how often each index occurs. Of K-FAC-reduce's,
    which is not, the diagonal is kept.
    """

    module: nn.Embedding
    diagonal = False, True

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        super().__init__(name, module, with_bias)
        if self.module.padding_idx is not None:
            self.outside_coarse = "padding_idx keeps a part of the weight as it is"

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm changes the weight in the forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True makes another gradient than the loss's"
        return (
            "sparse gradients have no Kronecker block here: build it with sparse=False"
            if module.sparse
            else None
        )

    def weight_matrix(self, weights: Tensor) -> Tensor:
        return weights.mT[:, None]

    def weight_like(self, matrices: Tensor) -> Tensor:
        return matrices[:, 0].mT

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        if inputs.dim() < 1:
            raise self._refuse(inputs, "(batch,) or (batch, positions)")
        return tuple(inputs.shape)

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        self.axes(inputs)
        counts = torch.bincount(inputs.flatten(), minlength=len(self.weight))
        columns = gradients.flatten(0, -2).T[None].to(self.dtype)
        return Moments(
            self._without_padding(counts)[None, None],
            second_moment(columns, self.diagonal[0]),
            inputs.numel(),
        )

    def counting_rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return rows_with_gradient(inputs.flatten(), gradients.flatten(0, -2))

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        rows = inputs.movedim(axis, 0).flatten(1)
        counts = torch.zeros(len(rows), len(self.weight), dtype=self.dtype, device=inputs.device)
        counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=self.dtype))
        g = gradients.to(self.dtype).movedim(axis, 0).flatten(1, -2).sum(1)
        return Totals(self._without_padding(counts).T[None], g.T[None], rows.shape[1])

    def maps(self, inputs: Tensor, gradients: Tensor, basis: Basis | None = None) -> tuple[Tensor, Tensor]:
        self.axes(inputs)
        v, g = torch.ones(len(self.weight), device=inputs.device), gradients.to(self.dtype)
        if basis is not None:
            u, v = basis
            g = g * u.to(g)
        return self._without_padding(v)[inputs][None], g.sum(-1)[None]

    def _without_padding(self, of_indices: Tensor) -> Tensor:
        """``(..., indices)`` as a statistic, zero at the padding."""
        values = of_indices.to(self.dtype, copy=True)
        if self.module.padding_idx is not None:
            values[..., self.module.padding_idx] = 0
        return values
