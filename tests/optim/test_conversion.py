"""A model converted after the optimizer was built, and parameters of unusual types."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.study.variants import VARIANTS
from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import (
    FACTORS,
    INVERSES,
    assert_close,
    batch,
    build,
    each_inverse,
    each_optimizer,
    layer_of,
    network,
    train,
)

STEPS = 2 * INVERSES


@each_optimizer
@each_inverse
@pytest.mark.parametrize("first", range(INVERSES + 1))
def test_a_model_made_double_goes_on_as_one_that_always_was(
    kind: type[KFAC], inverse: str, first: int
) -> None:
    """Values that float32 holds exactly: before the first step the conversion loses nothing."""
    model = network(dtype=torch.float32)
    optimizer = build(kind, model, inverse=inverse)
    train(model, optimizer, first, empirical=True)
    twin = network(dtype=torch.float32).double()
    other = build(kind, twin, inverse=inverse)
    other.load_state_dict(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    train(model.double(), optimizer, STEPS, first=first, empirical=True)
    train(twin, other, STEPS, first=first, empirical=True)
    assert_close(model, twin, rtol=1e-12, atol=1e-12)
    for field, x in optimizer.state_dict()["preconditioner"]["layers"]["0"].items():
        assert x.dtype == torch.float64 or field in ("seen", "attempted")
    assert all(own["momentum_buffer"].dtype == torch.float64 for own in optimizer.state.values())


@each_optimizer
def test_a_model_made_bfloat16_keeps_its_curvature_in_float32(kind: type[KFAC]) -> None:
    model = network(dtype=torch.float32)
    optimizer = build(kind, model)
    train(model, optimizer, 3)
    model.bfloat16()
    train(model, optimizer, STEPS, first=3)
    for p, own in optimizer.state.items():
        assert p.dtype == own["momentum_buffer"].dtype == torch.bfloat16
        assert p.isfinite().all()
    layers = optimizer.state_dict()["preconditioner"]["layers"]
    assert layers["0"]["a"].dtype == torch.float32


@each_optimizer
@pytest.mark.parametrize("first", [1, INVERSES])
def test_part_of_a_model_converted(kind: type[KFAC], first: int) -> None:
    """The two layers of one shape are then no longer one batch."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.one, self.other, self.head):
                x = layer(x.to(layer.weight.dtype)).tanh()
            return x

    model, twin = Mixed(), Mixed().double()
    optimizer, other = build(kind, model), build(kind, twin)
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        train(one, its_optimizer, first, empirical=True)
    model.other.double()
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        train(one, its_optimizer, STEPS, first=first, empirical=True)
    layers = optimizer.state_dict()["preconditioner"]["layers"]
    assert [layers[name]["a"].dtype for name in ("one", "other")] == [torch.float32, torch.float64]
    assert_close(model.double(), twin, rtol=1e-3, atol=1e-4)


def test_a_conversion_between_the_refresh_and_the_step_asks_for_the_refresh_again() -> None:
    model = network(dtype=torch.float32)
    optimizer = build(KFAC, model)
    x, y = batch(0, torch.float32)
    output = model(x)
    optimizer.update_curvature(output)
    F.cross_entropy(output, y).backward()
    model.double()
    with pytest.raises(RuntimeError, match="update_curvature"):
        optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@pytest.mark.parametrize("name", [None, "signs", "observed", "diagonal_matched"])
def test_a_model_moved_to_another_device(name: str | None) -> None:
    model, twin = network(), network()
    spaces: list[Any] = [None if name is None else VARIANTS[name]() for _ in range(2)]
    optimizer, other = (build(TwoLevelKFAC, m, coarse=s) for m, s in zip((model, twin), spaces, strict=True))
    train(model, optimizer, 3, empirical=True)
    train(twin, other, 3 + STEPS, empirical=True)
    train(model.cuda(), optimizer, STEPS, first=3, empirical=True)
    assert_close(model.cpu(), twin, rtol=1e-6, atol=1e-7)


def test_a_coarse_space_moved_keeps_its_state() -> None:
    model, twin = network(), network()
    optimizer, other = build(TwoLevelKFAC, model), build(TwoLevelKFAC, twin)
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        train(one, its_optimizer, FACTORS + 1)
    assert optimizer.coarse is not None
    optimizer.coarse.to(torch.device("cpu"))
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        train(one, its_optimizer, STEPS, first=FACTORS + 1)
    assert_close(model, twin, rtol=0, atol=0)


# -- complex parameters -----------------------------------------------------------------------------


class WithComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5, dtype=torch.complex128)
        self.head = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.to(torch.complex128)).abs())


@each_optimizer
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"momentum": 0.0}], ids=str)
def test_a_complex_layer_is_plain_sgd(kind: type[KFAC], options: dict[str, Any]) -> None:
    model, twin = WithComplex(), WithComplex()
    optimizer = build(kind, model, lr=0.05, **options)
    reasons = {line.parameter: line.reason for line in optimizer.coverage}
    assert "complex" in reasons["first.weight"]
    assert "complex" in reasons["first.bias"]
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-3} | options
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, **settings)
    for step in range(5):
        x, y = batch(step)
        twin.head.load_state_dict(model.head.state_dict())
        train(model, optimizer, 1, first=step, call=model)
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
    torch.testing.assert_close(model.first.weight, twin.first.weight, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.first.bias, twin.first.bias, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_layer_that_becomes_complex_is_refused() -> None:
    model = network(dtype=torch.float32)
    optimizer = build(KFAC, model)
    train(model, optimizer, 1)
    layer_of(model, 3).to(torch.complex64)
    with pytest.raises(RuntimeError, match="layers 3 have complex weights now"):
        optimizer.step()


# -- SGD's own options ------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize(
    "options",
    [{"nesterov": True}, {"dampening": 0.3}, {"maximize": True}, {"nesterov": True, "maximize": True}],
    ids=str,
)
def test_sgds_options_act_on_the_preconditioned_gradient(
    kind: type[KFAC], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    optimizer = build(kind, model, **options)
    twins = [p.detach().clone().requires_grad_() for p in model.parameters()]
    sgd = torch.optim.SGD(twins, lr=0.05, momentum=0.9, weight_decay=1e-3, **options)
    split, updates = optimizer.preconditioner.split, {}
    monkeypatch.setattr(
        optimizer.preconditioner, "split", lambda *args: updates.update(split(*args)) or updates
    )
    for step in range(5):
        train(model, optimizer, 1, first=step)
        for p, twin in zip(model.parameters(), twins, strict=True):
            assert p.grad is not None
            twin.grad = updates.get(id(p), p.grad).clone()
        sgd.step()
        for p, twin in zip(model.parameters(), twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-12, atol=1e-12)
    assert len(updates) == 6


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="Nesterov"):
        build(KFAC, network(), nesterov=True, momentum=0.0)


# -- torch's generator ------------------------------------------------------------------------------


@each_optimizer
def test_building_leaves_torchs_generator_alone(kind: type[KFAC]) -> None:
    drawn = []
    for _ in range(2):
        model = network(seed=5)
        before = torch.get_rng_state()
        optimizer = build(kind, model, generator=None)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(optimizer.state_dict()["preconditioner"]["generators"][0])
    assert torch.equal(*drawn)  # reproducible under manual_seed
    torch.manual_seed(6)
    other = build(kind, network(seed=6), generator=None).state_dict()["preconditioner"]["generators"][0]
    assert not torch.equal(other, drawn[0])
