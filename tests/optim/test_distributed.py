"""Several processes on shares of a batch train as one process on all of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import CASES, FOUR, KINDS, STEPS, Case, Network, make, run, share
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kfac2 import KFAC


def outcome(case: Case, kind: str, rank: int) -> dict[str, Any]:
    model, optimizer = case.in_process(kind, rank)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "failures": optimizer.failures}


def all_in_two(rank: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {
        (name, kind): outcome(CASES[name], kind, rank) for name in CASES for kind in KINDS
    }
    model, optimizer = CASES["equal"].in_process("two levels", rank, steps=3)
    results["half-way"] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    results["draws"] = draws()
    results["forgotten"] = forgotten(rank)
    results["used elsewhere"] = used_elsewhere(rank)
    return results


def all_in_four(rank: int) -> dict[Any, Any]:
    return {(name, kind): outcome(FOUR[name], kind, rank) for name in FOUR for kind in KINDS}


def draws() -> list[Tensor]:
    """The G of the head, of labels drawn for the same batch in all processes, without adding them up."""
    model = Network()
    optimizer = make("one level", model)
    x, _ = share(0, 0, [12])
    drawn = []
    for _ in range(2):
        generators = optimizer.preconditioner.processes.generators(optimizer._generators)
        output = model(x)
        (gradient,) = torch.autograd.grad(optimizer._loss.sample(output, generators), output)
        drawn.append(gradient)
    return [*drawn, optimizer.state_dict()["preconditioner"]["generators"][0]]


def forgotten(rank: int) -> str:
    """One process does not observe: none may wait for it for ever."""
    model = Network()
    optimizer = make("two levels", model)
    x, y = share(0, 0, [12])
    output = DistributedDataParallel(model)(x)
    if rank == 0:
        optimizer.update_curvature(output)
    (output - y).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


class Tied(nn.Module):
    """Its first layer's weight may enter the loss beside the layer's call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, tied: bool) -> Tensor:
        h = self.one(x)
        return self.two(h @ self.one.weight if tied else h)


def used_elsewhere(rank: int) -> dict[str, Any]:
    model = Tied()
    optimizer = make("one level", model)
    ddp = DistributedDataParallel(model)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * step + rank), dtype=torch.float64)
        output = ddp(x, tied=rank == 0)
        optimizer.update_curvature(output)
        output.square().mean().backward()
        optimizer.step()
    reasons = {line.parameter: (line.preconditioned, line.reason) for line in optimizer.coverage}
    return {"model": model.state_dict(), "reasons": reasons}


@pytest.fixture(scope="module")
def two() -> list[dict[Any, Any]]:
    return run(2, all_in_two)


def assert_trained_alike(case: Case, kind: str, ranks: list[dict[str, Any]]) -> None:
    model, optimizer = case.alone(kind)
    for own in ranks:
        for name, value in model.state_dict().items():
            assert value.isfinite().all()
            torch.testing.assert_close(own["model"][name], value, rtol=1e-9, atol=1e-12)
            assert torch.equal(own["model"][name], ranks[0]["model"][name])
        assert own["failures"]["rejected_samples"].equal(optimizer.failures["rejected_samples"])
    untrained = Network().state_dict()
    assert all(not torch.equal(value, untrained[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:iteration", "ignore:the first refresh")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_joint_batch(two: Any, name: str, kind: str) -> None:
    assert_trained_alike(CASES[name], kind, [own[name, kind] for own in two])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_are_one_on_the_joint_batch(kind: str) -> None:
    ranks = run(4, all_in_four)
    for name, case in FOUR.items():
        assert_trained_alike(case, kind, [own[name, kind] for own in ranks])


def test_one_process_goes_on_from_the_state_of_two(two: Any) -> None:
    case, model = CASES["equal"], Network()
    optimizer = make("two levels", model)
    model.load_state_dict(two[0]["half-way"]["model"])
    optimizer.load_state_dict(two[0]["half-way"]["optimizer"])
    case.train(model, optimizer, range(2), range(3, STEPS))
    for name, value in two[1]["equal", "two levels"]["model"].items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_each_process_draws_labels_of_its_own(two: Any) -> None:
    (first, second, state), (other_first, other_second, other_state) = (own["draws"] for own in two)
    for one, another in [(first, other_first), (second, other_second), (first, second)]:
        assert not (one == another).any()
    assert torch.equal(state, other_state)  # one process's state is all processes'


def test_an_observation_forgotten_by_one_is_an_error_in_all(two: Any) -> None:
    assert all("update_curvature(output)" in own["forgotten"] for own in two)
    assert all("in every process" in own["forgotten"] for own in two)


def test_a_layer_left_plain_by_one_is_plain_in_all(two: Any) -> None:
    first, second = (own["used elsewhere"] for own in two)
    assert first["reasons"]["one.weight"] == (False, "its weight is used outside the layer's own calls")
    assert second["reasons"]["one.weight"] == (False, "left to plain SGD by another process")
    assert first["reasons"]["two.weight"][0]
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("group_of_one")
def test_a_group_of_one_changes_nothing(kind: str) -> None:
    def trained(wrap: bool) -> tuple[nn.Module, KFAC]:
        model = Network()
        optimizer = make(kind, model)
        call = DistributedDataParallel(model) if wrap else model
        for step in range(STEPS):
            x, y = share(step, 0, [12])
            optimizer.zero_grad()
            output = call(x)
            optimizer.update_curvature(output)
            (output - y).square().mean().backward()
            optimizer.step()
        return model, optimizer

    (alone, optimizer), (wrapped, other) = trained(False), trained(True)
    assert all(torch.equal(x, y) for x, y in zip(alone.parameters(), wrapped.parameters(), strict=True))
    states = (each.state_dict()["preconditioner"]["generators"][0] for each in (optimizer, other))
    assert torch.equal(*states)


@pytest.mark.usefixtures("group_of_one")
def test_a_sharded_model_is_refused() -> None:
    model = Network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"FSDPModule is not supported.*through DistributedDataParallel"):
        KFAC(model)
