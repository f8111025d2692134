"""What one batch shows of the curvature, and which batches count at the next refresh.

A batch counts with its gradients. What the training loop throws away (a gradient scaler skips the step, a
bad loss is not back-propagated, gradients are zeroed) must leave no trace in the next sample, while batches
whose gradients are added up are added up too.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from kfac2.curvature import CoarseSpace
from kfac2.curvature.coarse import CoarseSample
from kfac2.curvature.grams import Maps
from kfac2.optim.layers import Layer, Moments, Totals
from kfac2.optim.samples import batch_axis, joined_maps, reduced_moments, samples_first
from kfac2.optim.stacks import StackSample


class Batch:
    """One batch of ``samples`` samples while its layers' calls come in, in any order.

    ``ignoring``: some of the output's terms do not count in the loss.
    """

    def __init__(
        self, layers: Sequence[Layer], coarse: CoarseSpace | None, samples: int, ignoring: bool = False
    ):
        self.layers, self.coarse, self.samples, self.ignoring = layers, coarse, samples, ignoring
        self._moments: dict[int, Moments] = {}
        self._totals: dict[int, list[tuple[int, Totals]]] = {}
        self._maps: dict[int, list[tuple[int, tuple[int, ...], Tensor, Tensor]]] = {}
        self._not_found: dict[int, str] = {}

    def observe(self, index: int, inputs: Tensor, gradients: Tensor, call: int) -> None:
        """One call of a layer; ``call`` grows from one call to the next."""
        layer = self.layers[index]
        axes = layer.axes(inputs)
        if layer.reduces:
            self._reduce(index, inputs, gradients, call)
        else:
            rows = layer.counting_rows(inputs, gradients) if self.ignoring else (inputs, gradients)
            moments = layer.moments(*rows).reduced_to(layer.diagonal)
            self._moments[index] = moments.plus(self._moments.get(index))
        if self.coarse is not None and layer.outside_coarse is None:
            maps = layer.maps(inputs, gradients, self.coarse.basis(index))
            self.coarse.look_at(index, inputs, gradients)
            self._maps.setdefault(index, []).append((call, axes, *maps))

    def _reduce(self, index: int, inputs: Tensor, gradients: Tensor, call: int) -> None:
        layer = self.layers[index]
        axes = layer.axes(inputs)
        axis = batch_axis([axes], self.samples, layer.batch_axis)
        if axis is None:
            self._not_found[index] = self._where([axes])
        else:
            self._totals.setdefault(index, []).append((call, layer.totals(inputs, gradients, axis)))

    def moments(self) -> dict[int, Moments]:
        """Of each observed layer, its calls added up; the batch holds them no more.

        Raises:
            ValueError: K-FAC-reduce, and the samples of a layer are not found in its calls.
        """
        reduced: dict[int, Moments] = {}
        for index, calls in self._totals.items():
            moments = reduced_moments(
                [totals for _, totals in _in_order(calls)], self.samples, self.layers[index].diagonal
            )
            if moments is None:
                self._not_found[index] = self._where([(totals.a.shape[-1],) for _, totals in calls])
            else:
                reduced[index] = moments
        if self._not_found:
            raise ValueError(
                "weight_sharing='reduce' needs to know the batch axis of "
                + "; ".join(f"layer {self.layers[i].name!r}: {why}" for i, why in self._not_found.items())
                + ". Say where the samples are with batch_axis={name: axis}, or take "
                "weight_sharing={name: 'expand'}"
            )
        moments, self._moments = self._moments | reduced, {}
        return moments

    def maps(self) -> tuple[Maps, dict[int, str]]:
        """The coarse space's α and γ, and why a layer has none: its samples are not found in its calls."""
        maps: Maps = {}
        left_out: dict[int, str] = {}
        for index, unordered in self._maps.items():
            calls = _in_order(unordered)
            axes = [axes for _, axes, _, _ in calls]
            axis = batch_axis(axes, self.samples, self.layers[index].batch_axis)
            alpha, gamma = (self._joined([call[k] for call in calls], axis) for k in (2, 3))
            if alpha is None or gamma is None:
                left_out[index] = self._where(axes)
            else:
                maps[index] = alpha, gamma
        return maps, left_out

    def _joined(self, calls: Sequence[Tensor], axis: int | None) -> Tensor | None:
        if axis is None:
            return None
        return joined_maps([samples_first(x, axis, self.samples) for x in calls], self.samples)

    def _where(self, calls: Sequence[tuple[int, ...]]) -> str:
        shapes = " and ".join(str(axes) for axes in dict.fromkeys(calls))
        return f"the batch's {self.samples} samples are not to be told from the sizes {shapes} of its calls"


