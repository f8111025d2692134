"""Hooks that leave no trace: not on copies of a model, and on its layers only while they are wanted."""

import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks,
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
)

from kfac2.optim.compiled import COMPILED_AFTERWARDS


class Hook:
    """A hook that belongs to one model: a copy or a pickle of it does nothing, nor has it any part in a
    compiled or exported graph."""

    def __init__(self, method: weakref.WeakMethod | None = None, module: nn.Module | None = None):
        self.method, self.module = method, None if module is None else weakref.ref(module)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        method = self.method() if self.method is not None else None
        if method is not None and self.module is not None and self.module() is module:
            method(module, *args)

    def __deepcopy__(self, memo: Any) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()


Follower = Callable[[nn.Module, int, Any, Any, Any], None]
"""Called with a module, the sequence number of its first autograd node, its arguments and its output."""


class StandIn:
    """Stands in for a layer's ``forward``: runs it and tells the followers, before torch's own hooks.

    Those may replace the output. A copy or a pickle of the layer has its plain ``forward``.
    """

    def __init__(self, module: nn.Module):
        self.module, self.followers = module, list[Follower]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"K-FAC cannot capture inside a compiled call: {COMPILED_AFTERWARDS}")
        first = next_sequence_number()
        output = type(self.module).forward(self.module, *args, **kwargs)
        for follower in self.followers:
            follower(self.module, first, args, kwargs, output)
        return output

    def __reduce__(self) -> tuple[Any, tuple[nn.Module, str]]:
        return getattr, (self.module, "forward")

    def remove(self, follower: Follower) -> None:
        self.followers.remove(follower)
        if not self.followers and vars(self.module).get("forward") is self:
            del self.module.forward


def next_sequence_number() -> int:
    """Of this thread's next autograd node."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]


def follow(module: nn.Module, follower: Follower) -> Callable[[], None]:
    """Call ``follower`` after each forward of ``module``, until the returned function is called."""
    standing = vars(module).get("forward")
    stand_in = standing if isinstance(standing, StandIn) else StandIn(module)
    stand_in.followers.append(follower)
    vars(module)["forward"] = stand_in
    return partial(stand_in.remove, follower)


def follow_running(model: nn.Module, follower: Follower) -> Callable[[], None]:
    """The same for a model that is one layer and called already: torch has looked up its ``forward``."""
    first = next_sequence_number()

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is model:
            follower(module, first, args, kwargs, output)

    handle = register_module_forward_hook(after, with_kwargs=True)
    _global_forward_hooks.move_to_end(handle.id, last=False)  # pyright: ignore[reportAttributeAccessIssue]

    def undo() -> None:
        handle.remove()
        _global_forward_hooks_with_kwargs.pop(handle.id, None)  # which torch forgets

    return undo


def calls_under_way(module: nn.Module) -> int:
    """How often the module stands on this thread's stack."""
    frame, number = sys._getframe(), 0
    while frame is not None:
        number += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module
        frame = frame.f_back
    return number


def has_own_forward(module: nn.Module) -> bool:
    """Whether its ``forward`` is that of its class, stand-ins aside."""
    forward = vars(module).get("forward")
    if forward is None or isinstance(forward, StandIn):
        return True
    return forward == MethodType(type(module).forward, module)  # a copy's, made during a forward pass
