"""The predictive distributions whose Fisher is used: label draws and negative log-likelihoods.

The Fisher's labels are drawn from the model's own prediction (the data's labels give the empirical
Fisher). Draws are inverse-CDF comparisons, so that a NaN prediction of one replica gives some label
instead of an error for all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[..., Tensor]


class Likelihood(NamedTuple):
    """Outputs are ``([R,] B, ...)``; the classes of a categorical one are their last axis."""

    draw: Callable[[Tensor, Sequence[torch.Generator]], Tensor]
    """Labels for outputs; one generator, or one per replica."""
    negative_log: Callable[[Tensor, Tensor], Tensor]
    """Negative log-likelihood of each label (the Gaussian's without its constant)."""
    has_classes: bool
    """Whether one label belongs to an axis of outputs; otherwise each output has its own."""


def _wide(x: Tensor) -> Tensor:
    """At least float32: half precision has too few steps for a cumulative distribution."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _random(sample: Draw, shape: torch.Size, like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    shapes = [shape] if len(generators) == 1 else [shape[1:]] * len(generators)
    draws = [
        sample(size, generator=generator, device=generator.device, dtype=_wide(like).dtype)
        for size, generator in zip(shapes, generators, strict=True)
    ]
    return (draws[0] if len(draws) == 1 else torch.stack(draws)).reshape(shape).to(like.device)


def _draw_categorical(output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Memory: one copy of the outputs, in float32 at least.

    In float32 the steps of the distribution and of the uniform numbers are 6e-8, so that rarer classes are
    drawn at a rate that is only right to that.
    """
    cumulative = _wide(output).softmax(-1).cumsum_(-1)
    uniform = _random(torch.rand, output.shape[:-1], output, generators)
    drawn = torch.searchsorted(cumulative.contiguous(), uniform[..., None], right=True)[..., 0]
    return drawn.clamp(max=output.shape[-1] - 1)


def _draw_bernoulli(output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    probabilities = _wide(output).sigmoid()
    return (_random(torch.rand, output.shape, output, generators) < probabilities).to(probabilities.dtype)


def _draw_gaussian(output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    return _wide(output) + _random(torch.randn, output.shape, output, generators)


def _categorical_loss(output: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(_wide(output).flatten(0, -2), labels.flatten(), reduction="none")
    return losses.reshape(labels.shape)


def _bernoulli_loss(output: Tensor, labels: Tensor) -> Tensor:
    wide = _wide(output)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="none")


def _gaussian_loss(output: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * (_wide(output) - labels).square()


LIKELIHOODS = {
    "categorical": Likelihood(_draw_categorical, _categorical_loss, has_classes=True),
    "bernoulli": Likelihood(_draw_bernoulli, _bernoulli_loss, has_classes=False),
    "gaussian": Likelihood(_draw_gaussian, _gaussian_loss, has_classes=False),
}
