"""State-dict hooks and ``torch.distributed.checkpoint``: both see the preconditioner's entry."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import load, save  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import INVERSES, build, each_optimizer, layer_of, network, same, train, values
from tests.optim.test_state import assert_equal, sgd, through_a_file

WAYS = {"plain": StateDictOptions(), "full": StateDictOptions(full_state_dict=True, cpu_offload=True)}


def trained(kind: type[KFAC], steps: int, **options: Any) -> tuple[nn.Module, KFAC]:
    model = network(dtype=torch.float32)  # the coarse matrix is float64 all the same
    optimizer = build(kind, model, **options)
    train(model, optimizer, steps)
    return model, optimizer


def assert_goes_on(kind: type[KFAC], model: nn.Module, optimizer: KFAC, first: int, **options: Any) -> None:
    """As an optimizer that was never interrupted."""
    twin, its_optimizer = trained(kind, first, **options)
    for one, other in ((model, optimizer), (twin, its_optimizer)):
        train(one, other, 2 * INVERSES, first=first)
    assert same(model, twin)
    assert_equal(optimizer.state_dict()["preconditioner"], its_optimizer.state_dict()["preconditioner"])


# -- hooks ------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_post_hooks_see_and_change_the_entry(kind: type[KFAC], prepend: bool) -> None:
    _, optimizer = trained(kind, 3)
    handle = optimizer.register_state_dict_post_hook(
        lambda _, state: state["preconditioner"].update(iteration=17), prepend=prepend
    )
    assert optimizer.state_dict()["preconditioner"]["iteration"] == 17
    handle.remove()
    assert optimizer.state_dict()["preconditioner"]["iteration"] == 3


def test_a_post_hook_may_replace_the_state_dict() -> None:
    _, optimizer = trained(KFAC, 3)
    optimizer.register_state_dict_post_hook(lambda _, state: {"inside": state})
    assert set(optimizer.state_dict()["inside"]) == {"state", "param_groups", "preconditioner"}


def test_a_post_hook_that_drops_the_entry_leaves_none_anywhere() -> None:
    _, optimizer = trained(KFAC, 3)
    optimizer.register_state_dict_post_hook(lambda _, state: state.pop("preconditioner") and None)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="no 'preconditioner' entry"):
        build(KFAC, network()).load_state_dict(state)


@each_optimizer
def test_load_pre_hooks_see_and_change_the_entry(kind: type[KFAC]) -> None:
    """Such a hook renames the layers of an old checkpoint."""
    _, optimizer = trained(kind, 3)
    saved = optimizer.state_dict()
    entry = saved["preconditioner"]
    old = {**entry, "layers": {f"old.{name}": state for name, state in entry["layers"].items()}}

    def rename(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        layers = {name.removeprefix("old."): x for name, x in state["preconditioner"]["layers"].items()}
        return {**state, "preconditioner": {**state["preconditioner"], "layers": layers}}

    model = network(dtype=torch.float32)
    other = build(kind, model)
    with pytest.raises(ValueError, match="other layers"):
        other.load_state_dict({**saved, "preconditioner": old})
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict({**saved, "preconditioner": old})
    assert_equal(other.state_dict()["preconditioner"], entry)


def test_load_post_hooks_see_the_loaded_state_and_all_hooks_stay_the_users() -> None:
    seen: list[int] = []
    _, optimizer = trained(KFAC, 3)
    other = build(KFAC, network(dtype=torch.float32))
    other.register_load_state_dict_post_hook(
        lambda _: seen.append(other.state_dict()["preconditioner"]["iteration"]), prepend=True
    )
    for _ in range(2):
        other.load_state_dict(optimizer.state_dict())
    assert seen == [3, 3]


def test_a_checkpoint_with_the_top_level_entry_alone_loads() -> None:
    """The format before the entry had a second place."""
    model, optimizer = trained(TwoLevelKFAC, 3)
    state = through_a_file(optimizer.state_dict())
    state["state"] = {k: {"momentum_buffer": own["momentum_buffer"]} for k, own in state["state"].items()}
    fresh = network(seed=1, dtype=torch.float32)
    other = build(TwoLevelKFAC, fresh)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert_goes_on(TwoLevelKFAC, fresh, other, 3)


def test_the_second_place_costs_nothing(tmp_path: Path) -> None:
    _, optimizer = trained(TwoLevelKFAC, 3)
    state = optimizer.state_dict()
    assert state["state"][0]["preconditioner"] is state["preconditioner"]
    assert "preconditioner" not in optimizer.state[optimizer.param_groups[0]["params"][0]]
    torch.save(state, tmp_path / "both.pt")
    state["state"][0].pop("preconditioner")
    torch.save(state, tmp_path / "one.pt")
    assert (tmp_path / "both.pt").stat().st_size - (tmp_path / "one.pt").stat().st_size < 256


# -- torch.distributed.checkpoint -------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize(("way", "momentum"), [("plain", 0.9), ("plain", 0.0), ("full", 0.9)])
@pytest.mark.parametrize(("steps", "past"), [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_get_and_set_go_on_bit_identically(
    kind: type[KFAC], way: str, momentum: float, steps: int, past: int
) -> None:
    model, optimizer = trained(kind, steps, momentum=momentum)
    optimizer.zero_grad()
    state = through_a_file(get_optimizer_state_dict(model, optimizer, options=WAYS[way]))
    assert_goes_on(kind, model, optimizer, steps, momentum=momentum)  # getting it changes nothing

    fresh = network(seed=1, dtype=torch.float32)
    other = build(kind, fresh, lr=9.0, momentum=momentum, generator=torch.Generator().manual_seed(8))
    train(fresh, other, past)
    fresh.load_state_dict(trained(kind, steps, momentum=momentum)[0].state_dict())
    other.zero_grad()
    set_optimizer_state_dict(fresh, other, state, options=WAYS[way])
    assert_goes_on(kind, fresh, other, steps, momentum=momentum)


@each_optimizer
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_through_files_of_distributed_checkpoint(kind: type[KFAC], tmp_path: Path) -> None:
    """Its way: the fresh optimizer's state is filled in place, then set."""
    model, optimizer = trained(kind, 3)
    save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    fresh = network(seed=1, dtype=torch.float32)
    other = build(kind, fresh)
    state = get_optimizer_state_dict(fresh, other)
    load({"optimizer": state}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(fresh, other, state)
    fresh.load_state_dict(model.state_dict())
    assert_goes_on(kind, fresh, other, 3)


def test_frozen_parameters_do_not_carry_it() -> None:
    model, optimizer = trained(KFAC, 3)
    fresh = network(seed=1, dtype=torch.float32)
    other = build(KFAC, fresh)
    for one in (model, fresh):
        layer_of(one, 0).requires_grad_(False)
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(fresh, other, state)
    assert_equal(other.state_dict()["preconditioner"], optimizer.state_dict()["preconditioner"])


def test_flattening_is_refused() -> None:
    model, optimizer = trained(KFAC, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.raises(NotImplementedError, match="Flattening optimizer state_dict only supports"):
        get_optimizer_state_dict(model, optimizer, options=options)


def test_the_state_of_sgd_is_refused() -> None:
    model, other = network(), network()
    state = get_optimizer_state_dict(model, sgd(model))
    with pytest.raises(ValueError, match="no 'preconditioner' entry"):
        set_optimizer_state_dict(other, build(KFAC, other), state)


@each_optimizer
def test_making_a_fresh_state_is_no_step_and_no_excuse(kind: type[KFAC]) -> None:
    model = network(dtype=torch.float32)
    optimizer, before = build(kind, model), values(model)
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, values(model), strict=True))
    assert optimizer.state_dict()["preconditioner"]["iteration"] == 0
    assert not any(own["momentum_buffer"].any() for own in optimizer.state.values())
    with pytest.raises(RuntimeError, match="update_curvature"):
        optimizer.step()
