"""Every call of a layer behind an output is an observation, and every use of its weight must be such a call."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import (
    CLASSES,
    INPUTS,
    INVERSES,
    batch,
    build,
    each_optimizer,
    grad,
    network,
    same,
    train,
)

ELSEWHERE = "its weight is used outside the layer's own calls"


class Net(nn.Module):
    """``lower`` and ``inner`` of one shape, and a head; ``run`` says how they are called."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.inner = nn.Linear(INPUTS, INPUTS, bias), nn.Linear(INPUTS, INPUTS, bias)
        self.head = nn.Linear(INPUTS, CLASSES, bias)
        self.double()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def chain(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.inner(torch.tanh(net.lower(x)))))


def loop(net: Net, x: Tensor) -> Tensor:
    h = net.lower(x)
    for _ in range(3):
        h = torch.tanh(net.inner(h))
    return net.head(h)


def deep_and_shallow(net: Net, x: Tensor) -> Tensor:
    """One call of ``inner`` has another layer below it, a later one has none."""
    h = torch.tanh(net.inner(torch.tanh(net.lower(x))))
    return net.head(h * net.inner(x))


def tokens(net: Net, x: Tensor) -> Tensor:
    h = torch.stack([x, x.flip(0), -x], dim=1)
    h = torch.tanh(net.lower(h))
    return net.head(torch.tanh(net.inner(torch.tanh(net.inner(h))))).mean(1)


OUTPUTS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor]]] = {
    "once": (chain, lambda net, x: net(x)),
    "a recurrent loop": (loop, lambda net, x: net(x)),
    "at two depths": (deep_and_shallow, lambda net, x: net(x)),
    "on sequences": (tokens, lambda net, x: net(x)),
    "siamese": (chain, lambda net, x: net(x) - net(2 * x)),
    "two batches in one": (chain, lambda net, x: torch.cat([net(x), net(-x)])),
    "with an unused pass between": (chain, lambda net, x: (net(x), net(3 * x))[0]),
    "an earlier pass, before an evaluation": (chain, lambda net, x: (net(x), torch.no_grad()(net)(x))[0]),
}


