"""What K-FAC remembers of the curvature, and how it turns gradients into updates."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfac2.curvature import CoarseSpace, kl_clip_factor, ratio_factor
from kfac2.curvature.averages import decay_at, matrices
from kfac2.optim.distributed import Flags, Processes
from kfac2.optim.layers import Layer
from kfac2.optim.memory import diagonal_notes, layer_bytes, warn_of_little_memory
from kfac2.optim.observation import Batch, Observation, Observations
from kfac2.optim.stacks import LayerStack, blocks_for, make_stacks, regrouped

Blocks = list[Tensor]
"""One tensor ``(n, R, d_out, d_in)`` per stack of layers."""


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
        self._inverse = inverse
        self._group_of = {p: k for k, group in enumerate(param_groups) for p in group["params"]}
        self.stacks: list[LayerStack] = []
        if coarse is not None:
            shapes = [layer.matrix_shape for layer in layers]
            coarse.bind(shapes, self.replicas, layers[0].weight.device)
            coarse.averaged = frozenset(i for i, layer in enumerate(layers) if layer.reduces)
        self.iteration = 0
        self.ready = [False] * len(layers)
        self.plain: dict[int, str] = {}
        self.diverged = torch.zeros(self.replicas, dtype=torch.bool)
        self.failures = {
            name: torch.zeros(self.replicas, dtype=torch.int64)
            for name in ("rejected_samples", "failed_inverses")
        }
        self.diagnostics: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        outside = {i: layer.outside_coarse for i, layer in enumerate(layers) if coarse is not None}
        self.outside_coarse = {i: why for i, why in outside.items() if why is not None}
        """Layers that the coarse space has to do without, and why."""
        self._observations = Observations()
        self._batch: Batch | None = None

    def has_trainable_layer(self) -> bool:
        return any(layer.weight.requires_grad for i, layer in enumerate(self.layers) if i not in self.plain)

    def unseen_layers(self) -> list[int]:
        """After the first refresh of the factors, the layers that none has seen though they could be."""
        attempted = {
            i
            for stack in self.stacks
            for i, seen in zip(stack.positions, stack.blocks.attempted.tolist(), strict=True)
            if seen
        }
        return sorted(self._trainable() - attempted) if attempted else []

    def memory(self) -> int:
        """Bytes of the factors, their inverses and the coarse matrices, allocated or to be allocated."""
        coarse = {} if self.coarse is None else self.coarse.state_dict()
        layers = [self.layers[i] for i in self._allocated() | self._trainable()]
        own = sum(layer_bytes(layer, self._inverse) for layer in layers)
        return own + sum(x.nbytes for x in coarse.values() if isinstance(x, Tensor))

    def allocate(self, observed: Iterable[int] = ()) -> None:
        """Make room for the layers ``observed`` or trainable that have none yet."""
        old, allocated = self.stacks, self._allocated()
        missing = self._trainable().union(observed) - allocated
        if not missing:
            return
        self._make_stacks(allocated | missing, self._states())
        self._observations.regroup(partial(regrouped, old=old, new=self.stacks))

    def notes(self) -> dict[int, list[str]]:
        """What is special about layers, by position."""
        notes = {i: diagonal_notes(layer) for i, layer in enumerate(self.layers)}
        for i, why in self.outside_coarse.items():
            notes[i].append(f"outside the coarse space: {why}")
        return notes

    def _trainable(self) -> set[int]:
        return {i for i, layer in enumerate(self.layers) if layer.weight.requires_grad} - self.plain.keys()

    def _allocated(self) -> set[int]:
        return {i for stack in self.stacks for i in stack.positions}

    def _make_stacks(self, chosen: Iterable[int], states: Mapping[str, dict[str, Any]]) -> None:
        """Stacks of the ``chosen`` layers, which go on from their ``states``, if they have one."""
        chosen = sorted(chosen)
        new = set(chosen) - self._allocated()
        warn_of_little_memory([self.layers[i] for i in chosen if i in new], self._inverse)
        self.stacks = make_stacks(self.layers, chosen, self._group_of, self._inverse)
        for stack in self.stacks:
            own = [states.get(layer.name, {}) for layer in stack.layers]
            if any(own):
                stack.blocks.load([state or stack.blocks.state(k) for k, state in enumerate(own)])

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

    def observe(self, index: int, inputs: Tensor, gradients: Tensor, samples: int, call: int = 0) -> None:
        """Add one call of a layer, its input and output gradient, to the batch under way.

        Calls of one layer may come in any order if ``call`` grows from one to the next.
        """
        if self._batch is None:
            self._batch = Batch(self.layers, self.coarse, samples)
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
        self._count("rejected_samples", rejected)

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

    def refresh_inverses(self, damping: float) -> None:
        """Recompute all inverses; one that fails leaves its predecessor in place, or without one plain steps.

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
        self._count("failed_inverses", failed)
        if not self.replicated and self._per_replica(unseen).any():
            raise RuntimeError(
                f"iteration {self.iteration + 1}: no finite curvature, now or earlier, of {self._names(unseen)}. "
                f"{self._why_not_finite()}"
            )
        if damping == 0 and not self.replicated and self._per_replica(singular).any():
            raise RuntimeError(
                f"iteration {self.iteration + 1}: the curvature of {self._names(singular)} is singular, and there is "
                "no earlier inverse: raise damping above zero"
            )
        self.diverged |= self._per_replica(unseen) > 0
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
        blocks = [(stack.index, g) for stack, g in zip(self.stacks, gradients, strict=True)]
        coefficients = self.coarse.solve(self.coarse.restrict(blocks))
        corrections = [
            stack.masked(correction, active)
            for stack, correction in zip(self.stacks, self.coarse.prolong(coefficients, blocks), strict=True)
        ]
        own, norm = _squared_norm(corrections, like=updates), _squared_norm(updates, like=updates)
        ratio = torch.where(own == 0, own, own / norm).sqrt()
        if self.coarse.max_ratio is not None:
            factor = matrices(ratio_factor(ratio, self.coarse.max_ratio))
            corrections = [correction * factor for correction in corrections]
            ratio = ratio.clamp(max=self.coarse.max_ratio)
        self.diagnostics["coarse_ratio"] = ratio
        negative = self.coarse.negative_eigenvalues
        self.diagnostics["coarse_indefinite"] = (negative > 0).to(own.dtype)
        self.diagnostics["coarse_negative"] = negative.to(own.dtype)
        return [u + c for u, c in zip(updates, corrections, strict=True)]

    def clip(self, updates: Blocks, gradients: Blocks, lrs: Sequence[float], kl_clip: float | None) -> None:
        """Scale the updates by ν, in place (eq. 10); ``lrs`` are the parameter groups' η."""
        if kl_clip is None or not updates:
            self.diagnostics["nu"] = self.layers[0].weight.new_ones(self.replicas, dtype=self.layers[0].dtype)
            return
        squared_lrs = updates[0].new_tensor(lrs).square()
        per_layer = [
            (u * g * squared_lrs[stack.groups]).sum((-2, -1)).abs()
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
        states = self._states()
        return {
            "iteration": self.iteration,
            "layers": {layer.name: states.get(layer.name) or self._nothing(layer) for layer in self.layers},
            "ready": list(self.ready),
            "plain": {self.layers[i].name: reason for i, reason in self.plain.items()},
            "coarse": None if self.coarse is None else self.coarse.state_dict(),
            "diverged": self.diverged.clone(),
            **{name: count.clone() for name, count in self.failures.items()},
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` where the state is another model's or another kind of optimizer's."""
        names, saved = {layer.name for layer in self.layers}, set(state["layers"])
        if names != saved:
            differing = ", ".join(sorted(names ^ saved))
            raise ValueError(f"the state was saved with other layers; they differ in: {differing}")
        if (self.coarse is None) != (state["coarse"] is None):
            raise ValueError("one of the state and the optimizer has a coarse space, the other has none")
        if self.coarse is not None:
            self.coarse.check_state_dict(state["coarse"])
        for layer in self.layers:
            own = state["layers"][layer.name]
            if _is_allocated(own):
                blocks_for(layer, 1, "meta", self._inverse).check_state(layer.name, own)
            elif own != self._nothing(layer):
                raise ValueError(
                    f"layer {layer.name!r} was saved with another shape or another `inverse`: "
                    f"{own}, not {self._nothing(layer)}"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checked state."""
        if self.coarse is not None:
            self.coarse.load_state_dict(state["coarse"])
        states = {name: own for name, own in state["layers"].items() if _is_allocated(own)}
        # An older state has room for frozen layers too, which have never been observed.
        at_work = [
            i
            for i, layer in enumerate(self.layers)
            if layer.name in states and (layer.weight.requires_grad or states[layer.name]["attempted"])
        ]
        self._make_stacks(at_work, states)
        self.iteration, self.ready = state["iteration"], list(state["ready"])
        saved = state.get("plain", {})
        self.plain.clear()
        self.plain.update(
            {i: saved[layer.name] for i, layer in enumerate(self.layers) if layer.name in saved}
        )
        self.diverged = state["diverged"].cpu().clone()
        for name, count in self.failures.items():
            # An older state has one number for all replicas: any of them may be concerned.
            self.failures[name] = torch.zeros_like(count) + torch.as_tensor(state[name]).cpu()
        self.discard_sample()

    def _states(self) -> dict[str, dict[str, Any]]:
        """What is remembered of the layers in ``stacks``, by name."""
        return {
            layer.name: stack.blocks.state(k) for stack in self.stacks for k, layer in enumerate(stack.layers)
        }

    def _nothing(self, layer: Layer) -> dict[str, Any]:
        """The state of a layer that takes no memory yet: enough to refuse another model's."""
        return {"shape": list(layer.matrix_shape), "inverse": self._inverse}

    # -- small helpers ------------------------------------------------------------------------------

    def _note_outside(self, inside: Iterable[int], left_out: dict[int, str]) -> None:
        news = left_out.keys() - self.outside_coarse.keys()
        self.outside_coarse = {i: why for i, why in self.outside_coarse.items() if i not in inside} | left_out
        if not news or "outside" in self._warned:
            return
        self._warned.add("outside")
        lines = "; ".join(f"{self.layers[i].name}: {why}" for i, why in sorted(left_out.items()))
        warnings.warn(
            f"no coarse correction for {len(left_out)} of {len(self.layers)} layers, whose samples are "
            f"not found ({lines}). Say where they are with batch_axis={{name: axis}}",
            RuntimeWarning,
            stacklevel=4,
        )

    def _count(self, failure: str, bad: Blocks) -> None:
        """Add to ``failures``; the first of a kind is a warning that names what is concerned and a remedy."""
        numbers = self._per_replica(bad)
        self.failures[failure] = self.failures[failure] + numbers
        if not numbers.any() or failure in self._warned:
            return
        self._warned.add(failure)
        if failure == "rejected_samples":
            what, remedy = "curvature samples were not finite", self._why_not_finite()
            instead = "what was there before stays in use"
        else:
            what = "inverses could not be computed, although the statistics are finite"
            instead = "the earlier ones stay in use, and a layer without one takes plain steps"
            remedy = "Raise damping, or leave the layers to plain SGD with exclude=[...]"
        warnings.warn(
            f"iteration {self.iteration + 1}: {int(numbers.sum())} {what} ({self._names(bad)}); {instead}. {remedy}. "
            f"Counted in {failure} from now on, without another warning",
            RuntimeWarning,
            stacklevel=5,
        )

    def _per_replica(self, bad: Blocks) -> Tensor:
        """How many, ``(R,)``; a layer in row blocks counts once."""
        if not bad:
            return torch.zeros(self.replicas, dtype=torch.int64)
        layers = [torch.atleast_2d(b).unflatten(1, (self.replicas, -1)).amax(-1) for b in bad]
        return torch.stack([of_stack.sum(0) for of_stack in layers]).sum(0).cpu()

    def _names(self, bad: Blocks, most: int = 5) -> str:
        """The layers in ``bad``, one ``(n, R)`` per stack and, last, the coarse space's ``(R,)``."""
        index = [stack.index[b.any(1)] for stack, b in zip(self.stacks, bad, strict=False)]
        names = [self.layers[i].name for i in torch.cat(index).sort().values.tolist()]
        listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
        parts = [f"layers {listed}"] if names else []
        if len(bad) > len(self.stacks) and bad[-1].any():
            parts.append("the coarse matrix")
        replicas = self._per_replica(bad).nonzero().flatten().tolist()
        return " and ".join(parts) + (f" in replicas {replicas}" if self.replicated else "")

    def _why_not_finite(self) -> str:
        if all(p.isfinite().all() for layer in self.layers for p in layer.parameters):
            return (
                "The layers' parameters are finite: check the batch and the loss for values that are NaN, infinite "
                "or too large to be squared"
            )
        return "Parameters are not finite themselves: go back to a sound checkpoint, with a lower lr or more damping"


def _is_allocated(state: dict[str, Any]) -> bool:
    return "attempted" in state


def _squared_norm(blocks: Blocks, like: Blocks) -> Tensor:
    """Of ``blocks`` broadcast to the shapes of ``like``, per replica: ``(R,)``."""
    norms = [
        block.square().sum((-2, -1)) * (full[0, 0].numel() / block[0, 0].numel())
        for block, full in zip(blocks, like, strict=True)
    ]
    return torch.cat(norms).sum(0)
