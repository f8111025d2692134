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
    draw: Callable[[Tensor, Sequence[torch.Generator]], Tensor]
    """Labels for outputs ``([R,] B, ...)``; one generator, or one per replica."""
    negative_log: Callable[[Tensor, Tensor], Tensor]
    """Negative log-likelihood, summed over everything."""
    label_shape: Callable[[Tensor], torch.Size]
    """The shape labels must have for outputs."""


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
    cumulative = _wide(output).softmax(-1).cumsum(-1)
    uniform = _random(torch.rand, output.shape[:-1], output, generators)
    return (cumulative <= uniform[..., None]).sum(-1).clamp(max=output.shape[-1] - 1)


def _draw_bernoulli(output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    probabilities = _wide(output).sigmoid()
    return (_random(torch.rand, output.shape, output, generators) < probabilities).to(probabilities.dtype)


def _draw_gaussian(output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    return _wide(output) + _random(torch.randn, output.shape, output, generators)


def _categorical_loss(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_wide(output).flatten(0, -2), labels.flatten(), reduction="sum")


def _bernoulli_loss(output: Tensor, labels: Tensor) -> Tensor:
    wide = _wide(output)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")


def _gaussian_loss(output: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * (_wide(output) - labels).square().sum()


LIKELIHOODS = {
    "categorical": Likelihood(_draw_categorical, _categorical_loss, lambda output: output.shape[:-1]),
    "bernoulli": Likelihood(_draw_bernoulli, _bernoulli_loss, lambda output: output.shape),
    "gaussian": Likelihood(_draw_gaussian, _gaussian_loss, lambda output: output.shape),
}


def check_output(likelihood: Likelihood, output: Tensor, replicas: int | None) -> int:
    """The number of samples (per replica; ``replicas`` is None for an ordinary model).

    Raises:
        RuntimeError: an output without autograd history.
        ValueError: a shape that does not fit the likelihood or the replicas.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"output must be one tensor, got {type(output).__name__}: pass the one the loss is of"
        )
    leading = 1 if replicas is None else 2
    if not output.requires_grad:
        raise RuntimeError("output does not require grad: pass the model's output, made with grad enabled")
    if output.dim() < leading or (replicas is not None and output.shape[0] != replicas):
        expected = "(batch, ...)" if replicas is None else f"({replicas}, batch, ...)"
        raise ValueError(f"output has shape {tuple(output.shape)}, expected {expected}")
    if likelihood is LIKELIHOODS["categorical"] and output.dim() != leading + 1:
        raise ValueError(
            f"output has shape {tuple(output.shape)}: a categorical likelihood needs one class axis "
            "after the batch; for single logits use likelihood='bernoulli'"
        )
    return output.shape[leading - 1]


def check_labels(likelihood: Likelihood, output: Tensor, labels: Tensor) -> None:
    expected = likelihood.label_shape(output)
    if labels.shape != expected:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the output asks for {tuple(expected)}")
