"""The coarse space's part of an update (eq. 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.curvature import CoarseSpace, ratio_factor
from kfac2.curvature.averages import matrices
from kfac2.optim.stacks import LayerStack

Blocks = list[Tensor]
"""One tensor ``(n, R, d_out, d_in)`` per stack of layers."""


def coarse_corrections(
    coarse: CoarseSpace,
    stacks: Sequence[LayerStack],
    updates: Blocks,
    gradients: Blocks,
    active: list[bool],
) -> tuple[Blocks, dict[str, Tensor]]:
    """What is added to the one-level ``updates``, which broadcasts to their shapes, and the step's diagnostics."""
    blocks = [(stack.index, g) for stack, g in zip(stacks, gradients, strict=True)]

    def one_level(gradients: Sequence[Tensor]) -> Blocks:
        return [stack.precondition(g, active) for stack, g in zip(stacks, gradients, strict=True)]

    corrections = [
        stack.masked(correction, active)
        for stack, correction in zip(stacks, coarse.corrections(blocks, updates, one_level), strict=True)
    ]
    own, norm = _squared_norm(corrections, like=updates), _squared_norm(updates, like=updates)
    ratio = torch.where(own == 0, own, own / norm).sqrt()
    if coarse.max_ratio is not None:
        factor = matrices(ratio_factor(ratio, coarse.max_ratio))
        corrections = [correction * factor for correction in corrections]
        ratio = ratio.clamp(max=coarse.max_ratio)
    negative = coarse.negative_eigenvalues
    return corrections, {
        "coarse_ratio": ratio,
        "coarse_indefinite": (negative > 0).to(own.dtype),
        "coarse_negative": negative.to(own.dtype),
    }


def _squared_norm(blocks: Blocks, like: Blocks) -> Tensor:
    """Of ``blocks`` broadcast to the shapes of ``like``, per replica: ``(R,)``."""
    norms = [
        block.square().sum((-2, -1)) * (full[0, 0].numel() / block[0, 0].numel())
        for block, full in zip(blocks, like, strict=True)
    ]
    return torch.cat(norms).sum(0)
