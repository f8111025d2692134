"""The exact natural gradient against dense matrices of autograd's Jacobian, in float64."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from experiments.problems import DeepLinearMLP
from experiments.study.directions import CORRECTIONS
from experiments.study.exact import ExactNaturalGradient
from experiments.study.fisher import logit_jacobian
from experiments.study.linearised import representatives
from experiments.training.trainer import Training, TrainingSettings
from kfac2.nn import ReplicatedBatchNorm, ReplicatedLayerNorm
from tests.reference.fisher import restriction

DAMPING, FACTOR = 1e-2, 0.3
Dense = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


NETS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "layer norm": {"batch_norm": False, "layer_norm": True, "activation": "relu"},
}


def problem(seeds: list[int], net: str = "batch norm") -> tuple[Any, Any]:
    """Three hidden layers, narrower than the inputs, in float64, and its first batch; scales and shifts are not one
    and zero."""
    own = DeepLinearMLP(seeds, depth=3, width=7, train_samples=60, test_samples=5, **NETS[net])
    own.model.double()
    with torch.no_grad():
        for norm in own.model.modules():
            if isinstance(norm, ReplicatedBatchNorm | ReplicatedLayerNorm):
                generator = torch.Generator().manual_seed(1)
                for parameter in (norm.weight, norm.bias):
                    noise = torch.rand(7, generator=generator).double() - 0.5
                    parameter.view(len(seeds), 7).add_(noise)
    return own, (own.train_inputs.double().mT.contiguous(), own.train_targets.double())


def solve(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(a, b)


def additive(F: Tensor, P: Tensor, Z: Tensor, g: Tensor) -> Tensor:
    return P @ g + Z.T @ solve(Z @ F @ Z.T + DAMPING * torch.eye(len(Z)).double(), Z @ g)


def galerkin(F: Tensor, P: Tensor, Z: Tensor, g: Tensor) -> Tensor:
    F_ = damped(F)
    return P @ g + Z.T @ solve(Z @ F_ @ Z.T, Z @ (g - F_ @ P @ g))


def residual_corrected(F: Tensor, P: Tensor, Z: Tensor, g: Tensor) -> Tensor:
    F_, one = damped(F), torch.eye(len(F)).double()
    Q = Z.T @ torch.linalg.inv(Z @ F_ @ Z.T) @ Z
    return ((one - Q @ F_) @ P @ (one - F_ @ Q) + Q) @ g


def inverse_of_sum(F: Tensor, P: Tensor, Z: Tensor, g: Tensor) -> Tensor:
    """The inverse of ``P⁻¹ + Zᵀ C° Z``."""
    coarse = Z @ F @ Z.T
    return solve(torch.linalg.inv(P) + Z.T @ (coarse - coarse.diagonal().diag()) @ Z, g)


DENSE: dict[str, Dense] = {
    "full": lambda F, P, Z, g: solve(damped(F), g),
    "block_diagonal": lambda F, P, Z, g: P @ g,
    "additive": additive,
    "galerkin": galerkin,
    "residual_corrected": residual_corrected,
    "inverse_of_sum": inverse_of_sum,
}


def damped(F: Tensor) -> Tensor:
    return F + DAMPING * torch.eye(len(F)).double()


def dense_step(model: nn.Module, x: Tensor, y: Tensor, rule: Dense) -> tuple[list[Tensor], dict[str, float]]:
    """The changes of the linear weights of a model of one replica, and what the block direction does to the logits."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 3]
    logits, J = logit_jacobian(model.train(), x, weights)
    p = logits.sigmoid()
    F = J.T @ ((p * (1 - p) / len(p))[:, None] * J)
    loss = nn.functional.binary_cross_entropy_with_logits(model(x).flatten(), y.flatten())
    g = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])
    sizes = [weight.numel() for weight in weights]
    P = torch.block_diag(*[torch.linalg.inv(block) for block in (damped(F)[a, a] for a in slices(sizes))])
    d = rule(F, P, restriction(sizes).double(), g)
    best = (g @ d) / (d @ damped(F) @ d)
    block, full = J @ P @ g, J @ solve(damped(F), g)
    numbers = {
        "block_cosine": block @ full / block.norm() / full.norm(),
        "block_ratio": block.norm() / full.norm(),
    }
    changes = (-FACTOR * best * d).split(sizes)
    return [c.view_as(w) for c, w in zip(changes, weights, strict=True)], {
        k: float(v) for k, v in numbers.items()
    }


