"""The loss that is minimised, as far as its curvature depends on it.

Each loss here is ``(1/N) Σ_t c_t ℓ_t`` over its terms t (a label's negative log-likelihood ℓ_t, one per
sample, position or output), with curvature ``F = (1/N) Σ_t c_t E[g_t g_tᵀ]``, g_t the gradient of ℓ_t for a
drawn label: its generalised Gauss-Newton matrix. A layer's factors are means over the B samples of g gᵀ, so
the sampled loss that is back-propagated is ``Σ_t sqrt(B c_t / N) ℓ_t``: labels of different terms are
independent, so that their products vanish in expectation.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac2.optim.likelihood import LIKELIHOODS, Likelihood
from kfac2.optim.options import check_choice

IGNORE_INDEX = nn.CrossEntropyLoss().ignore_index
"""Torch's default: whoever sets another one has labels to ignore."""

OfTargets = Callable[[Tensor | None], Tensor | float]
"""A number per term, or one for all, from the data's labels."""


def _one(targets: Tensor | None) -> float:
    return 1.0


class Loss(NamedTuple):
    """Of outputs ``([R,] B, ...)``."""

    likelihood: Likelihood
    mean_over: str | None
    """N counts ``"terms"`` or ``"samples"``; None is a sum, N = 1."""
    curvature: OfTargets = _one
    """c."""
    share: OfTargets = _one
    """What a term adds to N."""
    needs_targets: str | None = None
    """The loss's argument that makes c depend on the data's labels."""
    ignore_index: int | None = None
    class_dim: int | None = None
    replicas: int | None = None
    """None for an ordinary model."""

    @property
    def leading(self) -> int:
        """The number of axes before those of one sample."""
        return 1 if self.replicas is None else 2

    def check(
        self,
        output: Tensor,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Types and shapes only, so that it costs microseconds.

        Raises:
            TypeError: an argument that is no tensor, or of a wrong type.
            RuntimeError: an output without autograd history.
            ValueError: a shape or type that does not fit the loss, the replicas or the output.
        """
        _check_output(output, self.leading, self.replicas)
        shape = self._label_shape(output.shape)
        _check_labels("labels", labels, shape, self.likelihood.has_classes)
        _check_labels("targets", targets, shape, self.likelihood.has_classes)
        _check_mask(mask, shape, self.leading)
        if labels is not None or targets is not None:
            return
        ignores = self.ignore_index not in (None, IGNORE_INDEX) and mask is None
        if self.needs_targets or ignores:
            raise ValueError(
                f"the curvature of a loss with {self.needs_targets or 'ignore_index'}= depends on the data's "
                "labels: call update_curvature(output, targets=y)"
            )

    def sample(
        self,
        output: Tensor,
        generators: Sequence[torch.Generator],
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The sampled loss of checked arguments; ``labels`` stand in for drawn ones."""
        targets = labels if targets is None else targets
        counts = self._counts(self._label_shape(output.shape), targets, mask)
        if self.likelihood.has_classes:
            output = output.movedim(self._class_axis(output.shape), -1)
        if labels is None:
            labels = self.likelihood.draw(output.detach(), generators)
        elif counts is not None:
            labels = labels.masked_fill(~counts, 0)  # may be no label at all: ignore_index, NaN
        if targets is not None and counts is not None:
            targets = targets.masked_fill(~counts, 0)
        terms = self.likelihood.negative_log(output, labels)
        return (self._scale(terms.detach(), targets, counts) * terms).sum()

    def warn_of_probabilities(self, output: Tensor) -> None:
        """Say that logits are meant, where ``output`` looks like a softmax's."""
        if not self.likelihood.has_classes or output.numel() == 0:
            return
        output, axis = output.detach().float(), self._class_axis(output.shape)
        sums_to_one = (output.sum(axis) - 1).abs() < 1e-2  # half precision
        if bool((output.amin() >= 0) & sums_to_one.all()):
            warnings.warn(
                "every row of output lies in [0, 1] and sums to one, as probabilities do, but logits are "
                "meant: leave the softmax to the loss",
                RuntimeWarning,
                stacklevel=3,
            )

    def warn_of_unknown_targets(self, output: Tensor, *told: Tensor | None) -> None:
        """Say that positions may be ignored where nothing is ``told`` of them: labels, targets or mask."""
        has_positions = self.likelihood.has_classes and output.dim() > self.leading + 1
        if has_positions and self.ignore_index is not None and all(x is None for x in told):
            warnings.warn(
                f"all positions of output count in the curvature. Where labels of {self.ignore_index} are ignored "
                "(padding, prompts), say so: update_curvature(output, targets=y), or mask=y != "
                f"{self.ignore_index}; where none are, either silences this",
                RuntimeWarning,
                stacklevel=3,
            )

    def ignores(self, output: Tensor, targets: Tensor | None, mask: Tensor | None) -> bool:
        """Whether some of the output's terms do not count."""
        counts = self._counts(self._label_shape(output.shape), targets, mask)
        return counts is not None and not bool(counts.all())

    def _class_axis(self, shape: torch.Size) -> int:
        leading = self.leading
        if self.class_dim is None:
            if len(shape) > leading + 1:
                raise ValueError(
                    f"output has shape {tuple(shape)}, and any axis after the batch may hold the classes: say "
                    "class_dim=-1 for (batch, tokens, classes), class_dim=1 for (batch, classes, height, width)"
                )
            axis = leading
        else:
            axis = self.class_dim + (len(shape) if self.class_dim < 0 else leading - 1)
        if not leading <= axis < len(shape) or shape[axis] < 2:
            at = "after the batch" if self.class_dim is None else f"at class_dim={self.class_dim}"
            raise ValueError(
                f"output has shape {tuple(shape)}: a categorical likelihood needs one class axis {at}, of two "
                "classes or more; for single logits use likelihood='bernoulli'"
            )
        return axis

    def _label_shape(self, shape: torch.Size) -> torch.Size:
        if not self.likelihood.has_classes:
            return shape
        axis = self._class_axis(shape)
        return shape[:axis] + shape[axis + 1 :]

    def _counts(self, shape: torch.Size, targets: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which terms count, in their shape; None where all do."""
        counts = None
        if mask is not None:
            counts = mask.reshape(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)
        if targets is not None and self.ignore_index is not None:
            known = targets != self.ignore_index
            counts = known if counts is None else counts & known
        return counts

    def _scale(self, terms: Tensor, targets: Tensor | None, counts: Tensor | None) -> Tensor:
        """``sqrt(B c_t / N)``, zero where a term does not count; N is each replica's own."""

        def per_term(x: Tensor | float) -> Tensor:
            return torch.as_tensor(x, dtype=terms.dtype, device=terms.device).expand(terms.shape)

        counted = per_term(1.0 if counts is None else counts)
        if self.mean_over == "terms":
            N = (per_term(self.share(targets)) * counted).flatten(self.leading - 1).sum(-1)
        elif self.mean_over == "samples":
            N = counted[..., None].flatten(self.leading).amax(-1).sum(-1)
        else:
            N = terms.new_ones(())
        N = N.clamp(min=torch.finfo(N.dtype).tiny).reshape(*N.shape, *[1] * (terms.dim() - N.dim()))
        return (terms.shape[self.leading - 1] * per_term(self.curvature(targets)) * counted / N).sqrt()


def _check_output(output: Any, leading: int, replicas: int | None) -> None:
    if not isinstance(output, Tensor):
        remedy = "pass its .logits" if hasattr(output, "logits") else "pass the one the loss is of"
        raise TypeError(f"output must be one tensor, got {type(output).__name__}: {remedy}")
    if not output.is_floating_point():
        raise TypeError(f"output must be real floating point, got {output.dtype}")
    if torch.is_grad_enabled() and not output.requires_grad:
        raise RuntimeError("output does not require grad: pass the model's output, made with grad enabled")
    if output.dim() < leading or replicas not in (None, output.shape[0]):
        expected = "(batch, ...)" if replicas is None else f"({replicas}, batch, ...)"
        raise ValueError(f"output has shape {tuple(output.shape)}, expected {expected}")


def _check_labels(name: str, given: Any, shape: torch.Size, classes: bool) -> None:
    if given is None:
        return
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if given.shape != shape:
        raise ValueError(f"{name} have shape {tuple(given.shape)}, the output asks for {tuple(shape)}")
    if classes and given.is_floating_point():
        raise ValueError(f"{name} must be class numbers, got {given.dtype}")


def _check_mask(mask: Any, shape: torch.Size, leading: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != shape[: max(mask.dim(), leading)]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, the output asks for {tuple(shape)} or its first axes"
        )


NAMED = {
    "categorical": Loss(LIKELIHOODS["categorical"], "terms", ignore_index=IGNORE_INDEX),
    "bernoulli": Loss(LIKELIHOODS["bernoulli"], "samples"),
    "gaussian": Loss(LIKELIHOODS["gaussian"], "samples"),
}


def loss_of(likelihood: Any, class_dim: int | None = None) -> Loss:
    """The loss that ``likelihood=`` names, or is: a string or a loss module.

    Raises:
        ValueError: an unknown name, or a loss or an option of it whose curvature is not known.
    """
    if isinstance(likelihood, str):
        check_choice("likelihood", likelihood, NAMED)
        loss = NAMED[likelihood]
    elif type(likelihood) in MODULES:  # a subclass may compute anything
        if likelihood.reduction == "none":
            raise ValueError(
                f"likelihood={likelihood} with reduction='none' leaves open how its terms are averaged: pass "
                "the one of reduction 'mean' or 'sum' that is minimised, and what is left out of it as "
                "update_curvature(output, mask=...)"
            )
        loss = MODULES[type(likelihood)](likelihood)
    else:
        raise ValueError(
            f"the curvature of likelihood={likelihood!r} is not known: pass one of the modules "
            f"{', '.join(f'nn.{kind.__name__}()' for kind in MODULES)} or a name of {', '.join(NAMED)}"
        )
    if class_dim is None:
        return loss
    if not loss.likelihood.has_classes:
        raise ValueError("class_dim= belongs to a categorical likelihood: other outputs have no class axis")
    if not isinstance(class_dim, int) or class_dim == 0:
        raise ValueError(f"class_dim must be the number of an axis after the batch, got {class_dim!r}")
    return loss._replace(class_dim=class_dim)


def _cross_entropy(module: nn.CrossEntropyLoss) -> Loss:
    """The Hessian of every label's term is ``diag(p) - p pᵀ``: smoothed labels change nothing alone."""
    loss = _by_terms("categorical", module)._replace(ignore_index=module.ignore_index)
    if module.weight is None:
        return loss
    weight, smoothing = _not_negative("weight", module.weight), module.label_smoothing
    spread = smoothing * float(weight.mean())

    def share(targets: Tensor | None) -> Tensor:
        assert targets is not None
        return weight.to(targets.device)[targets]

    def curvature(targets: Tensor | None) -> Tensor:
        return (1 - smoothing) * share(targets) + spread

    return loss._replace(curvature=curvature, share=share, needs_targets="weight")


def _binary_cross_entropy(module: nn.BCEWithLogitsLoss) -> Loss:
    loss = _by_terms("bernoulli", module)
    weight = None if module.weight is None else _not_negative("weight", module.weight)
    if module.pos_weight is None:
        return loss if weight is None else loss._replace(curvature=lambda targets: weight)
    pos_weight = _not_negative("pos_weight", module.pos_weight)

    def curvature(targets: Tensor | None) -> Tensor:
        assert targets is not None
        positive = 1 + (pos_weight.to(targets.device) - 1) * targets
        return positive if weight is None else positive * weight.to(targets.device)

    return loss._replace(curvature=curvature, needs_targets="pos_weight")


def _squared_error(module: nn.MSELoss) -> Loss:
    return _by_terms("gaussian", module)._replace(curvature=lambda targets: 2.0)  # ℓ has a half


def _by_terms(name: str, module: nn.modules.loss._Loss) -> Loss:
    return Loss(LIKELIHOODS[name], "terms" if module.reduction == "mean" else None)


def _not_negative(name: str, weight: Tensor) -> Tensor:
    if not bool((weight >= 0).all()):
        raise ValueError(f"{name} of the loss must not be negative: the loss has no least value then")
    return weight.detach()


MODULES: dict[type, Callable[..., Loss]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.BCEWithLogitsLoss: _binary_cross_entropy,
    nn.MSELoss: _squared_error,
}
