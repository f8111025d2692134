"""The projections of ``nn.MultiheadAttention``, which multiplies with their weights inside one function.

In passes that are captured the module's ``forward`` makes them as calls of their own, and attends to what comes
of them with the identity as projections, so that masks, dropout and the rest stay torch's.
"""

import weakref
from collections.abc import Callable
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2.curvature.moments import second_moment
from kfac2.optim.layers.base import Layer, Moments, Totals, rows_with_gradient

BLOCKS = 3  # queries, keys and values
_projections: WeakKeyDictionary[nn.Module, "InProjection"] = WeakKeyDictionary()  # one for all optimizers


class InProjection(nn.Module):
    """The in-projection as a call; no part of the model, whose parameters it uses."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self._attention = weakref.ref(attention)

    @property
    def attention(self) -> nn.MultiheadAttention:
        attention = self._attention()
        assert attention is not None
        return attention

    @property
    def weight(self) -> nn.Parameter:
        return self.attention.in_proj_weight

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The rows of the three products, one below the other."""
        bias = self.attention.in_proj_bias
        biases = [None] * BLOCKS if bias is None else bias.chunk(BLOCKS)
        weights = self.weight.chunk(BLOCKS)
        products = map(F.linear, (query, key, value), weights, biases)
        return torch.cat([product.flatten(0, -2) for product in products])


class InProjectionLayer(Layer):
    """The weights of queries, keys and values, a block for each, of rows of their own.

    A call's input is ``(N, d + 1)``, the last column saying which of the three a row belongs to.
    """

    weight_name, bias_name = "in_proj_weight", "in_proj_bias"
    row_blocks = BLOCKS
    outside_coarse = "its three products have rows of their own"

    def __init__(self, name: str, module: nn.Module, with_bias: bool):
        super().__init__(name, module, with_bias)
        assert isinstance(module, nn.MultiheadAttention)
        self.module = _projections.setdefault(module, InProjection(module))

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            return "its kdim or vdim is not embed_dim, so that its weights have shapes of their own"
        if module.bias_k is not None or module.add_zero_attn:
            return "keys and values are added to what it projects (add_bias_kv, add_zero_attn)"
        return None

    @property
    def revealed(self) -> tuple[nn.Module, ...]:
        return (self.module.attention.out_proj,)

    def reveal(self) -> Callable[[], None]:
        return in_single_calls(self.module)

    def input_of(self, args: Any, kwargs: Any) -> Tensor:
        rows = [x.flatten(0, -2) for x in args]
        return torch.cat([F.pad(x, (0, 1), value=number) for number, x in enumerate(rows)])

    def axes(self, inputs: Tensor) -> tuple[int, ...]:
        return (len(inputs),)

    def counting_rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return rows_with_gradient(inputs, gradients)

    def moments(self, inputs: Tensor, gradients: Tensor) -> Moments:
        counts = inputs[:, -1].long().bincount(minlength=BLOCKS)
        a, g = (
            [rows.T[None].to(self.dtype) for rows in x.split(counts.tolist())]
            for x in (inputs[:, :-1], gradients)
        )
        only_g, only_a = self.diagonal
        return Moments(
            torch.cat([second_moment(x, only_a, self.with_bias) for x in a]),
            torch.cat([second_moment(x, only_g) for x in g]),
            counts.to(self.dtype),
        )

    def totals(self, inputs: Tensor, gradients: Tensor, axis: int) -> Totals:
        raise ValueError(
            f"weight_sharing='reduce' is not for the attention {self.name!r}, whose positions are not averaged: take "
            f"weight_sharing={{{self.name!r}: 'expand', ...}}"
        )


class InSingleCalls:
    """Stands in for an attention's ``forward`` and makes its projections as calls; copies of it have the plain one."""

    def __init__(self, projection: InProjection):
        self.projection, self.wanted = projection, 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention, given = self.projection.attention, (query, key, value)
        rows = self.projection(*given).split([x.numel() // x.shape[-1] for x in given])
        projected = [part.view(x.shape) for part, x in zip(rows, given, strict=True)]
        attended, weights = type(attention).forward(
            _without_projections(attention, projected[0]), *projected, *args, **kwargs
        )
        return attention.out_proj(attended), weights

    def __reduce__(self) -> tuple[Any, tuple[nn.Module, str]]:
        return getattr, (self.projection.attention, "forward")


def in_single_calls(projection: InProjection) -> Callable[[], None]:
    """Have the attention make its projections as calls until the returned function is called."""
    attention = projection.attention
    standing = vars(attention).get("forward")
    if standing is not None and not isinstance(standing, InSingleCalls):
        return lambda: None
    stand_in = standing or InSingleCalls(projection)
    stand_in.wanted += 1
    vars(attention)["forward"] = stand_in
    return partial(_remove, attention, stand_in)


def _remove(attention: nn.Module, stand_in: InSingleCalls) -> None:
    stand_in.wanted -= 1
    if not stand_in.wanted and vars(attention).get("forward") is stand_in:
        del attention.forward


def _without_projections(attention: nn.MultiheadAttention, like: Tensor) -> nn.MultiheadAttention:
    """A shallow copy with the identity as in- and out-projection."""
    identity = torch.eye(attention.embed_dim, dtype=like.dtype, device=like.device)
    plain = copy(attention)
    parameters = {**attention._parameters, "in_proj_weight": identity.repeat(BLOCKS, 1), "in_proj_bias": None}
    vars(plain)["_parameters"] = parameters
    vars(plain)["_modules"] = {"out_proj": SimpleNamespace(weight=identity, bias=None)}
    return plain
