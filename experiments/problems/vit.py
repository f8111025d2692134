"""A small vision transformer on CIFAR-10, whose parts can be taken out one by one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.problems.cifar10 import CLASSES, SIZE
from experiments.problems.cifar_problem import CifarProblem

PATCH, WIDTH, HEADS, BLOCKS = 4, 64, 4, 4
TOKENS = (SIZE // PATCH) ** 2


class Attention(nn.Module):
    """Attention of ``HEADS`` heads, ``(B, T, d)`` to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_in_heads(layer(x)) for layer in (self.queries, self.keys, self.values))
        return self.out(_together(F.scaled_dot_product_attention(q, k, v)))


class FixedMixing(nn.Module):
    """The same with weights that do not depend on the input: in each head a fixed softmax of normal numbers."""

    weights: Tensor

    def __init__(self, width: int, tokens: int, generator: torch.Generator):
        super().__init__()
        self.values, self.out = (nn.Linear(width, width) for _ in range(2))
        self.register_buffer("weights", torch.randn(HEADS, tokens, tokens, generator=generator).softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(_together(self.weights @ _in_heads(self.values(x))))


class Block(nn.Module):
    """Tokens are mixed, then channels by a network of two layers; each behind a norm and beside a skip, or without."""

    def __init__(self, mixing: nn.Module, width: int, residual: bool, layer_norm: bool):
        super().__init__()
        norms = [nn.LayerNorm(width) if layer_norm else nn.Identity() for _ in range(2)]
        network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.parts = nn.ModuleList(map(nn.Sequential, norms, (mixing, network)))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x) if self.residual else part(x)
        return x


class ViT(nn.Module):
    """Images ``(B, 3, 32, 32)`` to logits ``(B, 10)``: ``blocks`` blocks of 4×4 patches, whose mean is classified."""

    def __init__(
        self,
        residual: bool,
        layer_norm: bool,
        attention: bool,
        generator: torch.Generator,
        blocks: int = BLOCKS,
    ):
        super().__init__()
        self.embedding = nn.Linear(3 * PATCH**2, WIDTH)
        self.places = nn.Parameter(torch.empty(TOKENS, WIDTH))
        mixings = [
            Attention(WIDTH) if attention else FixedMixing(WIDTH, TOKENS, generator) for _ in range(blocks)
        ]
        self.blocks = nn.Sequential(*(Block(mixing, WIDTH, residual, layer_norm) for mixing in mixings))
        self.norm = nn.LayerNorm(WIDTH) if layer_norm else nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES)
        self._initialise(generator)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, PATCH, stride=PATCH).mT
        return self.head(self.norm(self.blocks(self.embedding(patches) + self.places)).mean(1))

    def _initialise(self, generator: torch.Generator) -> None:
        """Variance-preserving, so that signals also pass without norms and skips."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.places, std=0.1, generator=generator)


def _in_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class CifarViT(CifarProblem):
    """A small ViT on CIFAR-10, with skips, layer norms and attention or without each; the other arguments, and what is
    raised, are ``CifarProblem``'s."""

    model: ViT

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        residual: bool = True,
        layer_norm: bool = True,
        attention: bool = True,
        **options: Any,
    ):
        super().__init__(partial(ViT, residual, layer_norm, attention), seeds, **options)
