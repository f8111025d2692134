"""What K-FAC remembers of the curvature, and how it turns gradients into updates."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfac2.curvature import CoarseSpace, kl_clip_factor
from kfac2.curvature.averages import decay_at, matrices
from kfac2.optim.allocation import Allocation
from kfac2.optim.correction import Blocks, coarse_corrections
from kfac2.optim.distributed import Flags, Processes
from kfac2.optim.failures import Failures
from kfac2.optim.layers import Layer
from kfac2.optim.memory import diagonal_notes
from kfac2.optim.observation import Batch, Observation, Observations
from kfac2.optim.stacks import LayerStack, regrouped


class Preconditioner:
    """Kronecker factors, damped inverses and, with two levels, a coarse space.

    The layers in ``stacks`` are those whose state is allocated: from the first observation on all that could be
    trained then. ``iteration`` counts the finished steps: the paper's t is one more. ``ready`` says which layers have
    been through a refresh of the inverses; the others take plain steps. So do, whatever has been seen of
    them, those in ``plain``: their positions, with the reason.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        param_groups: Sequence[dict[str, Any]],
        inverse: str,
        factor_decay: float,
        coarse: CoarseSpace | None,
        processes: Processes,
    ):
        self.layers, self.factor_decay, self.coarse = layers, factor_decay, coarse
        self.processes = processes
        self.replicas, self.replicated = layers[0].replicas, layers[0].replicated
        if coarse is not None:
            shapes = [layer.matrix_shape for layer in layers]
            coarse.bind(shapes, self.replicas, layers[0].weight.device)
            coarse.averaged = frozenset(i for i, layer in enumerate(layers) if layer.reduces)
        self.iteration = 0
        self.ready = [False] * len(layers)
        self.plain: dict[int, str] = {}
        group_of = {p: k for k, group in enumerate(param_groups) for p in group["params"]}
        self.allocation = Allocation(layers, self.plain, group_of, inverse)
        self.diverged = torch.zeros(self.replicas, dtype=torch.bool)
        self.failures = Failures(layers)
        self.diagnostics: dict[str, Tensor] = {}
        outside = {i: layer.outside_coarse for i, layer in enumerate(layers) if coarse is not None}
        self.outside_coarse = {i: why for i, why in outside.items() if why is not None}
        """Layers that the coarse space has to do without, and why."""
        self._told_outside = False
        self._observations = Observations()
        self._batch: Batch | None = None

    @property
    def stacks(self) -> list[LayerStack]:
        return self.allocation.stacks

    def has_trainable_layer(self) -> bool:
        return any(layer.weight.requires_grad for i, layer in enumerate(self.layers) if i not in self.plain)

    def memory(self) -> int:
        """Bytes of the factors, their inverses and the coarse matrices, allocated or to be allocated."""
        coarse = {} if self.coarse is None else self.coarse.state_dict()
        return self.allocation.bytes() + sum(x.nbytes for x in coarse.values() if isinstance(x, Tensor))

    def allocate(self, observed: Iterable[int] = ()) -> None:
        """Make room for the layers ``observed`` or trainable that have none yet."""
        old = self.stacks
        if self.allocation.grow(observed):
            self._observations.regroup(partial(regrouped, old=old, new=self.stacks))

    def notes(self) -> dict[int, list[str]]:
        """What is special about layers, by position."""
        notes = {i: diagonal_notes(layer) for i, layer in enumerate(self.layers)}
        for i, why in self.outside_coarse.items():
            notes[i].append(f"outside the coarse space: {why}")
        return notes

    def relocate(self) -> None:
        """Follow the layers to the types and devices they have now; a sample under way is forgotten.

        Raises:
            RuntimeError: a layer has become complex.
        """
        complex_now = [layer.name for layer in self.layers if layer.weight.is_complex()]
        if complex_now:
            raise RuntimeError(
                f"layers {', '.join(complex_now)} have complex weights now, which have no Kronecker block: "
                "build a new optimizer, which leaves them plain"
            )
        state = self.state_dict()
        if self.coarse is not None:
            self.coarse.to(self.layers[0].weight.device)
        self.load_state_dict(state)

    # -- curvature ----------------------------------------------------------------------------------

    def discard_sample(self) -> None:
        """Forget what was observed since the last refresh of the factors."""
        self._observations.clear()
        self._batch = None

    def gradients_zeroed(self) -> None:
        """What was observed with the gradients that are gone does not count."""
        self._observations.gradients_zeroed()

    def observe(
        self,
        index: int,
        inputs: Tensor,
        gradients: Tensor,
        samples: int,
        call: int = 0,
        ignoring: bool = False,
    ) -> None:
        """Add one call of a layer, its input and output gradient, to the batch under way.

        Calls of one layer may come in any order if ``call`` grows from one to the next. ``ignoring``: some of
        the output's terms do not count in the loss.
        """
        if self._batch is None:
            self._batch = Batch(self.layers, self.coarse, samples, ignoring)
        self._batch.observe(index, inputs, gradients, call)

    def end_batch(self, nodes: Iterable[Node] = ()) -> None:
        """All layers of a batch, which may be empty, have been observed.

        The batch counts from when gradients pass one of ``nodes``, its layers' in the graph; once
        they are zeroed, it counts no more.

        Raises:
            ValueError: K-FAC-reduce, and the samples of some layers are not found.
        """
        batch, self._batch = self._batch or Batch(self.layers, self.coarse, 0), None
        moments, coarse_sample = batch.moments(), None
        if self.coarse is not None:
            maps, left_out = batch.maps()
            self._note_outside(maps, left_out)
            self.coarse.accumulate(maps)
            coarse_sample = self.coarse.sample
            self.coarse.discard_sample()
        if moments:
            self.allocate(moments)
        stacks = [stack.sample(moments, batch.samples) for stack in self.stacks]
        observation = Observation(stacks, coarse_sample)
        observation.follow(nodes)
        if all(layer.weight.grad is None for layer in self.layers):  # also zeroed by the module
            self._observations.forget_used()
        self._observations.add(observation)

    def refresh_factors(self) -> None:
        """Take the sample, of all processes, into the running averages.

        Raises:
            RuntimeError: there is none, in one of the processes.
        """
        if self.processes.number > 1:
            observed, missing = self._of_all_processes()
        else:
            observed, missing = self._observations.take(), False
        if observed is None or missing:
            raise RuntimeError(
                f"iteration {self.iteration + 1} refreshes the curvature: call "
                "optimizer.update_curvature(output) between the forward pass and backward()"
                + (", in every process" if self.processes.number > 1 else "")
            )
        decay = decay_at(self.iteration + 1, self.factor_decay)
        rejected = [
            stack.fold(sample, decay) for stack, sample in zip(self.stacks, observed.stacks, strict=True)
        ]
        if self.coarse is not None:
            self.coarse.sample = observed.coarse
            rejected.append(self.coarse.fold(decay))
        self.failures.count("rejected_samples", rejected, self.stacks, self.iteration + 1)

    def _of_all_processes(self) -> tuple[Observation, bool]:
        """The sum of what they have observed, and whether one has observed nothing at all."""
        # Their messages need the same layers in all of them.
        self.allocate(i for i, layer in enumerate(self.layers) if layer.weight.requires_grad)
        own = self._observations.take()
        observed = own or Observation([stack.sample({}, 0) for stack in self.stacks], None)
        samples: list[Any] = list(observed.stacks)
        plain = torch.tensor([i in self.plain for i in range(len(self.layers))])
        samples.append(Flags(torch.tensor(own is None), plain))
        if self.coarse is not None:
            samples.append(observed.coarse or self.coarse.no_sample())
        totals, n = self.processes.total(samples), len(self.stacks)
        stacks, flags, coarse = totals[:n], totals[n], totals[n + 1 :]
        for i in flags.plain.nonzero().flatten().tolist():
            self.plain.setdefault(i, "left to plain SGD by another process")
        seen = [sample for sample in coarse if bool(sample.counts.any() | sample.rejected.any())]
        return Observation(stacks, seen[0] if seen else None), bool(flags.missing)

    def refresh_inverses(self, damping: float | Tensor) -> None:
        """Recompute all inverses; one that fails leaves its predecessor in place, or without one plain steps.

        Args:
            damping: λ, or each replica's, ``(R,)``.

        Raises:
            RuntimeError: a layer's statistics have never been finite (in a replicated model the replica is marked
                diverged instead, and its update becomes NaN), or without damping its first factors are singular.
        """
        if not any(stack.blocks.attempted.any() for stack in self.stacks):
            return
        without = [stack.blocks.missing_inverse() for stack in self.stacks]
        failed = [stack.blocks.refresh_inverse(damping) & stack.blocks.seen for stack in self.stacks]
        singular = [first & fails for first, fails in zip(without, failed, strict=True)]
        unseen = [stack.blocks.never_seen() for stack in self.stacks]
        if self.coarse is not None and self.coarse.attempted:
            failed.append(self.coarse.refresh(damping) & self.coarse.has_inverse())
            unseen.append(~self.coarse.has_inverse())
        elif self.coarse is not None:  # no layer in it: no correction
            self.coarse.inverse = torch.zeros_like(self.coarse.inverse)
        failures, t = self.failures, self.iteration + 1
        failures.count("failed_inverses", failed, self.stacks, t)
        if not self.replicated and failures.per_replica(unseen).any():
            raise RuntimeError(
                f"iteration {t}: no finite curvature, now or earlier, of {failures.names(unseen, self.stacks)}. "
                f"{failures.why_not_finite()}"
            )
        if not self.replicated and damping == 0 and failures.per_replica(singular).any():
            raise RuntimeError(
                f"iteration {t}: the curvature of {failures.names(singular, self.stacks)} is singular, and there is "
                "no earlier inverse: raise damping above zero"
            )
        self.diverged |= failures.per_replica(unseen) > 0
        for stack in self.stacks:
            for position, index in enumerate(stack.index.tolist()):
                self.ready[index] = bool(stack.blocks.attempted[position])

    # -- gradients to updates -----------------------------------------------------------------------

    def gradients(self) -> tuple[Blocks, list[bool]]:
        """The plain gradients, and which layers take part in this step."""
        active = [
            self.ready[i]
            and i not in self.plain
            and layer.weight.requires_grad
            and layer.weight.grad is not None
            for i, layer in enumerate(self.layers)
        ]
        return [stack.gradients(active) for stack in self.stacks], active

    def precondition(self, gradients: Blocks, active: list[bool]) -> Blocks:
        """Eq. 4, and eq. 6 with a coarse space."""
        updates = [stack.precondition(g, active) for stack, g in zip(self.stacks, gradients, strict=True)]
        if self.coarse is None or not updates:
            return updates
        corrections, diagnostics = coarse_corrections(self.coarse, self.stacks, updates, gradients, active)
        self.diagnostics |= diagnostics
        return [u.add_(c) for u, c in zip(updates, corrections, strict=True)]

    def clip(self, updates: Blocks, gradients: Blocks, lrs: Sequence[float], kl_clip: float | None) -> None:
        """Scale the updates by ν, in place (eq. 10); ``lrs`` are the parameter groups' η."""
        if kl_clip is None or not updates:
            self.diagnostics["nu"] = self.layers[0].weight.new_ones(self.replicas, dtype=self.layers[0].dtype)
            return
        squared_lrs = updates[0].new_tensor(lrs).square()
        per_layer = [
            (u * g).mul_(squared_lrs[stack.groups]).sum((-2, -1)).abs()
            for stack, u, g in zip(self.stacks, updates, gradients, strict=True)
        ]
        nu = kl_clip_factor(torch.cat(per_layer).sum(0), kl_clip)
        for update in updates:
            update *= matrices(nu)
        self.diagnostics["nu"] = nu

    def split(self, updates: Blocks, active: list[bool]) -> dict[int, Tensor]:
        """The updates shaped like their parameters, by parameter ``id``."""
        pieces: dict[int, Tensor] = {}
        for stack, update in zip(self.stacks, updates, strict=True):
            pieces |= stack.split(update, active)
        return pieces

    # -- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "layers": self.allocation.state_dict(),
            "ready": list(self.ready),
            "plain": {self.layers[i].name: reason for i, reason in self.plain.items()},
            "coarse": None if self.coarse is None else self.coarse.state_dict(),
            "diverged": self.diverged.clone(),
            **{kind: count.clone() for kind, count in self.failures.counts.items()},
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` where the state is another model's or another kind of optimizer's."""
        self.allocation.check_state_dict(state["layers"])
        if (self.coarse is None) != (state["coarse"] is None):
            raise ValueError("one of the state and the optimizer has a coarse space, the other has none")
        if self.coarse is not None:
            self.coarse.check_state_dict(state["coarse"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checked state."""
        if self.coarse is not None:
            self.coarse.load_state_dict(state["coarse"])
        self.allocation.load_state_dict(state["layers"])
        self.iteration, self.ready = state["iteration"], list(state["ready"])
        saved = state.get("plain", {})
        self.plain.clear()
        self.plain.update(
            {i: saved[layer.name] for i, layer in enumerate(self.layers) if layer.name in saved}
        )
        self.diverged = state["diverged"].cpu().clone()
        self.failures.load(state)
        self.discard_sample()

    def _note_outside(self, inside: Iterable[int], left_out: dict[int, str]) -> None:
        news = left_out.keys() - self.outside_coarse.keys()
        self.outside_coarse = {i: why for i, why in self.outside_coarse.items() if i not in inside} | left_out
        if not news or self._told_outside:
            return
        self._told_outside = True
        lines = "; ".join(f"{self.layers[i].name}: {why}" for i, why in sorted(left_out.items()))
        warnings.warn(
            f"no coarse correction for {len(left_out)} of {len(self.layers)} layers, whose samples are "
            f"not found ({lines}). Say where they are with batch_axis={{name: axis}}",
            RuntimeWarning,
            stacklevel=4,
        )
