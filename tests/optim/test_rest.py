"""``rest``: another optimizer for what is not preconditioned, inside the one."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from kfac2 import KFAC
from tests.optim.loop import INVERSES, batch, build, each_optimizer, network, same, train
from tests.optim.test_state import assert_equal, through_a_file

ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)
NORM = ("1.weight", "1.bias")


def others(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name in NORM]


class ByHand:
    """K-FAC on the layers and AdamW on the rest, as two optimizers."""

    def __init__(self, kind: type[KFAC], model: nn.Module):
        layers = [p for name, p in model.named_parameters() if name not in NORM]
        self.both = build(kind, model, params=layers), ADAMW(others(model))
        self.update_curvature = self.both[0].update_curvature

    def zero_grad(self) -> None:
        for one in self.both:
            one.zero_grad()

    def step(self) -> None:
        for one in self.both:
            one.step()


@each_optimizer
def test_it_is_the_two_optimizers_run_by_hand(kind: type[KFAC]) -> None:
    model, twin = network(), network()
    train(model, build(kind, model, rest=ADAMW), 2 * INVERSES)
    train(twin, ByHand(kind, twin), 2 * INVERSES)
    assert same(model, twin)


@each_optimizer
@pytest.mark.parametrize("steps", [0, 3])
def test_save_load_continue_is_bit_identical(kind: type[KFAC], steps: int) -> None:
    model, fresh = network(), network(seed=1)
    optimizer, other = build(kind, model, rest=ADAMW), build(kind, fresh, rest=ADAMW, lr=9.0)
    train(model, optimizer, steps)
    train(fresh, other, 2)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, its_optimizer in ((model, optimizer), (fresh, other)):
        train(one, its_optimizer, 2 * INVERSES, first=steps)
    assert same(model, fresh)
    for part in ("state", "preconditioner"):
        assert_equal(other.state_dict()[part], optimizer.state_dict()[part])


def test_distributed_checkpoint_brings_it_along() -> None:
    model, fresh = network(), network(seed=1)
    optimizer, other = build(KFAC, model, rest=ADAMW), build(KFAC, fresh, rest=ADAMW)
    train(model, optimizer, 3)
    fresh.load_state_dict(model.state_dict())
    for one in (optimizer, other):
        one.zero_grad()
    set_optimizer_state_dict(fresh, other, through_a_file(get_optimizer_state_dict(model, optimizer)))
    for one, its_optimizer in ((model, optimizer), (fresh, other)):
        train(one, its_optimizer, 2 * INVERSES, first=3)
    assert same(model, fresh)


def test_the_state_of_another_rest_is_refused() -> None:
    kinds: list[Any] = ["sgd", ADAMW, partial(torch.optim.SGD, lr=0.1)]
    for saved in kinds:
        for own in kinds:
            if saved is not own:
                with pytest.raises(ValueError, match="saved with rest="):
                    build(KFAC, network(), rest=own).load_state_dict(
                        build(KFAC, network(), rest=saved).state_dict()
                    )


def test_its_groups_are_the_last() -> None:
    model = network()

    def in_two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        weight, bias = parameters
        return torch.optim.AdamW([{"params": [weight]}, {"params": [bias], "lr": 0.5}], lr=0.1)

    head = list(model[5].parameters())
    body = [p for p in model.parameters() if not any(p is q for q in head)]
    params = [{"params": body}, {"params": head, "lr": 0.2}]
    optimizer = build(KFAC, model, params=params, rest=in_two_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.2, 0.1, 0.5]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2, 1, 1]
    assert optimizer.rest is not None
    for own, all_of_them in zip(optimizer.rest.param_groups, optimizer.param_groups[2:], strict=True):
        assert own is all_of_them


@pytest.mark.parametrize("loaded", [False, True])
def test_schedulers_drive_all_groups_or_its_own(loaded: bool) -> None:
    model = network()
    optimizer = build(KFAC, model, rest=ADAMW)
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.rest is not None
    both = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    train(model, optimizer, 1)
    both.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.005]
    assert optimizer.rest.param_groups[0]["lr"] == 0.005
    own = torch.optim.lr_scheduler.StepLR(optimizer.rest, 1, gamma=0.1)
    train(model, optimizer, 1, first=1)
    own.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.0005])


def test_a_zero_lr_of_its_own_leaves_its_parameters() -> None:
    model = network()
    optimizer = build(KFAC, model, rest=ADAMW)
    assert optimizer.rest is not None
    optimizer.rest.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name in NORM)


@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_scaler_unscales_and_skips_both(skip: bool) -> None:
    """It reads the gradients in ``param_groups``: all of them are there, and once."""
    model, twin = (network(dtype=torch.float32) for _ in range(2))
    optimizer, plain = (build(KFAC, one, rest=ADAMW, inverse="tikhonov") for one in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        x, y = batch(step, torch.float32)
        for one, its_optimizer in ((model, optimizer), (twin, plain)):
            its_optimizer.zero_grad()
            output = one(x)
            its_optimizer.update_curvature(output)
            loss = F.cross_entropy(output, y)
            (scaler.scale(loss) if its_optimizer is optimizer else loss).backward()
        if skip:
            next(iter(others(model))).grad.fill_(torch.inf)  # pyright: ignore[reportOptionalMemberAccess]
        before = copy.deepcopy(dict(model.named_parameters()))
        scaler.step(optimizer)
        scaler.update(1024.0)
        plain.step()
        if skip:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert not optimizer.state
    if not skip:
        torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_a_model_converted_between_steps() -> None:
    model = network(dtype=torch.float32)
    optimizer = build(KFAC, model, rest=ADAMW)
    train(model, optimizer, 2)
    model.double()
    train(model, optimizer, 2, first=2)
    states = [optimizer.state[p] for p in others(model)]
    assert all(own["exp_avg"].dtype == torch.float64 and own["step"].item() == 4 for own in states)


def test_zero_grad_reaches_its_parameters() -> None:
    model = network()
    optimizer = build(KFAC, model, rest=ADAMW)
    train(model, optimizer, 1)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.idle = network(), nn.Linear(3, 3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.linear(x[:, :3], self.idle.weight)


def test_a_layer_that_no_refresh_sees_stays_with_plain_sgd() -> None:
    """Its weight is read, but the layer is never called."""
    model = Idle()
    optimizer = build(KFAC, model, rest=ADAMW, momentum=0.0, weight_decay=0.0)
    before = model.idle.weight.detach().clone()
    with pytest.warns(UserWarning, match="idle"):
        train(model, optimizer, 1)
    assert model.idle.weight.grad is not None
    torch.testing.assert_close(model.idle.weight.detach(), before - 0.05 * model.idle.weight.grad)


def test_coverage_names_it() -> None:
    lines = {line.parameter: str(line) for line in build(KFAC, network(), rest=ADAMW).coverage}
    assert lines["1.weight"] == "1.weight: plain (BatchNorm1d is not a supported layer: AdamW)"
    assert lines["0.weight"].startswith("0.weight: preconditioned")


def test_where_nothing_is_left_there_is_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = build(KFAC, model, rest=ADAMW)
    assert optimizer.rest is None
    train(model, optimizer, 1)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a name": ("adamw", ValueError, "rest must be 'sgd' or make an optimizer"),
    "an optimizer": (torch.optim.AdamW(network().parameters()), ValueError, "rest must be 'sgd'"),
    "no optimizer": (list, TypeError, "rest made a list"),
    "a closure's": (torch.optim.LBFGS, ValueError, "LBFGS, whose step needs a closure"),
    "too few": (lambda parameters: ADAMW(parameters[:1]), ValueError, "given 2 parameters .* AdamW of 1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_rest_that_cannot_be_is_refused(bad: str) -> None:
    rest, kind, message = BAD[bad]
    with pytest.raises(kind, match=message):
        build(KFAC, network(), rest=rest)
