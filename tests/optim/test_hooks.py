"""What the optimizer leaves on a model and on its graphs: nothing that is not needed."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import FACTORS, INPUTS, batch, build, each_optimizer, network, same, train


def traces(model: nn.Module) -> list[str]:
    """What stands on a model between its forward passes, besides the optimizer's one hook."""
    found = [name for name, m in model.named_modules() if "forward" in vars(m) or m._forward_hooks]
    found += [name for name, m in model.named_modules() if name and m._forward_pre_hooks]
    return found + [str(hook) for hook in modules._global_forward_hooks.values()]


class Marked(nn.Module):
    """Its output's graph holds the latest mark."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.mark = body, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.mark = torch.ones((), dtype=x.dtype)
        return self.body(x) * self.mark


def test_nothing_stands_on_the_model_between_forward_passes() -> None:
    model = network()
    optimizer = build(KFAC, model)
    for _ in range(2 * FACTORS + 1):
        output = model(batch(0)[0])
        assert traces(model) == []
        with torch.no_grad():
            model(batch(0)[0])
        assert traces(model) == []
        optimizer.update_curvature(output)
        F.cross_entropy(output, batch(0)[1]).backward()
        optimizer.step()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_fails_leaves_the_model_working(error: type[BaseException]) -> None:
    class Failing(nn.Module):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise error
            return x

    model, twin = nn.Sequential(*network()[:3], Failing(), *network()[3:]), network()
    optimizer, second = build(TwoLevelKFAC, model), build(KFAC, model)
    with pytest.raises(error):
        model(batch(0)[0])
    if error is ValueError:
        assert not any("forward" in vars(m) for m in model.modules())
    Failing.fails = False
    twin.load_state_dict(network().state_dict())
    model.load_state_dict(nn.Sequential(*network()[:3], Failing(), *network()[3:]).state_dict())
    train(model, optimizer, FACTORS)
    assert traces(model) == []
    assert second.refresh_is_due
    train(twin, build(TwoLevelKFAC, twin), FACTORS)
    assert same(nn.Sequential(*model[:3], *model[4:]), twin)


@each_optimizer
def test_an_abandoned_forward_pass_dies_with_its_graph(kind: type[KFAC]) -> None:
    model = Marked(network())
    optimizer = build(kind, model)
    output = model(batch(0)[0])
    optimizer.update_curvature(output)
    graph = weakref.ref(model.mark)
    model.mark = torch.zeros(())
    assert graph() is not None
    gc.disable()
    try:
        del output
        assert graph() is None
    finally:
        gc.enable()


def test_an_input_changed_by_what_follows_makes_no_cycle() -> None:
    """Its history then leads back to the layer that has read it."""

    class Circular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(INPUTS, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return h.add_(self.last(h)) + 0

    model = Marked(Circular())
    optimizer = build(KFAC, model)
    with torch.autocast("cpu", torch.bfloat16):  # the layer reads a copy
        output = model(batch(0)[0].float())
    graph = weakref.ref(model.mark)
    model.mark = torch.zeros(())
    del output
    assert graph() is None
    assert optimizer.refresh_is_due


def test_inputs_are_let_go_at_the_step_though_the_output_lives_on() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    optimizer = build(KFAC, model)
    x, y = batch(0)
    held: list[weakref.ref[Any]] = []
    handle = model[1].register_forward_hook(
        lambda m, args, _: held.append(weakref.ref(args[0].untyped_storage()))
    )
    output = model(x)
    handle.remove()
    optimizer.update_curvature(output)
    F.cross_entropy(output, y).backward()
    calls = list(optimizer._capture._calls)
    assert len(calls) == 2
    optimizer.step()
    assert all(call.inputs is None for call in calls)
    assert output.grad_fn is not None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_during_a_forward_pass_is_free_of_the_optimizer(duplicate: Callable[[Any], Any]) -> None:
    class Copying(nn.Module):
        """Makes its target network when it is first called."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.copies = network(), []

        def forward(self, x: Tensor) -> Tensor:
            if not self.copies:
                self.copies.append(duplicate(self.body))
            return self.body(x)

    model = Copying()
    optimizer = build(KFAC, model)
    train(model, optimizer, 1)
    twin = model.copies[0]
    assert same(twin[:1], network()[:1])
    assert not same(model.body[:1], twin[:1])
    assert torch.equal(twin.eval()(batch(0)[0]), network().eval()(batch(0)[0]))
    alone, other = build(KFAC, twin.train()), network()
    assert all(line.preconditioned for line in alone.coverage if not line.parameter.startswith("1."))
    train(twin, alone, FACTORS)
    train(other, build(KFAC, other), FACTORS)
    assert same(twin, other)


# -- scripting, tracing, exporting ------------------------------------------------------------------


def scripted(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.script(model)


def traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,))


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).module()


def strictly_exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=True).module()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("how", [traced, exported, strictly_exported])
def test_a_model_is_traced_and_exported_whether_or_not_a_refresh_is_due(how: Any, steps: int) -> None:
    model, x = network(), batch(0)[0]
    optimizer = build(KFAC, model)
    train(model, optimizer, steps)
    assert optimizer.refresh_is_due == (steps == 0)
    model.eval()
    torch.testing.assert_close(how(model, x)(x), model(x))
    model.train()
    train(model, optimizer, FACTORS, first=steps)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", [scripted, traced, exported, strictly_exported])
@pytest.mark.parametrize("gone", [False, True])
def test_a_model_is_scripted_and_exported_without_its_optimizer(how: Any, gone: bool) -> None:
    model, x = network(), batch(0)[0]
    optimizer = build(TwoLevelKFAC, model)
    train(model, optimizer, FACTORS)
    if gone:
        gc.disable()
        del optimizer
        gc.enable()
    else:
        optimizer.detach()
        optimizer.detach()
    assert not model._forward_pre_hooks
    assert traces(model) == []
    model.eval()
    torch.testing.assert_close(how(model, x)(x), model(x))


def test_a_detached_optimizer_says_so() -> None:
    model = network()
    optimizer = build(KFAC, model)
    optimizer.detach()
    with pytest.raises(RuntimeError, match="was detached from its model: build a new one"):
        optimizer.update_curvature(model(batch(0)[0]))


@each_optimizer
def test_refresh_is_due_says_when_update_curvature_is_needed(kind: type[KFAC]) -> None:
    model = network()
    optimizer = build(kind, model)
    due = []
    train(model, optimizer, 2 * FACTORS, before=lambda step: due.append(optimizer.refresh_is_due))
    assert due == [step % FACTORS == 0 for step in range(2 * FACTORS)]
    model.requires_grad_(False)
    assert not optimizer.refresh_is_due
