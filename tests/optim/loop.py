"""A small network and a training loop as users write it, shared by the behaviour tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC
from kfac2.nn import ReplicatedLinear

INPUTS, CLASSES, BATCH, REPLICAS = 4, 3, 8, 3
FACTORS, INVERSES = 2, 4  # refresh at steps 0, 2, 4, … and 0, 4, …
each_optimizer = pytest.mark.parametrize("kind", [KFAC, TwoLevelKFAC])
each_inverse = pytest.mark.parametrize("inverse", ["eigen", "tikhonov"])


def network(seed: int = 0, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """Three linear layers, two of one shape, and a batch norm."""
    torch.manual_seed(seed)
    layers = nn.Linear(INPUTS, 4, bias), nn.Linear(4, 4, bias), nn.Linear(4, CLASSES, bias)
    model = nn.Sequential(layers[0], nn.BatchNorm1d(4), nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    return model.to(dtype)


def replicated(replicas: int = REPLICAS) -> nn.Sequential:
    """Two layers in each replica; a replica's values do not depend on how many others there are."""
    seeds = [torch.Generator().manual_seed(r) for r in range(replicas)]
    return nn.Sequential(
        ReplicatedLinear(replicas, INPUTS, 4, bias=True, generators=seeds),
        nn.Tanh(),
        ReplicatedLinear(replicas, 4, CLASSES, generators=seeds),
    ).double()


def layer_of(model: nn.Module, index: int) -> nn.Linear:
    """Typed access to a linear layer of a ``nn.Sequential``."""
    layer = model.get_submodule(str(index))
    assert isinstance(layer, nn.Linear)
    return layer


def grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def seeds(replicas: int = REPLICAS) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + r) for r in range(replicas)]


def build(kind: type[KFAC], model: nn.Module, **options: Any) -> KFAC:
    """Refreshes inside a few steps, every feature on, seeded label draws."""
    defaults = {
        "lr": 0.05,
        "damping": 1e-2,
        "kl_clip": 1e-2,
        "factor_interval": FACTORS,
        "inverse_interval": INVERSES,
        "generator": torch.Generator().manual_seed(7),
    }
    return kind(model, **(defaults | options))


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    first: int = 0,
    call: Callable[[Tensor], Tensor] | None = None,
    before: Callable[[int], None] = lambda step: None,
    empirical: bool = False,
) -> None:
    """``steps`` steps; ``call`` stands in for the model, ``before`` is called ahead of each step."""
    for step in range(first, first + steps):
        before(step)
        parameter = next(model.parameters())
        x, y = (data.to(parameter.device) for data in batch(step, parameter.dtype))
        optimizer.zero_grad()
        output = (call or model)(x)
        optimizer.update_curvature(output, labels=y if empirical else None)
        F.cross_entropy(output, y).backward()
        optimizer.step()


def train_replicas(
    model: nn.Module,
    optimizer: KFAC,
    steps: int,
    first: int = 0,
    spoil: Callable[[int, Tensor], Tensor] = lambda step, x: x,
    which: slice = slice(None),
) -> None:
    """Every replica on data of its own; ``spoil`` may change the inputs ``(R, d, B)`` of a step."""
    for step in range(first, first + steps):
        generators = [torch.Generator().manual_seed(10 * step + r) for r in range(REPLICAS)]
        x = torch.stack([torch.randn(INPUTS, BATCH, generator=g) for g in generators]).double()
        y = torch.stack([torch.randint(CLASSES, (BATCH,), generator=g) for g in generators])
        optimizer.zero_grad()
        output = model(spoil(step, x)[which]).mT
        optimizer.update_curvature(output)
        F.cross_entropy(output.flatten(0, 1), y[which].flatten(), reduction="sum").backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: nn.Module, right: nn.Module) -> bool:
    """Bit by bit, buffers included."""
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def assert_close(left: nn.Module, right: nn.Module, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    for x, y in zip(values(left), values(right), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