class Observation:
    """One batch, or several whose gradients were added up: a sample for each stack of layers, and the coarse one."""

    def __init__(self, stacks: Sequence[StackSample], coarse: CoarseSample | None):
        self.stacks, self.coarse = stacks, coarse
        self.used = False
        """The training loss has been back-propagated through the batch's graph."""
        self.survived = False
        """Gradients have been zeroed since, before the training loss was back-propagated."""
        self._hook: Callable[[], Any] = lambda: None

    def follow(self, nodes: Iterable[Node]) -> None:
        """Note when somebody else back-propagates through one of these nodes of the batch's graph."""
        mark = partial(_mark_used, weakref.ref(self))
        self._hook = weakref.ref(mark)
        for node in nodes:
            node.register_prehook(mark)

    def is_settled(self) -> bool:
        """The batch's graph is gone: it will not be used if it has not been."""
        return self._hook() is None

    def plus(self, other: "Observation") -> "Observation":
        stacks = [one.plus(two) for one, two in zip(self.stacks, other.stacks, strict=True)]
        coarse = self.coarse if other.coarse is None else other.coarse.plus(self.coarse)
        both = Observation(stacks, coarse)
        both.used = self.used and other.used
        return both


class Observations:
    """The batches observed since the last refresh of the factors."""

    def __init__(self) -> None:
        self._waiting: list[Observation] = []

    def add(self, new: Observation) -> None:
        """A batch that gradients were zeroed after and that was never back-propagated counts no more.

        What will count together is added up, so that no more samples are held than graphs.
        """
        used = [one for one in self._waiting if one.used]
        others = [one for one in self._waiting if not one.used and not one.survived]
        settled = [one for one in others if one.is_settled()]
        open_ones = [one for one in others if one not in settled]
        self._waiting = [*_added_up(used), *_added_up(settled), *open_ones, new]

    def forget_used(self) -> None:
        """The gradients that they belong to are gone."""
        self._waiting = [one for one in self._waiting if not one.used]

    def gradients_zeroed(self) -> None:
        self.forget_used()
        for one in self._waiting:
            one.survived = True

    def regroup(self, regrouped: Callable[[Sequence[StackSample]], Sequence[StackSample]]) -> None:
        """Follow the layers to other stacks."""
        for one in self._waiting:
            one.stacks = regrouped(one.stacks)

    def take(self) -> Observation | None:
        """What counts: the batches whose training loss was back-propagated, or else all."""
        counting = [one for one in self._waiting if one.used] or self._waiting
        self._waiting = []
        return next(iter(_added_up(counting)), None)

    def clear(self) -> None:
        self._waiting = []


_sampling = 0


@contextmanager
def sampled_backward() -> Iterator[None]:
    """The back-propagation of a sampled loss, which makes no observation of another optimizer a used one."""
    global _sampling  # read in the engine's threads
    _sampling += 1
    try:
        yield
    finally:
        _sampling -= 1


def _mark_used(observation: weakref.ref[Observation], gradients: Any) -> None:
    one = observation()
    if one is not None and not _sampling:
        one.used = True


def _added_up(observations: Sequence[Observation]) -> list[Observation]:
    """All of them in one, or none."""
    total: Observation | None = None
    for one in observations:
        total = one if total is None else total.plus(one)
    return [] if total is None else [total]


def _in_order(calls: Sequence[Any]) -> list[Any]:
    return sorted(calls, key=lambda call: call[0])