def factors_by_hand(net: Net, output_of: Callable[[Net, Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    """A and G of each layer from all its calls' tensors, one row for each sample, position and call."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers = {name: layer for name, layer in net.named_children() if isinstance(layer, nn.Linear)}

    def note(name: str, inputs: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            calls.setdefault(name, []).append((inputs, output))

    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, output, name=name: note(name, args[0], output)  # pyright: ignore
        )
    output = output_of(net, x)
    loss = F.cross_entropy(output, labels_of(output), reduction="sum")
    factors = {}
    for name in layers:
        inputs, outputs = zip(*calls[name], strict=True)
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
        seen = [(a, g) for a, g in zip(inputs, gradients, strict=True) if g.any()]
        a = torch.cat([a.detach().flatten(0, -2) for a, _ in seen])
        g = torch.cat([g.flatten(0, -2) for _, g in seen])
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        factors[name] = a.T @ a / len(a), g.T @ g / len(output)
    return factors


def labels_of(output: Tensor) -> Tensor:
    return torch.arange(len(output)) % CLASSES


@each_optimizer
@pytest.mark.parametrize("case", OUTPUTS)
def test_all_calls_behind_an_output_are_observed(kind: type[KFAC], case: str) -> None:
    run, output_of = OUTPUTS[case]
    x = batch(0)[0]
    expected = factors_by_hand(Net(run), output_of, x)
    net = Net(run)
    optimizer = build(kind, net)
    output = output_of(net, x)
    optimizer.update_curvature(output, labels=labels_of(output))
    F.cross_entropy(output, labels_of(output)).backward()
    optimizer.step()
    state = optimizer.state_dict()["preconditioner"]["layers"]
    for name, (a, g) in expected.items():
        torch.testing.assert_close(state[name]["a"][0], a)
        torch.testing.assert_close(state[name]["g"][0], g)
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_model_that_calls_itself() -> None:
    def recursive(net: Net, x: Tensor, depth: int = 2) -> Tensor:
        if depth == 0:
            return net.lower(x)
        net.run = lambda net, x: recursive(net, x, depth - 1)
        h = net(x) if depth == 1 else net.head(torch.tanh(net.inner(torch.tanh(net(x)))))
        net.run = recursive
        return h

    flat, nested = Net(chain), Net(recursive)
    train(flat, build(TwoLevelKFAC, flat), INVERSES)
    train(nested, build(TwoLevelKFAC, nested), INVERSES)
    assert same(flat, nested)


# -- other uses of a weight -------------------------------------------------------------------------


def transposed(net: Net, x: Tensor) -> Tensor:
    return net.head(F.linear(torch.tanh(net.inner(torch.tanh(net.lower(x)))), net.inner.weight.t()))


def penalised(net: Net, x: Tensor) -> Tensor:
    return chain(net, x) + net.inner.weight.square().sum()


def stacked(net: Net, x: Tensor) -> Tensor:
    both = torch.stack([net.inner.weight, torch.ones_like(net.inner.weight)])
    return net.head(torch.tanh(net.inner(torch.tanh(net.lower(x)))) @ both[0])


def never_called(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(F.linear(torch.tanh(net.lower(x)), net.inner.weight, net.inner.bias)))


def called_by_its_forward(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.tanh(nn.Linear.forward(net.inner, torch.tanh(net.lower(x)))))


USES = [transposed, penalised, stacked, never_called, called_by_its_forward]


@each_optimizer
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("run", USES)
def test_a_layer_whose_weight_has_other_uses_takes_plain_steps(
    kind: type[KFAC], run: Callable[[Net, Tensor], Tensor], autocast: bool
) -> None:
    net = Net(run).float()
    optimizer = build(kind, net, momentum=0.0, weight_decay=0.0, kl_clip=None)
    for step in range(INVERSES + 1):
        x, y = batch(step, torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(x)
        if step == 0:
            with pytest.warns(UserWarning, match=f"left to plain SGD: layer 'inner', because {ELSEWHERE}"):
                optimizer.update_curvature(output)
        else:
            optimizer.update_curvature(output)
        F.cross_entropy(output.float(), y).backward()
        before = net.inner.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(net.inner.weight.detach(), before - 0.05 * grad(net.inner.weight))
    plain = {line.parameter: line.reason for line in optimizer.coverage if not line.preconditioned}
    assert plain == {"inner.weight": ELSEWHERE, "inner.bias": ELSEWHERE}


@each_optimizer
def test_with_no_other_layer_the_model_takes_plain_steps(kind: type[KFAC]) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(INPUTS, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t())

    model = Autoencoder().double()
    optimizer = build(kind, model)
    with pytest.warns(UserWarning, match=ELSEWHERE):
        train(model, optimizer, INVERSES + 1)
    assert not any(line.preconditioned for line in optimizer.coverage)
    assert not optimizer.refresh_is_due


def test_what_was_found_is_saved() -> None:
    net, twin = Net(transposed), Net(transposed)
    optimizer, other = build(KFAC, net), build(KFAC, twin)
    with pytest.warns(UserWarning, match=ELSEWHERE):
        train(net, optimizer, 1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.coverage == optimizer.coverage
    twin.load_state_dict(net.state_dict())
    for model, one in ((net, optimizer), (twin, other)):
        train(model, one, INVERSES + 1, first=1)
    assert same(net, twin)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("run", [chain, loop, tokens])
def test_calls_alone_are_no_other_use(
    run: Callable[[Net, Tensor], Tensor], bias: bool, autocast: bool, recwarn: pytest.WarningsRecorder
) -> None:
    net = Net(run, bias).float()
    optimizer = build(KFAC, net)
    for step in range(INVERSES):
        x, y = batch(step, torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(x)
        optimizer.update_curvature(output)
        F.cross_entropy(output.float(), y).backward()
        optimizer.step()
    assert all(line.preconditioned for line in optimizer.coverage)
    assert not [warning for warning in recwarn if "plain" in str(warning.message)]


def test_a_layer_with_a_forward_of_its_own_is_plain() -> None:
    net = Net(chain)
    net.inner.forward = lambda input: 2 * nn.Linear.forward(net.inner, input)
    optimizer = build(KFAC, net)
    assert "inner.weight: plain (its forward is not that of Linear)" in repr(optimizer)
    train(net, optimizer, INVERSES)


# -- the layer's own output -------------------------------------------------------------------------


class Triple(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3 * output


@pytest.fixture
def tripling() -> Iterator[Callable[[nn.Module], None]]:
    """Lets a global hook triple what a module returns."""
    handles = []

    def register(module: nn.Module) -> None:
        handles.append(register_module_forward_hook(lambda m, _, output: 3 * output if m is module else None))

    yield register
    for handle in handles:
        handle.remove()


@each_optimizer
@pytest.mark.parametrize("where", ["module", "first", "global"])
def test_a_hook_that_replaces_the_output(kind: type[KFAC], where: str, tripling: Any) -> None:
    plain, hooked = network(), network()
    written_out = nn.Sequential(plain[0], Triple(), *plain[1:])
    if where == "global":
        tripling(hooked[0])
    else:
        hooked[0].register_forward_hook(triple, prepend=where == "first")
    train(written_out, build(kind, written_out), INVERSES + 1)
    train(hooked, build(kind, hooked), INVERSES + 1)
    assert same(plain, hooked)


@pytest.mark.parametrize("where", ["module", "global"])
def test_a_hook_that_replaces_the_output_of_a_model_that_is_one_layer(where: str, tripling: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, CLASSES).double()
    written_out = nn.Sequential(copy.deepcopy(layer), Triple())
    if where == "global":
        tripling(layer)
    else:
        layer.register_forward_hook(triple)
    train(written_out, build(TwoLevelKFAC, written_out), INVERSES + 1)
    train(layer, build(TwoLevelKFAC, layer), INVERSES + 1)
    assert same(nn.Sequential(layer, Triple()), written_out)


# -- activation checkpointing -----------------------------------------------------------------------


def checkpointed(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def run(net: Net, x: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            return torch.tanh(net.inner(torch.tanh(net.lower(h))))

        h = checkpoint(block, 1 * x.requires_grad_(), use_reentrant=reentrant)
        return net.head(h)  # pyright: ignore[reportArgumentType]

    return run


@each_optimizer
def test_checkpointed_layers_train_as_without(kind: type[KFAC]) -> None:
    plain, saving = Net(chain), Net(checkpointed(reentrant=False))
    train(plain, build(kind, plain), 2 * INVERSES + 1)
    train(saving, build(kind, saving), 2 * INVERSES + 1)
    assert same(plain, saving)


@each_optimizer
def test_a_model_checkpointed_as_a_whole_trains_as_without(kind: type[KFAC]) -> None:
    plain, saving = Net(loop), Net(loop)
    train(plain, build(kind, plain), 2 * INVERSES + 1)

    def call(x: Tensor) -> Tensor:
        return checkpoint(saving, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    train(saving, build(kind, saving), 2 * INVERSES + 1, call=call)
    assert same(plain, saving)


def test_reentrant_checkpointing_is_refused_with_the_remedy() -> None:
    net = Net(checkpointed(reentrant=True))
    optimizer = build(KFAC, net)
    output = net(batch(0)[0])
    with pytest.raises(RuntimeError, match=r"hides layer 'lower', layer 'inner': .*use_reentrant=False"):
        optimizer.update_curvature(output)
    whole = Net(chain)
    optimizer = build(KFAC, whole)
    output = checkpoint(whole, batch(0)[0].requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"hides layers: .*use_reentrant=False"):
        optimizer.update_curvature(output)  # pyright: ignore[reportArgumentType]
