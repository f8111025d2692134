"""What a layer's capture must get right in real models, each against an equivalent model without the quirk."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import (
    BATCH,
    CLASSES,
    FACTORS,
    INPUTS,
    INVERSES,
    assert_close,
    batch,
    build,
    each_optimizer,
    grad,
    layer_of,
    network,
    same,
    train,
    values,
)

STEPS = 2 * INVERSES + 1
LINEAR = (0, 3, 5)


class Fixed(nn.Module):
    """A linear map without parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.w, self.b = layer.weight.detach().clone(), layer.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class Shift(nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Branches(nn.Module):
    """``extra`` takes part in the forward pass only where ``use`` says so."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body, self.use = network(bias=bias), False
        self.extra = nn.Linear(INPUTS, CLASSES, bias).double()

    def forward(self, x: Tensor) -> Tensor:
        output = self.body(x)
        return output + self.extra(x) if self.use else output


class Twice(nn.Module):
    def __init__(self, second: Callable[[nn.Module, Tensor], Tensor] = lambda layer, h: layer(h)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(INPUTS, INPUTS).double()
        self.head = nn.Linear(INPUTS, CLASSES).double()
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.inner, torch.tanh(self.inner(x))))


def trained(kind: type[KFAC], model: nn.Module, **options: Any) -> nn.Module:
    train(model, build(kind, model, **options), STEPS)
    return model


# -- activations and modes --------------------------------------------------------------------------


@each_optimizer
def test_in_place_activations_after_a_layer(kind: type[KFAC]) -> None:
    def model(inplace: bool) -> nn.Module:
        layers = network()
        layers[2], layers[4] = nn.ReLU(inplace), nn.ReLU(inplace)
        return nn.Sequential(*layers[:1], nn.LeakyReLU(0.1, inplace), *layers[1:])

    assert same(trained(kind, model(inplace=True)), trained(kind, model(inplace=False)))


@pytest.mark.parametrize("autocast", [False, True])
def test_in_place_operations_on_sequences(autocast: bool) -> None:
    """There a linear layer's output is a view, which such an operation takes out of the graph."""

    def trained_on_sequences(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(INPUTS, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.LeakyReLU(0.1, inplace)
        model = nn.Sequential(nn.Unflatten(1, (2, INPUTS)), *layers, nn.Flatten(), nn.Linear(10, CLASSES))
        optimizer = build(TwoLevelKFAC, model)
        for step in range(STEPS):
            x, y = batch(step, torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(x.repeat(1, 2))
            optimizer.update_curvature(output)
            F.cross_entropy(output.float(), y).backward()
            optimizer.step()
        assert optimizer.preconditioner.ready == [True] * 3
        return model

    assert same(trained_on_sequences(True), trained_on_sequences(False))


def test_an_input_that_was_overwritten_is_named_with_the_remedy() -> None:
    """Under autocast the layer has a copy, and autograd does not notice."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(INPUTS, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x)
            output = self.last(self.first(h))
            h.mul_(100)
            return output

    model = Overwriting()
    optimizer = build(KFAC, model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch(0, torch.float32)[0])
    with pytest.raises(
        RuntimeError, match=r"input of layer 'first' was changed in place.*exclude=\['first'\]"
    ):
        optimizer.update_curvature(output)


def test_an_in_place_sum_after_a_layer() -> None:
    class Residual(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.body, self.inplace = network(), inplace

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[0](x)
            h = h.add_(x).mul_(0.5) if self.inplace else (h + x) * 0.5
            return self.body[3:](torch.tanh(h))

    assert same(trained(KFAC, Residual(True)), trained(KFAC, Residual(False)))


@each_optimizer
def test_batch_norm_frozen_in_evaluation_mode(kind: type[KFAC]) -> None:
    class Affine(nn.Module):
        def __init__(self, norm: nn.BatchNorm1d) -> None:
            super().__init__()
            assert norm.running_mean is not None
            assert norm.running_var is not None
            self.weight, self.bias = norm.weight, norm.bias
            self.mean, self.std = norm.running_mean, (norm.running_var + norm.eps).sqrt()

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.mean) / self.std * self.weight + self.bias

    frozen, affine = network(), network()
    for model in (frozen, affine):
        model(3 * batch(9)[0] + 1)
    norm, its_twin = frozen[1], affine[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(its_twin, nn.BatchNorm1d)
    running = copy.deepcopy(norm.eval().state_dict())
    affine[1] = Affine(its_twin)
    assert_close(trained(kind, frozen), trained(kind, affine))
    for key in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[key], running[key])


def test_checkpointed_layers() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[:3](x)
            return self.body[4:](checkpoint(self.body[3], h, use_reentrant=False))

    assert same(trained(TwoLevelKFAC, Checkpointed()), trained(TwoLevelKFAC, network()))


def test_an_input_passed_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body[1:](self.body[0](input=x))

    assert same(trained(KFAC, Keyword()), trained(KFAC, network()))


def test_a_model_that_is_one_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, CLASSES).double()
    twin = nn.Sequential(copy.deepcopy(layer))
    assert same(nn.Sequential(trained(TwoLevelKFAC, layer)), trained(TwoLevelKFAC, twin))


# -- frozen, unused and shared layers ---------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("index", LINEAR)
def test_a_frozen_layer_is_a_fixed_map(kind: type[KFAC], index: int) -> None:
    frozen, fixed = network(), network()
    frozen[index].requires_grad_(False)
    before = layer_of(frozen, index).weight.clone()
    fixed[index] = Fixed(layer_of(fixed, index))
    trained(kind, frozen)
    trained(kind, fixed)
    assert torch.equal(layer_of(frozen, index).weight, before)
    trainable = nn.ParameterList(p for p in frozen.parameters() if p.requires_grad)
    assert_close(trainable, nn.ParameterList(fixed.parameters()))


@each_optimizer
@pytest.mark.parametrize("index", LINEAR)
def test_a_frozen_bias_is_a_fixed_shift(kind: type[KFAC], index: int) -> None:
    frozen, fixed = network(), network()
    layer_of(frozen, index).bias.requires_grad_(False)
    layer = layer_of(fixed, index)
    shift, layer.bias = Shift(layer.bias), None  # pyright: ignore[reportAttributeAccessIssue]
    fixed = nn.Sequential(*fixed[: index + 1], shift, *fixed[index + 1 :])
    trained(kind, frozen)
    trained(kind, fixed)
    trainable = nn.ParameterList(p for p in frozen.parameters() if p.requires_grad)
    assert_close(trainable, nn.ParameterList(fixed.parameters()))


@each_optimizer
def test_with_every_layer_frozen_the_rest_takes_plain_steps(kind: type[KFAC]) -> None:
    model, twin = network(), network()
    for one in (model, twin):
        for index in LINEAR:
            one[index].requires_grad_(False)
    trained(kind, model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(STEPS):
        x, y = batch(step)
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
    assert_close(model, twin)


@each_optimizer
@pytest.mark.parametrize("frozen_when_built", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_unfrozen_later(kind: type[KFAC], bias: bool, frozen_when_built: bool) -> None:
    """It takes plain steps until the inverses have been refreshed with it, from its first observation on."""
    model = network(bias=bias)
    layer = layer_of(model, 3)
    layer.requires_grad_(not frozen_when_built)
    optimizer = build(kind, model, momentum=0.9, weight_decay=1e-3, kl_clip=None)
    layer.requires_grad_(False)
    train(model, optimizer, 1)
    assert "momentum_buffer" not in optimizer.state[layer.weight]
    layer.requires_grad_(True)

    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    buffer = torch.zeros_like(layer.weight)
    for step in range(1, INVERSES):
        before = layer.weight.detach().clone()
        train(model, optimizer, 1, first=step)
        buffer = 0.9 * buffer + grad(layer.weight) + 1e-3 * before
        torch.testing.assert_close(layer.weight.detach(), before - 0.05 * buffer)
    handle.remove()
    a = optimizer.state_dict()["preconditioner"]["layers"]["3"]["a"][
        0, : layer.in_features, : layer.in_features
    ]
    first = seen[FACTORS - 1]  # step 0 was not seen
    torch.testing.assert_close(a, first.T @ first / BATCH)

    before = layer.weight.detach().clone()
    train(model, optimizer, 1, first=INVERSES)
    plain = before - 0.05 * (0.9 * buffer + grad(layer.weight) + 1e-3 * before)
    assert not torch.allclose(layer.weight, plain, rtol=1e-3)
    assert layer.weight.isfinite().all()


@each_optimizer
def test_a_layer_frozen_later_stays_where_it_is(kind: type[KFAC]) -> None:
    model = network()
    optimizer = build(kind, model)
    train(model, optimizer, 1)
    model[3].requires_grad_(False)
    kept = [p.clone() for p in model[3].parameters()]
    train(model, optimizer, STEPS, first=1)
    assert all(torch.equal(p, old) for p, old in zip(model[3].parameters(), kept, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@each_optimizer
def test_an_unused_layer_changes_nothing(kind: type[KFAC]) -> None:
    model = Branches()
    before = model.extra.weight.detach().clone()
    trained(kind, model)
    assert torch.equal(model.extra.weight, before)
    assert_close(model.body, trained(kind, network()))


@each_optimizer
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_used_now_and_then(kind: type[KFAC], bias: bool) -> None:
    model = Branches(bias)
    optimizer = build(kind, model)

    def alternate(step: int) -> None:
        model.use = step % 3 == 1

    for step in range(3 * STEPS):
        before = model.extra.weight.detach().clone()
        state = optimizer.state_dict()["preconditioner"]["layers"]["extra"]
        train(model, optimizer, 1, first=step, before=alternate)
        assert model.use != torch.equal(model.extra.weight, before)
        if not model.use and step > 0:  # nothing is remembered before the first
            after = optimizer.state_dict()["preconditioner"]["layers"]["extra"]
            assert torch.equal(after["a"], state["a"])
    assert optimizer.rejected_samples == optimizer.failed_inverses == 0
    assert all(p.isfinite().all() for p in model.parameters())


@each_optimizer
def test_tied_weights_take_plain_steps(kind: type[KFAC]) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model[2].weight = model[0].weight
    model.double()
    optimizer = build(kind, model, momentum=0.0, weight_decay=0.0, kl_clip=None)
    assert "0.weight: plain (shared with another module)" in repr(optimizer)
    weight = layer_of(model, 0).weight
    before = weight.detach().clone()
    train(model, optimizer, 1)
    torch.testing.assert_close(weight.detach(), before - 0.05 * grad(weight))
    assert [line.parameter for line in optimizer.coverage if line.preconditioned] == ["4.weight", "4.bias"]


def test_a_layer_called_again_without_grad_is_called_once() -> None:
    def shift(layer: nn.Module, h: Tensor) -> Tensor:
        with torch.no_grad():
            target = layer(h)
        return h + target

    def by_hand(layer: nn.Module, h: Tensor) -> Tensor:
        return h + F.linear(h.detach(), layer.weight.detach(), layer.bias.detach())  # pyright: ignore

    assert_close(trained(KFAC, Twice(shift)), trained(KFAC, Twice(by_hand)))


# -- which forward pass -----------------------------------------------------------------------------


@each_optimizer
def test_uneven_micro_batches_are_one_batch(kind: type[KFAC]) -> None:
    """Two forward passes and two calls before one step, the labels given; no batch norm."""
    model, twin = network()[3:], network()[3:]
    optimizer = build(kind, model)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        for part in (slice(0, 3), slice(3, None)):
            output = model(x[part])
            optimizer.update_curvature(output, labels=y[part])
            (F.cross_entropy(output, y[part], reduction="sum") / BATCH).backward()
        optimizer.step()
    train(twin, build(kind, twin), STEPS, empirical=True)
    assert_close(model, twin)


def test_evaluation_between_steps_changes_nothing() -> None:
    def evaluate(step: int) -> None:
        model.eval()
        with torch.no_grad():
            model(batch(50)[0])
        model(batch(51)[0])  # grad enabled, as attacks and saliency maps need it
        model.train()

    model = network()
    train(model, build(TwoLevelKFAC, model), STEPS, before=evaluate)
    assert same(model, trained(TwoLevelKFAC, network()))


def test_nothing_is_kept_between_steps() -> None:
    model = network()
    optimizer = build(TwoLevelKFAC, model)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)
        F.cross_entropy(output, y).backward()
        optimizer.step()
        held = weakref.ref(x)
        del x, output
        gc.collect()
        assert held() is None
        assert not any(module._forward_hooks for module in model.modules())


# -- copies -----------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@each_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, pickled, torch.optim.swa_utils.AveragedModel], ids=lambda f: f.__name__
)
def test_copies_of_the_model_are_free_of_the_optimizer(kind: type[KFAC], duplicate: Any) -> None:
    """Taken at rest and in the middle of a refresh, and run before ``update_curvature`` sees the output."""
    model = network()
    optimizer = build(kind, model)
    copies = [duplicate(model)]
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        output = model(x)
        copies.append(duplicate(model))
        for one in copies:
            assert one(2 * x).shape == output.shape
        optimizer.update_curvature(output)
        F.cross_entropy(output, y).backward()
        optimizer.step()
    assert same(model, trained(kind, network()))


def test_a_copy_trains_with_an_optimizer_of_its_own() -> None:
    model = network()
    build(KFAC, model)
    model(batch(0)[0])
    twin = copy.deepcopy(model)
    twin.load_state_dict(network().state_dict())
    assert same(trained(KFAC, twin), trained(KFAC, network()))


def test_an_optimizer_that_is_gone_leaves_the_model_working() -> None:
    model = network()
    optimizer = build(KFAC, model)
    model(batch(0)[0])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model.load_state_dict(network().state_dict())
    assert same(trained(KFAC, model), trained(KFAC, network()))


def test_two_optimizers_share_a_model() -> None:
    """Body and head each have their own; each block is as if the other were excluded."""
    model, body_only = network(), network()
    body = build(KFAC, model, exclude=["5"], params=model[:5].parameters())
    head = build(KFAC, model, params=model[5].parameters())
    other = build(KFAC, body_only, exclude=["5"], params=body_only[:5].parameters())
    x, y = batch(0)
    output = model(x)
    for optimizer in (body, head):
        optimizer.update_curvature(output)
    F.cross_entropy(output, y).backward()
    before = values(model)
    body.step()
    assert torch.equal(layer_of(model, 5).weight, before[-2])
    head.step()
    assert not torch.equal(layer_of(model, 5).weight, before[-2])
    train(body_only, other, 1)
    assert same(nn.Sequential(*model[:1], *model[2:5]), nn.Sequential(*body_only[:1], *body_only[2:5]))


# -- torch.compile ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled_at", [0, 1, FACTORS])
@pytest.mark.parametrize("way", ["wrap", "in place", "one layer"])
def test_a_model_compiled_after_the_optimizer_is_right_or_an_error(way: str, compiled_at: int) -> None:
    model = network()
    optimizer = build(TwoLevelKFAC, model)
    train(model, optimizer, compiled_at)
    call: Any = model
    if way == "wrap":
        call = torch.compile(model, backend="eager")
    else:
        (model if way == "in place" else model[3]).compile(backend="eager")
    try:
        train(model, optimizer, INVERSES + 1 - compiled_at, first=compiled_at, call=call)
    except RuntimeError as error:
        assert "output" in str(error) or "compile" in str(error)  # noqa: PT017
    else:
        twin = network()
        train(twin, build(TwoLevelKFAC, twin), INVERSES + 1)
        assert_close(model, twin)
