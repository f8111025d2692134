"""Models under ``torch.compile``: compiled in ordinary iterations, eager in those that refresh the curvature."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

COMPILED_AFTERWARDS = (
    "the model was compiled after the optimizer was built: build it from the compiled model, "
    "KFAC(torch.compile(model), ...), or run the forward pass under torch.compiler.set_stance('force_eager') "
    "while optimizer.refresh_is_due"
)


class Entrance:
    """Stands before a compiled call, which is made eagerly while ``due()``."""

    def __init__(self, call: Callable[..., Any], due: Callable[[], bool]):
        self.call, self.due = call, due

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.due():
            return self.call(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return self.call(*args, **kwargs)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(model)`` is made of, or the module itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def run_eagerly(model: nn.Module, due: Callable[[], bool]) -> None:
    """Make a compiled model run eagerly while ``due()``; copies and pickles of it are without this."""
    if uncompiled(model) is not model:
        model.forward = Entrance(model.forward, due)
    inner = uncompiled(model)
    if inner._compiled_call_impl is not None:
        inner._compiled_call_impl = Entrance(inner._compiled_call_impl, due)


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
