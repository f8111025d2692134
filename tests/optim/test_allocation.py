"""The curvature takes memory when it is first observed, for the layers that are trained, and says how much."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC
from kfac2.curvature import INVERSES as INVERSE_TYPES
from kfac2.optim import memory
from tests.optim.loop import (
    INVERSES,
    batch,
    build,
    each_inverse,
    each_optimizer,
    layer_of,
    network,
    same,
    train,
)
from tests.optim.test_state import assert_equal, through_a_file

LAYERS = ["0", "3", "5"]


def states(optimizer: KFAC) -> dict[str, dict[str, Any]]:
    return optimizer.state_dict()["preconditioner"]["layers"]


def allocated(optimizer: KFAC) -> list[str]:
    return [name for name, state in states(optimizer).items() if "a" in state]


def state_bytes(optimizer: KFAC) -> int:
    """Of all tensors that are there."""
    entry = optimizer.state_dict()["preconditioner"]
    parts = [*entry["layers"].values(), entry["coarse"] or {}]
    return sum(x.nbytes for part in parts for x in part.values() if isinstance(x, Tensor))


@each_optimizer
@each_inverse
def test_the_memory_foretold_is_the_memory_taken(kind: type[KFAC], inverse: str) -> None:
    model = network()
    optimizer = build(kind, model, inverse=inverse, max_factor_dim=4)
    foretold = optimizer.preconditioner.memory()
    assert allocated(optimizer) == []
    train(model, optimizer, 1)
    assert allocated(optimizer) == LAYERS
    assert state_bytes(optimizer) == optimizer.preconditioner.memory() == foretold


@each_optimizer
def test_a_model_converted_after_construction(kind: type[KFAC]) -> None:
    converted = network(dtype=torch.float32)
    optimizer = build(kind, converted)
    converted.double()
    model = network(dtype=torch.float32).double()
    other = build(kind, model)
    for one, its_optimizer in ((converted, optimizer), (model, other)):
        train(one, its_optimizer, 2 * INVERSES)
    assert same(converted, model)
    assert states(optimizer)["0"]["a"].dtype == torch.float64


@each_optimizer
def test_a_frozen_layer_takes_nothing_until_it_is_trained(kind: type[KFAC]) -> None:
    """Layer 3 has a mate of its own shape in the stack."""
    model = network()
    layer_of(model, 3).requires_grad_(False)
    optimizer = build(kind, model)
    train(model, optimizer, 1)
    assert allocated(optimizer) == ["0", "5"]
    assert state_bytes(optimizer) == optimizer.preconditioner.memory()
    layer_of(model, 3).weight.requires_grad_(True)
    train(model, optimizer, 1, first=1)
    assert allocated(optimizer) == ["0", "5"]  # no refresh was due
    train(model, optimizer, INVERSES, first=2)
    assert allocated(optimizer) == LAYERS
    assert all(state["attempted"] and state["seen"].all() for state in states(optimizer).values())


@each_optimizer
def test_a_layer_unfrozen_between_two_micro_batches(kind: type[KFAC]) -> None:
    """The batches seen without it count for the others as ever, and not for it."""
    halves = [batch(0), batch(1)]

    def factors(model: nn.Module, counted: list[int], unfreeze: bool) -> dict[str, dict[str, Any]]:
        layer = layer_of(model, 3)
        layer.weight.requires_grad_(not unfreeze)
        optimizer = build(kind, model)
        for k in counted:
            x, y = halves[k]
            output = model(x)
            optimizer.update_curvature(output, labels=y)
            (F.cross_entropy(output, y) / len(counted)).backward()
            layer.weight.requires_grad_(True)
        optimizer.step()
        return states(optimizer)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()

    first = model()
    together, second, unfrozen = (
        factors(copy.deepcopy(first), counted, unfreeze)
        for counted, unfreeze in (([0, 1], False), ([1], False), ([0, 1], True))
    )
    for name, source in (("0", together), ("3", second), ("4", together)):
        for factor in ("a", "g"):
            torch.testing.assert_close(unfrozen[name][factor], source[name][factor])


@each_optimizer
def test_an_older_state_with_room_for_frozen_layers(kind: type[KFAC]) -> None:
    model, fresh = network(), network(seed=1)
    for one in (model, fresh):
        layer_of(one, 3).requires_grad_(False)
    optimizer, other = build(kind, model), build(kind, fresh)
    train(model, optimizer, 3)
    saved = through_a_file(optimizer.state_dict())
    layers = saved["preconditioner"]["layers"]
    empty = {key: torch.zeros_like(x) for key, x in layers["0"].items()}
    layers["3"] = {key: x[..., :4, :4] if key == "a" else x for key, x in empty.items()}  # it has no bias
    if "eigenvectors_a" in empty:
        layers["3"]["eigenvectors_a"] = empty["eigenvectors_a"][..., :4, :4]
        layers["3"]["reciprocals"] = empty["reciprocals"][..., :4]
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    assert allocated(other) == ["0", "5"]
    for one, its_optimizer in ((model, optimizer), (fresh, other)):
        train(one, its_optimizer, 2 * INVERSES, first=3)
    assert same(model, fresh)
    assert_equal(other.state_dict(), optimizer.state_dict())


@each_optimizer
def test_a_model_frozen_as_a_whole_takes_no_memory_and_no_step(kind: type[KFAC]) -> None:
    model = network()
    optimizer = build(kind, model)
    before = copy.deepcopy(model.state_dict())
    for layer in LAYERS:
        model.get_submodule(layer).requires_grad_(False)
    loss = model(batch(0)[0]).sum()  # the batch norm is left
    optimizer.update_curvature(model(batch(0)[0]))
    loss.backward()
    optimizer.step()
    assert allocated(optimizer) == []
    assert optimizer.diagnostics["nu"].tolist() == [1.0]
    assert all(torch.equal(before[f"{name}.weight"], layer_of(model, int(name)).weight) for name in LAYERS)


# -- how much ---------------------------------------------------------------------------------------


def test_a_warning_before_more_than_half_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 3)).double()
    needed = build(KFAC, model).preconditioner.memory()
    x, y = torch.randn(8, 64).double(), batch(0)[1]
    for free, told in ((2 * needed, False), (2 * needed - 2, True), (None, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = build(KFAC, model)
            optimizer.update_curvature(model(x), labels=y)
            build(KFAC, copy.deepcopy(model)).load_state_dict(optimizer.state_dict())
        texts = [str(one.message) for one in caught if "free on cpu" in str(one.message)]
        assert len(texts) == 2 * told  # observed, and loaded
        assert all("most for 0 (2 MiB), 2 (1 MiB). A lower max_factor_dim" in text for text in texts)


def test_what_is_free_here_is_known() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    assert memory.free_bytes(torch.device("meta")) is None


# -- of what type -----------------------------------------------------------------------------------


@each_optimizer
@each_inverse
def test_double_factors_of_a_single_model(kind: type[KFAC], inverse: str) -> None:
    model = network(dtype=torch.float32)
    optimizer = build(kind, model, inverse=inverse, factor_dtype=torch.float64)
    train(model, optimizer, 1)
    x = F.pad(batch(0, torch.float32)[0], (0, 1), value=1.0).double()
    state = states(optimizer)["0"]
    torch.testing.assert_close(state["a"][0], x.T @ x / len(x), rtol=1e-14, atol=0)
    expected = INVERSE_TYPES[inverse].compute(state["a"], state["g"], 1e-2)
    for field, x in expected._asdict().items():
        torch.testing.assert_close(state[field], x)
    train(model, optimizer, 2 * INVERSES, first=1)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_short_factors_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"factor_dtype must be torch\.float32 or torch\.float64"):
        build(KFAC, network(), factor_dtype=dtype)


def test_a_running_average_in_bfloat16_stands_still() -> None:
    """Why they are: on the way from 1 to 1.1 it stops at a third."""
    for dtype, end in ((torch.bfloat16, 1.03125), (torch.float32, 1.1)):
        average, new = torch.tensor(1.0, dtype=dtype), torch.tensor(1.1, dtype=dtype)
        for _ in range(1000):
            average = torch.lerp(new, average, 0.95)
        assert average.item() == pytest.approx(end, rel=1e-4)
