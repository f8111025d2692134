"""``coverage`` and ``print(optimizer)`` tell what has happened, not what was planned."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import FACTORS, INPUTS, INVERSES, batch, build, each_optimizer, layer_of, network, train


class Sometimes(nn.Module):
    """``spare`` and ``rest`` take part only where ``use`` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.spare, self.rest = (nn.Linear(INPUTS, 3).double() for _ in range(2))
        self.use = False

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (self.spare(x) + self.rest(x) if self.use else 0)


def plain_lines(optimizer: KFAC) -> dict[str, str]:
    return {line.parameter: line.reason for line in optimizer.coverage if not line.preconditioned}


@each_optimizer
def test_layers_that_no_refresh_has_seen_are_said_to_be_plain(kind: type[KFAC]) -> None:
    model = Sometimes()
    optimizer = build(kind, model)
    norm = {f"body.1.{key}": "BatchNorm1d is not a supported layer" for key in ("weight", "bias")}
    assert plain_lines(optimizer) == norm
    with pytest.warns(UserWarning, match="seen no call of layers spare, rest: they take plain steps") as told:
        train(model, optimizer, 1)
    assert len(told) == 1
    never = {
        f"{name}.{key}": "never seen by a refresh" for name in ("spare", "rest") for key in ("weight", "bias")
    }
    assert plain_lines(optimizer) == norm | never
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, FACTORS, first=1)
        assert plain_lines(optimizer) == norm | never
        model.use = True
        train(model, optimizer, FACTORS, first=FACTORS + 1)
    assert plain_lines(optimizer) == norm


@each_optimizer
def test_a_layer_frozen_now_and_unfrozen_later(kind: type[KFAC]) -> None:
    model = network()
    layer_of(model, 3).requires_grad_(False)
    optimizer = build(kind, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    lines = {line.parameter: str(line) for line in optimizer.coverage}
    assert lines["3.weight"].endswith("preconditioned (Kronecker-factored block of a Linear, frozen now)")
    layer_of(model, 3).weight.requires_grad_(True)
    lines = {line.parameter: str(line) for line in optimizer.coverage}
    assert lines["3.weight"] == "3.weight: plain (never seen by a refresh)"
    train(model, optimizer, INVERSES, first=1)
    lines = {line.parameter: str(line) for line in optimizer.coverage}
    assert lines["3.weight"] == "3.weight: preconditioned (Kronecker-factored block of a Linear)"


@pytest.mark.parametrize(
    ("inverse", "per_layer"), [("eigen", 2 * (25 + 16) + 20), ("tikhonov", 2 * (25 + 16))]
)
def test_the_print_starts_with_a_summary(inverse: str, per_layer: int) -> None:
    """Two 4 x 5 gradients take A, G, and an eigendecomposition or two inverses, in float64."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = build(KFAC, model, inverse=inverse, exclude=["3"])
    head, shapes, *_ = repr(optimizer).splitlines()
    assert head.startswith("2 layers with 63.5% of 63 parameters are preconditioned, 0.0 MiB of curvature")
    assert shapes == "    2 Linear with gradients of 4 x 5"
    flags = 2 * 2  # seen and attempted
    assert optimizer.preconditioner.memory() == 2 * per_layer * 8 + flags
    two = build(TwoLevelKFAC, model, inverse=inverse, exclude=["3"])
    assert two.preconditioner.memory() > optimizer.preconditioner.memory()


def test_the_summary_counts_what_is_at_work() -> None:
    model = Sometimes()
    optimizer = build(KFAC, model)
    assert repr(optimizer).startswith("5 layers with 91.4% of 93 parameters")  # all but the batch norm
    with pytest.warns(UserWarning, match="spare, rest"):
        train(model, optimizer, 1)
    share = 55 / 93
    assert re.match(rf"3 layers with {share:.1%} of 93 parameters", repr(optimizer))


def test_layers_outside_the_coarse_space_are_named() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(INPUTS, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(x)).mean(0))

    model = TimeFirst()
    optimizer = build(TwoLevelKFAC, model)
    x, y = torch.randn(8, 8, INPUTS), batch(0)[1]
    output = model(x)
    with pytest.warns(RuntimeWarning, match="no coarse correction for 1 of 2"):
        optimizer.update_curvature(output)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    outside = [line.parameter for line in optimizer.coverage if "outside the coarse space" in line.reason]
    assert outside == ["inner.weight", "inner.bias"]
    assert all(line.preconditioned for line in optimizer.coverage)
