"""Capture of layer inputs and output gradients, only in iterations that refresh the curvature.

A forward hook keeps a layer's input (autograd holds it anyway) and the *gradient edge* of its output:
the edge stays right when an in-place activation follows, where the tensor itself would not. The sampled
loss is then back-propagated to those edges, and each gradient is handed on as it arrives, so that no
two layers' gradients are held at once.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's position, its input and its output gradient."""


class Record(NamedTuple):
    inputs: Tensor
    version: int
    """Of the inputs, which must not be overwritten before they are read."""
    edge: GradientEdge
    shape: torch.Size
    """Of the output, and of its gradient."""


class Capture:
    """Hooks on ``modules`` inside ``model``; ``due()`` says whether this forward pass is to be recorded."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], modules: Sequence[nn.Module], due: Callable[[], bool]
    ):
        self.records: dict[int, Record] = {}
        self._names, self._modules, self._due = names, modules, due
        self._hooks = [
            _Hook(weakref.WeakMethod(self._record), index, weakref.ref(module))
            for index, module in enumerate(modules)
        ]
        self._handles: list[RemovableHandle] = []
        model.register_forward_pre_hook(_Hook(weakref.WeakMethod(self._begin), module=weakref.ref(model)))

    def clear(self) -> None:
        self.records = {}
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Before each forward pass of the model: forget the last one, and record this one if it is due."""
        self.clear()
        if not (torch.is_grad_enabled() and self._due()):
            return
        self._handles = [
            layer.register_forward_hook(hook, with_kwargs=True)
            for layer, hook in zip(self._modules, self._hooks, strict=True)
        ]

    def _record(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        if not module.weight.requires_grad:  # pyright: ignore[reportGeneralTypeIssues]
            return
        name = self._names[index]
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "K-FAC cannot capture inside torch.compile: train the uncompiled model, or compile the "
                "parts of it that hold no preconditioned layer"
            )
        if index in self.records:
            raise RuntimeError(
                f"layer {name!r} was called twice in one forward pass, but its Kronecker factors need "
                f"one input per sample: leave it to plain SGD with exclude=[{name!r}]"
            )
        inputs = args[0] if args else kwargs["input"]
        edge = get_gradient_edge(_without_view(output))
        self.records[index] = Record(inputs, inputs._version, edge, output.shape)

    def backpropagate(self, loss: Tensor, visit: Visit) -> set[Node]:
        """Back-propagate ``loss`` and call ``visit`` for each recorded layer that it depends on.

        Returns the layers' nodes in the graph.
        """
        captured = {record.edge.node: index for index, record in self.records.items()}
        if len(captured) < len(self.records):
            raise RuntimeError("two layers share one autograd node: exclude one of them")
        reachable, deepest = _captured_below(loss.grad_fn, captured.keys())
        if not reachable:
            raise RuntimeError(
                "no preconditioned layer was found behind `output`: pass what the model's latest "
                "forward pass returned, called through the model given to the optimizer, with grad enabled "
                "and without torch.compile"
            )

        def hand_on(index: int, gradient: Tensor) -> None:
            record = self.records[index]
            if record.inputs._version != record.version:
                name = self._names[index]
                raise RuntimeError(
                    f"the input of layer {name!r} was changed in place after the layer had read it: change it "
                    f"out of place, or leave the layer to plain SGD with exclude=[{name!r}]"
                )
            visit(index, record.inputs, gradient.reshape(record.shape))

        def arrive(index: int, gradients: Sequence[Tensor | None]) -> None:
            gradient = gradients[self.records[index].edge.output_nr]
            if gradient is not None:
                hand_on(index, gradient)

        handles = [node.register_prehook(partial(arrive, captured[node])) for node in reachable - deepest]
        ends = [captured[node] for node in deepest]
        try:
            with torch.no_grad():
                # Asking for the deepest edges only makes the engine pass every other node on its way.
                edges = [self.records[index].edge for index in ends]
                gradients = torch.autograd.grad(loss, edges, retain_graph=True)
                for index, gradient in zip(ends, gradients, strict=True):
                    hand_on(index, gradient)
        finally:
            for handle in handles:
                handle.remove()
        return reachable


def _without_view(output: Tensor) -> Tensor:
    """The product that a linear layer on sequences shows as a view.

    An in-place operation on a view takes the view's own node out of the graph.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not base.requires_grad:
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _captured_below(root: Node | None, captured: Any) -> tuple[set[Node], set[Node]]:
    """The captured nodes that ``root`` depends on, and those of them with no other one below."""
    leads: dict[Node, bool] = {}
    deepest: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, children_done = stack.pop()
        if node is None:
            continue
        if children_done:
            below = any(leads.get(child, False) for child, _ in node.next_functions)  # pyright: ignore
            leads[node] = below or node in captured
            if node in captured and not below:
                deepest.add(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions)
    return {node for node in leads if node in captured}, deepest


class _Hook:
    """A hook that belongs to one model: a copy or a pickle of it does nothing."""

    def __init__(
        self,
        method: weakref.WeakMethod | None = None,
        index: int | None = None,
        module: weakref.ref[nn.Module] | None = None,
    ):
        self.method, self.index, self.module = method, index, module

    def __call__(self, module: nn.Module, *args: Any) -> None:
        method = self.method() if self.method is not None else None
        if method is None or (self.module is not None and self.module() is not module):
            return
        method(*(() if self.index is None else (self.index,)), module, *args)

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()
