"""Relatives of K-FAC against dense definitions, in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.study.one_level import FOOF, EmpiricalKFAC
from kfac2 import KFAC
from kfac2.nn import ReplicatedLinear
from tests.reference.precision import float64

REPLICAS, SAMPLES = 2, 6
OPTIONS: dict[str, Any] = {"likelihood": "bernoulli", "kl_clip": None, "momentum": 0.0, "weight_decay": 0.0}


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def network() -> nn.Sequential:
    draws = [torch.Generator().manual_seed(r) for r in range(REPLICAS)]
    layers = [ReplicatedLinear(REPLICAS, *sizes, generators=draws) for sizes in ((4, 3), (3, 1))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(REPLICAS, 4, SAMPLES, generator=generator)
    return x, torch.randint(2, (REPLICAS, SAMPLES), generator=generator).double()


def step(model: nn.Module, optimizer: KFAC, seed: int = 0, **labels: Tensor) -> None:
    x, y = batch(seed)
    optimizer.zero_grad()
    output = model(x).squeeze(1)
    optimizer.update_curvature(output, **labels)
    F.binary_cross_entropy_with_logits(output, y, reduction="none").mean(1).sum().backward()
    optimizer.step()


def test_foof_divides_by_the_inputs_second_moments_alone() -> None:
    model = network()
    layer = model[0]
    assert isinstance(layer, ReplicatedLinear)
    before = layer.weight.detach().clone()
    step(model, FOOF(model, 0.5, damping=0.1, **OPTIONS))
    x, _ = batch()
    A = x @ x.mT / SAMPLES + 0.1 * torch.eye(4)
    assert layer.weight.grad is not None
    expected = before - 0.5 * layer.weight.grad @ torch.linalg.inv(A)
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_the_empirical_fisher_has_the_data_s_labels() -> None:
    models = network(), network()
    optimizers = [
        kind(model, 0.5, damping=0.1, factor_interval=2, inverse_interval=2, **OPTIONS)
        for kind, model in zip((EmpiricalKFAC, KFAC), models, strict=True)
    ]
    for seed in range(5):
        step(models[0], optimizers[0], seed)
        step(models[1], optimizers[1], seed, labels=batch(seed)[1])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
