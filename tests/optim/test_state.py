"""Saving, loading, copying: a run goes on as if it had never stopped."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import (
    INVERSES,
    assert_close,
    batch,
    build,
    each_optimizer,
    network,
    replicated,
    same,
    seeds,
    train,
    train_replicas,
)

VARIANTS: list[tuple[type[KFAC], dict[str, Any]]] = [
    (KFAC, {"inverse": "eigen"}),
    (KFAC, {"inverse": "tikhonov"}),
    (TwoLevelKFAC, {"inverse": "eigen", "coarse_fisher": "kronecker"}),
    (TwoLevelKFAC, {"inverse": "tikhonov", "coarse_fisher": "exact"}),
]
each_variant = pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)


def through_a_file(state: Any) -> Any:
    """``torch.save`` and ``torch.load`` with its safe defaults."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def assert_equal(left: Any, right: Any) -> None:
    """Nested states are the same, bit by bit; NaN equals NaN."""
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


@each_variant
@pytest.mark.parametrize("steps", [0, 1, 3, INVERSES], ids=lambda steps: f"after-{steps}")
def test_save_load_continue_is_bit_identical(kind: type[KFAC], options: dict[str, Any], steps: int) -> None:
    model = network()
    optimizer = build(kind, model, **options)
    train(model, optimizer, steps)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    fresh = network(seed=1)
    other = build(kind, fresh, **options, lr=9.0, generator=torch.Generator().manual_seed(8))
    train(fresh, other, 2)  # with a past of its own, to be forgotten
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for one, its_optimizer in ((model, optimizer), (fresh, other)):
        train(one, its_optimizer, 2 * INVERSES, first=steps)
    assert same(model, fresh)
    assert_equal(other.state_dict(), optimizer.state_dict())


@each_optimizer
def test_replicas_go_on_with_their_generators_and_their_failures(kind: type[KFAC]) -> None:
    def spoil(step: int, x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor(1), torch.nan)

    model, fresh = replicated(), replicated()
    optimizer, other = build(kind, model, generator=seeds()), build(kind, fresh, generator=seeds())
    with pytest.warns(RuntimeWarning):
        train_replicas(model, optimizer, 3, spoil=spoil)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.diverged.tolist() == [False, True, False]
    assert other.rejected_samples == optimizer.rejected_samples > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one, its_optimizer in ((model, optimizer), (fresh, other)):
            train_replicas(one, its_optimizer, 4, first=3)
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))
    assert_equal(other.state_dict(), optimizer.state_dict())


def test_the_entry_is_keyed_by_module_name() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

    for model in (network(), Wrapper()):
        assert list(build(KFAC, model).state_dict()["preconditioner"]["layers"]) == ["0", "3", "5"]


def test_scheduled_options_are_saved() -> None:
    optimizer, other = build(KFAC, network()), build(KFAC, network())
    optimizer.param_groups[0].update(damping=0.5, kl_clip=None, factor_interval=7, inverse_interval=70)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["damping"] == 0.5
    assert other.param_groups[0]["kl_clip"] is None
    assert other.param_groups[0]["factor_interval"] == 7


def test_loading_forgets_a_sample_under_way() -> None:
    model = network()
    optimizer = build(KFAC, model)
    output = model(batch(0)[0])
    optimizer.update_curvature(output)
    optimizer.load_state_dict(optimizer.state_dict())
    output.sum().backward()
    with pytest.raises(RuntimeError, match="update_curvature"):
        optimizer.step()


@each_variant
def test_a_held_preconditioner_state_is_not_changed_by_later_steps(
    kind: type[KFAC], options: dict[str, Any]
) -> None:
    model, fresh = network(), network()
    optimizer, other = build(kind, model, **options), build(kind, fresh, **options)
    train(model, optimizer, 3)
    held = optimizer.state_dict()["preconditioner"]
    kept = copy.deepcopy(held)
    train(model, optimizer, 2 * INVERSES, first=3)
    assert_equal(held, kept)
    other.load_state_dict({**optimizer.state_dict(), "preconditioner": held})
    train(fresh, other, 2 * INVERSES, first=3)
    assert_equal(held, kept)


def wider() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def in_two_groups(model: nn.Module) -> KFAC:
    first, *others = model.parameters()
    return build(TwoLevelKFAC, model, params=[{"params": [first]}, {"params": others}])


FOREIGN: dict[str, tuple[Any, str]] = {
    "SGD": (lambda: sgd(network()), "no 'preconditioner' entry"),
    "other layers": (lambda: build(TwoLevelKFAC, network(), exclude=["3"]), "other layers.*differ in: 3"),
    "other widths": (lambda: build(TwoLevelKFAC, wider()), "shape"),
    "other inverse": (lambda: build(TwoLevelKFAC, network(), inverse="tikhonov"), "another `inverse`"),
    "one level": (lambda: build(KFAC, network()), "coarse space"),
    "other coarse Fisher": (lambda: build(TwoLevelKFAC, network(), coarse_fisher="exact"), "coarse_fisher"),
    "other groups": (lambda: in_two_groups(network()), "parameter groups"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_state_is_refused_and_nothing_is_taken_from_it(foreign: str) -> None:
    model = network()
    optimizer = build(TwoLevelKFAC, model)
    train(model, optimizer, 3)
    make, message = FOREIGN[foreign]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make().state_dict())
    assert_equal(optimizer.state_dict(), before)


def test_one_level_refuses_the_state_of_two() -> None:
    with pytest.raises(ValueError, match="coarse space"):
        build(KFAC, network()).load_state_dict(build(TwoLevelKFAC, network()).state_dict())


@each_optimizer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copying_the_optimizer_is_an_error(kind: type[KFAC], duplicate: Any) -> None:
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        duplicate(build(kind, network()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@each_variant
def test_a_state_loads_on_another_device(kind: type[KFAC], options: dict[str, Any]) -> None:
    model = network()
    optimizer = build(kind, model, **options)
    train(model, optimizer, 3, empirical=True)
    other_model = network().cuda()
    other = build(kind, other_model, **options)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 6, first=3, empirical=True)
    train(other_model, other, 6, first=3, empirical=True)
    assert_close(model, other_model.cpu(), rtol=1e-6, atol=1e-7)


def test_a_state_with_one_count_for_all_replicas_is_taken_over() -> None:
    model = network()
    optimizer = build(KFAC, model)
    train(model, optimizer, 1)
    older = optimizer.state_dict()
    older["preconditioner"] |= {"rejected_samples": 3, "failed_inverses": 2}
    optimizer.load_state_dict(older)
    assert (optimizer.rejected_samples, optimizer.failed_inverses) == (3, 2)
