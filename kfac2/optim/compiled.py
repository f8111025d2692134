"""Models under ``torch.compile``: compiled in ordinary iterations, eager in those that refresh the curvature."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

COMPILED_AFTERWARDS = (
    "the model was compiled after the optimizer was built, with fullgraph=True or without zero_grad() before this "
    "pass: build the optimizer from the compiled model, KFAC(torch.compile(model), ...), or run the forward pass under "
    "torch.compiler.set_stance('force_eager') while optimizer.refresh_is_due"
)


def is_exporting() -> bool:
    """Older torch cannot tell."""
    return getattr(torch.compiler, "is_exporting", bool)()


class Entrance:
    """Stands before a compiled call, which is made eagerly while ``due()``."""

    def __init__(self, call: Callable[..., Any], due: Callable[[], bool]):
        self.call, self.due = call, due

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.due():
            return self.call(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return self.call(*args, **kwargs)


class Bypass:
    """Stands where torch keeps a module's compiled call, and leads around dynamo while a refresh is due.

    So the model may be compiled later, as a whole. Dynamo guards ``due``: an ordinary call is one graph, and what
    is traced while it is due is that it is not traced. Copies and pickles of the model are without it.
    """

    def __init__(self, model: nn.Module):
        self.model, self.call = model, model._compiled_call_impl or model._call_impl
        self.eager: Callable[..., Any] | None = None
        self.due, self.removed = False, False
        model._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.due and self.eager is not None and torch.is_grad_enabled() and not is_exporting():
            return self.eager(*args, **kwargs)
        return self.call(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def look_ahead(self, due: bool, still_due: Callable[[], bool]) -> None:
        """Before the model's next call; one that was compiled in its place meanwhile runs eagerly while due."""
        if self.eager is None and "torch._dynamo" in sys.modules:  # which takes seconds to import
            self.eager = torch.compiler.disable(self._run)
        self.due = due
        standing = self.model._compiled_call_impl
        if standing is not None and not isinstance(standing, Bypass | Entrance):
            self.model._compiled_call_impl = Entrance(standing, still_due)

    def remove(self) -> None:
        self.due, self.removed = False, True
        standing = self.model._compiled_call_impl
        while isinstance(standing, Bypass) and standing.removed:
            standing = standing.call
        self.model._compiled_call_impl = None if standing == self.model._call_impl else standing


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(model)`` is made of, or the module itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(module: nn.Module) -> bool:
    call = module._compiled_call_impl
    return hasattr(module, "_orig_mod") or not (call is None or isinstance(call, Bypass))


def run_eagerly(model: nn.Module, due: Callable[[], bool]) -> Bypass | None:
    """Make a compiled model run eagerly while ``due()``, and a plain one if it is compiled later; copies and pickles of
    it are without this."""
    if not is_compiled(model):
        return Bypass(model)
    if uncompiled(model) is not model:
        model.forward = Entrance(model.forward, due)
    inner = uncompiled(model)
    if inner._compiled_call_impl is not None:
        inner._compiled_call_impl = Entrance(inner._compiled_call_impl, due)
    return None


def eager_until() -> Callable[[], None]:
    """Run everything that is compiled eagerly until the returned function is called.

    Raises:
        RuntimeError: inside a compiled call.
    """
    stack = ExitStack()
    try:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    except RuntimeError:
        raise RuntimeError(COMPILED_AFTERWARDS) from None
    return stack.close
