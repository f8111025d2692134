"""Capture of layer inputs and output gradients, only in iterations that refresh the curvature.

During such a forward pass of the model, a stand-in for each layer's ``forward`` keeps the layer's input
(autograd holds it anyway) and the place of its output in the graph: the *gradient edge*, which stays right
when an in-place activation follows, where the tensor itself would not. Both lie on the graph, so any
number of calls and forward passes may stand behind one output, and what is never used dies with its
graph. The sampled loss is then back-propagated to the edges, and each gradient is handed on as it
arrives, so that no two layers' gradients are held at once.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfac2.optim.compiled import COMPILED_AFTERWARDS, eager_until, is_compiled
from kfac2.optim.distributed import without_reduction
from kfac2.optim.graph import Behind, Call, look_behind
from kfac2.optim.hooks import (
    Hook,
    calls_under_way,
    follow,
    follow_running,
    has_own_forward,
    next_sequence_number,
)
from kfac2.optim.layers import Layer

Visit = Callable[[int, Tensor, Tensor, int], None]
"""Called with a layer's position, the input and output gradient of one call, and a number that grows from
call to call; not in the order of the calls."""


class Capture:
    """Records the calls of ``layers`` inside ``model``; ``due()`` says whether a forward pass is recorded.

    ``plain`` are the layers left to plain SGD, with the reason; those whose weight turns out to have other
    uses than the layer's calls are added.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], plain: dict[int, str], due: Callable[[], bool]
    ):
        self._layers, self._plain, self._due = layers, plain, due
        self._key = object()
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._without_grad: set[int] = set()
        self._depth = 0
        begin = model.register_forward_pre_hook(Hook(weakref.WeakMethod(self._begin), model))
        self._undo: list[Callable[[], None]] = [begin.remove]
        """Takes off the hooks: that before the model's passes, that after one, and the layers'."""
        self._hide: list[Callable[[], None]] = []
        """Ends the layers' revealing, which checkpoints need that are run again in backward passes."""
        self.detach = weakref.finalize(self, _take_off_all, self._undo, self._hide)
        self.detach.atexit = False

    def release(self) -> None:
        """Let go of the inputs of all calls, though their graphs may live on."""
        _take_off(self._hide)
        for call in self._calls:
            call.inputs = None
        self._calls.clear()
        self._without_grad.clear()

    # -- the model's forward pass -------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self._depth and calls_under_way(module) > 1:  # the model calls itself
            self._depth += 1
            return
        self._depth = 0
        _take_off(self._undo, all_but=1)  # what an interrupted pass has left
        _take_off(self._hide)
        if not (_is_ordinary() and self._due()):
            return
        self._depth = 1
        end = Hook(weakref.WeakMethod(self._end), module)
        self._undo.append(module.register_forward_hook(end, always_call=True).remove)
        if any(map(is_compiled, module.modules())):
            self._undo.append(eager_until())
        for index, layer in enumerate(self._layers):
            self._hide.append(layer.reveal())
            if index not in self._plain and has_own_forward(layer.module):
                attach = follow_running if layer.module is module else follow
                self._undo.append(attach(layer.module, partial(self._record, index)))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            # Where the pass has failed, torch is walking through the hooks that this one is among.
            _take_off(self._undo, all_but=1 if sys.exc_info()[0] is None else 2)

    def _record(
        self, index: int, module: nn.Module, first: int, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        layer = self._layers[index]
        if not torch.is_grad_enabled():
            self._without_grad.add(index)
            return
        if torch._C._current_graph_task_id() != -1:  # recomputed in a backward pass: seen before
            return
        if module.weight is not layer.weight or not (layer.weight.requires_grad and output.requires_grad):
            return
        inputs = layer.input_of(args, kwargs)
        node, output_nr, *_ = get_gradient_edge(_without_view(output))
        nodes = range(first, next_sequence_number())
        call = Call(index, inputs.detach(), inputs._version, output.shape, output_nr, nodes)
        metadata: dict[Any, Any] = node.metadata  # pyright: ignore[reportAssignmentType]
        if metadata.setdefault(self._key, call) is not call:
            raise RuntimeError("two layers share one autograd node: exclude one of them")
        self._calls.add(call)

    # -- the sampled loss ---------------------------------------------------------------------------

    def backpropagate(self, loss: Tensor, visit: Visit) -> Iterable[Node]:
        """Back-propagate ``loss`` and call ``visit`` for each recorded call that it depends on.

        Returns the nodes of those calls.

        Raises:
            RuntimeError: no call can be reached, or an input is not what it was.
        """
        weights = {layer.weight: i for i, layer in enumerate(self._layers) if i not in self._plain}
        behind = look_behind(loss.grad_fn, self._key, weights)
        self._check(behind)
        self._leave_plain(behind.used_elsewhere())
        ends = {node: behind.calls[node] for node in behind.deepest}

        def arrive(call: Call, gradients: Sequence[Tensor | None]) -> None:
            self._hand_on(call, gradients[call.output_nr], visit)

        handles = [
            node.register_prehook(partial(arrive, call))
            for node, call in behind.calls.items()
            if node not in ends
        ]
        try:
            with torch.no_grad(), without_reduction(behind.data_parallel):
                # Asking for the deepest edges only makes the engine pass every other node on its way.
                edges = [GradientEdge(node, call.output_nr) for node, call in ends.items()]
                gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
                for call, gradient in zip(ends.values(), gradients, strict=True):
                    self._hand_on(call, gradient, visit)
        finally:
            for handle in handles:
                handle.remove()
        return behind.calls.keys()

    def _check(self, behind: Behind) -> None:
        hidden = self._without_grad - {call.layer for call in behind.calls.values()}
        if behind.checkpoints and (hidden or behind.checkpoint_above_call or not behind.calls):
            raise RuntimeError(
                f"reentrant activation checkpointing hides {self._named(hidden) or 'layers'}: checkpoint "
                "with use_reentrant=False (in transformers gradient_checkpointing_enable("
                "gradient_checkpointing_kwargs={'use_reentrant': False}))"
            )
        if not behind.calls:
            raise RuntimeError(
                "no preconditioned layer was found behind `output`: pass what the model's latest "
                "forward pass returned, called through the model given to the optimizer, with grad enabled. "
                f"Or {COMPILED_AFTERWARDS}"
                if self.detach.alive
                else "the optimizer was detached from its model: build a new one to train on"
            )

    def _leave_plain(self, layers: Iterable[int]) -> None:
        new = set(layers) - self._plain.keys()
        if new:
            reason = "its weight is used outside the layer's own calls"
            self._plain.update(dict.fromkeys(new, reason))
            warnings.warn(f"left to plain SGD: {self._named(new)}, because {reason}")

    def _hand_on(self, call: Call, gradient: Tensor | None, visit: Visit) -> None:
        if gradient is None or call.layer in self._plain:
            return
        name = self._layers[call.layer].name
        if call.inputs is None:
            raise RuntimeError(
                f"`output` goes back to a call of layer {name!r} before the latest step: pass the output of "
                "a forward pass after it, and detach what is carried over from one step to the next"
            )
        if call.inputs._version != call.version:
            raise RuntimeError(
                f"the input of layer {name!r} was changed in place after the layer had read it: change it "
                f"out of place, or leave the layer to plain SGD with exclude=[{name!r}]"
            )
        visit(call.layer, call.inputs, gradient.reshape(call.shape), call.nodes.start)

    def _named(self, layers: Iterable[int]) -> str:
        return ", ".join(f"layer {self._layers[index].name!r}" for index in sorted(layers))


def _is_ordinary() -> bool:
    """With grad, and neither traced nor recomputed in a backward pass."""
    traced = torch._C._get_tracing_state() is not None
    return torch.is_grad_enabled() and not traced and torch._C._current_graph_task_id() == -1


def _take_off(undo: list[Callable[[], None]], all_but: int = 0) -> None:
    while len(undo) > all_but:
        undo.pop()()


def _take_off_all(*undo: list[Callable[[], None]]) -> None:
    for each in undo:
        _take_off(each)


def _without_view(output: Tensor) -> Tensor:
    """The product that a linear layer on sequences shows as a view.

    An in-place operation on a view takes the view's own node out of the graph.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not base.requires_grad:
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
