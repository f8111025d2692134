"""Samples that were not finite and inverses that failed: counted, and named in a warning once."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.optim.layers import Layer
from kfac2.optim.stacks import LayerStack


class Failures:
    """``counts``: of each kind, per replica ``(R,)``, since the first step.

    What is ``bad`` is one boolean or count ``(n, R)`` per stack of layers and, last, the coarse space's ``(R,)``.
    """

    def __init__(self, layers: Sequence[Layer]):
        self._layers, self._replicas = layers, layers[0].replicas
        self.counts = {
            kind: torch.zeros(self._replicas, dtype=torch.int64)
            for kind in ("rejected_samples", "failed_inverses")
        }
        self._warned: set[str] = set()

    def count(self, kind: str, bad: Sequence[Tensor], stacks: Sequence[LayerStack], iteration: int) -> None:
        """Add to ``counts``; the first of a kind is a warning that names what is concerned and a remedy."""
        numbers = self.per_replica(bad)
        self.counts[kind] = self.counts[kind] + numbers
        if not numbers.any() or kind in self._warned:
            return
        self._warned.add(kind)
        if kind == "rejected_samples":
            what, remedy = "curvature samples were not finite", self.why_not_finite()
            instead = "what was there before stays in use"
        else:
            what = "inverses could not be computed, although the statistics are finite"
            instead = "the earlier ones stay in use, and a layer without one takes plain steps"
            remedy = "Raise damping, or leave the layers to plain SGD with exclude=[...]"
        warnings.warn(
            f"iteration {iteration}: {int(numbers.sum())} {what} ({self.names(bad, stacks)}); {instead}. {remedy}. "
            f"Counted in {kind} from now on, without another warning",
            RuntimeWarning,
            stacklevel=5,
        )

    def load(self, saved: dict[str, Tensor]) -> None:
        for kind, count in self.counts.items():
            # An older state has one number for all replicas: any of them may be concerned.
            self.counts[kind] = torch.zeros_like(count) + torch.as_tensor(saved[kind]).cpu()

    def per_replica(self, bad: Sequence[Tensor]) -> Tensor:
        """How many, ``(R,)``; a layer in row blocks counts once."""
        if not bad:
            return torch.zeros(self._replicas, dtype=torch.int64)
        layers = [torch.atleast_2d(b).unflatten(1, (self._replicas, -1)).amax(-1) for b in bad]
        return torch.stack([of_stack.sum(0) for of_stack in layers]).sum(0).cpu()

    def names(self, bad: Sequence[Tensor], stacks: Sequence[LayerStack], most: int = 5) -> str:
        """The layers in ``bad``, and the replicas."""
        index = [stack.index[b.any(1)] for stack, b in zip(stacks, bad, strict=False)]
        names = [self._layers[i].name for i in torch.cat(index).sort().values.tolist()]
        listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
        parts = [f"layers {listed}"] if names else []
        if len(bad) > len(stacks) and bad[-1].any():
            parts.append("the coarse matrix")
        replicas = self.per_replica(bad).nonzero().flatten().tolist()
        return " and ".join(parts) + (f" in replicas {replicas}" if self._layers[0].replicated else "")

    def why_not_finite(self) -> str:
        if all(p.isfinite().all() for layer in self._layers for p in layer.parameters):
            return (
                "The layers' parameters are finite: check the batch and the loss for values that are NaN, infinite "
                "or too large to be squared"
            )
        return "Parameters are not finite themselves: go back to a sound checkpoint, with a lower lr or more damping"