def slices(sizes: list[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def first_step(own: Any, settings: dict[str, Any]) -> None:
    optimizer = ExactNaturalGradient(own.model, 1.0, **settings)
    inputs, targets = next(own.train_batches(20))
    output = own.model(inputs)
    optimizer.update_curvature(output)
    own.losses(output, targets).sum().backward()
    optimizer.step()


def real_step(own: Any, batch: tuple[Tensor, Tensor], correction: str) -> ExactNaturalGradient:
    optimizer = ExactNaturalGradient(own.model, FACTOR, damping=DAMPING, correction=correction, norm_lr=0.1)
    own.model.train()
    output = own.model(batch[0])
    optimizer.update_curvature(output)
    own.losses(output, batch[1]).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_step_is_the_dense_one_replica_by_replica(correction: str, net: str) -> None:
    together, (inputs, targets) = problem([3, 4], net)
    before = [p.detach().clone() for p in together.model.parameters() if p.dim() == 3]
    optimizer = real_step(together, (inputs, targets), correction)
    after = [p.detach() for p in together.model.parameters() if p.dim() == 3]
    for r, seed in enumerate((3, 4)):
        alone, _ = problem([seed], net)
        changes, numbers = dense_step(alone.model, inputs[r : r + 1], targets[r : r + 1], DENSE[correction])
        for old, new, change in zip(before, after, changes, strict=True):
            assert_close(new[r] - old[r], change[0], rtol=1e-7, atol=1e-10)
        for name, value in numbers.items():
            assert float(optimizer.diagnostics[name][r]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_scales_and_shifts_take_gradient_steps(net: str) -> None:
    own, batch = problem([3, 4], net)
    twin = deepcopy(own.model).train()
    real_step(own, batch, "galerkin")
    own.losses(twin(batch[0]), batch[1]).sum().backward()
    for new, old in zip(own.model.parameters(), twin.parameters(), strict=True):
        if old.dim() < 3:
            assert old.grad is not None
            assert_close(new, old - 0.1 * old.grad, rtol=1e-7, atol=1e-10)


def test_representatives_have_the_batch_s_mean_and_covariance() -> None:
    inputs = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0)).double() * 3 + 1
    points = representatives(inputs)
    assert points.shape == (2, 4, 5)
    for of_points, of_inputs in zip(points, inputs, strict=True):
        assert_close(of_points.mean(1), of_inputs.mean(1))
        assert_close(torch.cov(of_points, correction=0), torch.cov(of_inputs, correction=0))


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1)


def test_one_layer_with_nothing_between_is_no_correction_away_from_the_full_step() -> None:
    """A single block is the whole matrix: block-diagonal, Galerkin and full agree."""
    own = DeepLinearMLP([0], depth=3, train_samples=60, test_samples=5)
    steps = {}
    for correction in ("full", "block_diagonal", "galerkin", "residual_corrected"):
        layer: Any = deepcopy(list(own.model.layers.modules())[-1]).double()
        single = OneLayer(layer)
        optimizer = ExactNaturalGradient(single, 1.0, damping=DAMPING, correction=correction)
        output = single(own.train_inputs.double().mT.contiguous())
        optimizer.update_curvature(output)
        own.losses(output, own.train_targets.double()).sum().backward()
        optimizer.step()
        steps[correction] = layer.weight.detach()
    for weight in steps.values():
        assert_close(weight, steps["full"])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"activation": "relu"}, {}, "linear layers with batch norm"),
        ({"train_samples": 10}, {}, "at least 11"),
        ({}, {"correction": "half"}, "choose from full, block_diagonal"),
        ({}, {"momentum": 0.9}, "no momentum"),
        ({}, {"damping": 0.0}, "must be positive"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"damping": 1e-2} | options
    sizes: dict[str, Any] = {"depth": 4, "train_samples": 20, "test_samples": 5}
    own = DeepLinearMLP([0], **(sizes | changes))
    with pytest.raises(ValueError, match=message):
        first_step(own, settings)


@pytest.mark.parametrize("net", NETS)
def test_it_trains_in_the_trainer(net: str) -> None:
    own = DeepLinearMLP([0, 1], depth=4, train_samples=100, test_samples=20, **NETS[net])
    run = Training(own, partial(ExactNaturalGradient, lr=0.3, damping=1e-4), TrainingSettings(6, 50))
    rows = [row for _ in range(6) for row in run.train_epoch()]
    for first, last in zip(rows[:2], rows[-2:], strict=True):
        assert last["full_batch_loss"] < 0.5 * first["train_loss"]
        assert 0 < last["block_cosine"] <= 1
