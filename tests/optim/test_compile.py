"""Compiled models: compiled graphs in ordinary iterations, eager capture in those that refresh the curvature."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loop import FACTORS, INVERSES, assert_close, batch, build, each_optimizer, network, train
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC

STEPS = 2 * INVERSES + 1


class Net(nn.Module):
    """The same layers in a class of its own, whose hooks dynamo runs rather than traces."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Backend:
    """Runs the graphs as they are, and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def call(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return call


def wrapped(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, **options)  # pyright: ignore


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def around(model: nn.Module, **options: Any) -> nn.Module:
    return wrapped(nn.Sequential(nn.Identity(), model), **options)


def in_parts(model: nn.Module, **options: Any) -> nn.Module:
    layers = model.layers if isinstance(model, Net) else model
    assert isinstance(layers, nn.Sequential)
    layers[3] = wrapped(layers[3], **options)
    return model


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@each_optimizer
@pytest.mark.parametrize("make", [network, Net], ids=["container", "class"])
@pytest.mark.parametrize("way", [wrapped, in_place, in_parts], ids=["wrapped", "in place", "in parts"])
def test_ordinary_steps_run_one_graph_and_refreshes_none(
    kind: type[KFAC], way: Callable[..., nn.Module], make: Callable[[], nn.Module]
) -> None:
    backend, model = Backend(), make()
    called = way(model, backend=backend, fullgraph=True)
    optimizer = build(kind, called)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, optimizer, STEPS, call=called.__call__)
    assert backend.graphs == 1
    assert backend.calls == STEPS - len(range(0, STEPS, FACTORS))
    assert not torch._dynamo.utils.counters["graph_break"]
    twin = make()
    train(twin, build(kind, twin), STEPS)
    assert_close(model, twin)


def test_names_are_those_of_the_plain_model() -> None:
    plain, compiled = build(KFAC, network()), build(KFAC, wrapped(network(), backend="eager"))
    parts = build(KFAC, in_parts(network(), backend="eager"), exclude=["3"])
    assert compiled.coverage == plain.coverage
    assert [line.parameter for line in parts.coverage] == [line.parameter for line in plain.coverage]
    assert [line.preconditioned for line in parts.coverage if line.parameter == "3.weight"] == [False]
    state = plain.state_dict()
    compiled.load_state_dict(state)


def test_parts_may_be_compiled_after_the_optimizer_is_built() -> None:
    backend, model = Backend(), network()
    optimizer = build(TwoLevelKFAC, model)
    in_parts(model, backend=backend)
    train(model, optimizer, STEPS)
    twin = network()
    train(twin, build(TwoLevelKFAC, twin), STEPS)
    assert_close(model, twin)
    assert backend.graphs == 1


def test_one_graph_at_any_price_needs_the_stance_where_it_is_compiled_afterwards() -> None:
    backend, model, twin = Backend(), network(), network()
    optimizer = build(TwoLevelKFAC, model)
    called = wrapped(model, backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match="disable"):  # dynamo's
        called(batch(0)[0])

    def by_hand(x: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager" if optimizer.refresh_is_due else "default"):
            return called(x)

    train(model, optimizer, STEPS, call=by_hand)
    train(twin, build(TwoLevelKFAC, twin), STEPS)
    assert_close(model, twin)
    assert backend.graphs == 1


def test_what_ends_in_a_refresh_leaves_everything_compiled() -> None:
    """A pass that raises, an evaluation, an optimizer that is detached or gone."""
    backend, model = Backend(), network()
    called = wrapped(model, backend=backend)
    optimizer = build(KFAC, called)
    x, _ = batch(0)
    with pytest.raises(RuntimeError):
        called(x[:, 1:])
    with torch.no_grad():
        called(x)
    assert backend.calls == 1
    optimizer.detach()
    called(x)
    assert backend.calls == 2
    optimizer = build(KFAC, called)
    called(x)
    assert backend.calls == 2
    del optimizer
    called(x)
    assert backend.calls == 3


def test_a_copy_of_a_compiled_model_captures_nothing() -> None:
    model = in_place(network(), backend="eager")
    optimizer = build(KFAC, model)
    duplicate = copy.deepcopy(model)
    output = duplicate(batch(0)[0])
    with pytest.raises(RuntimeError, match="no preconditioned layer"):
        optimizer.update_curvature(output)


def test_a_model_that_was_not_compiled_yet_keeps_nothing() -> None:
    """Of two optimizers, of which one is detached and one gone; copies of it have their own calls."""
    model = network()
    first, second = build(KFAC, model), build(KFAC, model)
    assert copy.deepcopy(model)._compiled_call_impl is None
    first.detach()
    output = model(batch(0)[0])
    second.update_curvature(output)
    del second
    assert model._compiled_call_impl is None


@pytest.mark.slow
@each_optimizer
def test_the_default_compiler_trains_alike(kind: type[KFAC]) -> None:
    model, twin = Net(), Net()
    called = wrapped(model)
    train(model, build(kind, called), STEPS, call=called.__call__)
    train(twin, build(kind, twin), STEPS)
    assert_close(model, twin, rtol=1e-7)


@each_optimizer
@pytest.mark.parametrize("make", [network, Net], ids=["container", "class"])
@pytest.mark.parametrize("way", [wrapped, in_place, around], ids=["wrapped", "in place", "around"])
def test_a_whole_model_may_be_compiled_after_the_optimizer_is_built(
    kind: type[KFAC], way: Callable[..., nn.Module], make: Callable[[], nn.Module]
) -> None:
    backend, model, twin = Backend(), make(), make()
    optimizer = build(kind, model)
    called = way(model, backend=backend)
    optimizer.zero_grad()
    train(model, optimizer, 2, call=called.__call__)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, optimizer, STEPS - 2, first=2, call=called.__call__)
    assert backend.graphs == 1
    assert backend.calls == STEPS - len(range(0, STEPS, FACTORS))
    assert dict(torch._dynamo.utils.counters["graph_break"]) == breaks
    train(twin, build(kind, twin), STEPS)
    assert_close(model, twin)
