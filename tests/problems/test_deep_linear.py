"""The deep linear MLP: planted data, initialisation, and replicas that evolve as they would alone."""

import math
from typing import Any

import pytest
import torch

from experiments.problems import DeepLinearMLP
from kfac2 import KFAC, TwoLevelKFAC
from kfac2.optim.first_order import SGD, Adam

SMALL: dict[str, Any] = {"depth": 4, "train_samples": 96, "test_samples": 24}
OPTIMIZERS = {
    "sgd": (SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
    "adam": (Adam, {"weight_decay": 1e-3}),
    "kfac": (KFAC, {"factor_interval": 2, "inverse_interval": 6}),
    "two_level_kfac": (TwoLevelKFAC, {"factor_interval": 2, "inverse_interval": 6}),
}


def in_float64(problem: DeepLinearMLP) -> DeepLinearMLP:
    problem.model.double()
    problem.train_inputs, problem.test_inputs = problem.train_inputs.double(), problem.test_inputs.double()
    problem.train_targets, problem.test_targets = (
        problem.train_targets.double(),
        problem.test_targets.double(),
    )
    return problem


def losses_of(seeds: list[int], optimizer_name: str, steps: int = 36) -> torch.Tensor:
    """Training losses ``(steps, R)``, float64."""
    problem = in_float64(DeepLinearMLP(seeds, **SMALL))
    factory, options = OPTIMIZERS[optimizer_name]
    optimizer = factory(
        problem.model, 1e-2, likelihood="bernoulli", generator=problem.label_generators, **options
    )
    history = []
    while len(history) < steps:
        for inputs, targets in problem.train_batches(32):
            optimizer.zero_grad()
            output = problem.model(inputs)
            optimizer.update_curvature(output)
            losses = problem.losses(output, targets)
            losses.sum().backward()
            optimizer.step()
            history.append(losses.detach())
    return torch.stack(history[:steps])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_replica_evolves_as_it_would_alone(name: str) -> None:
    together = losses_of([3, 1, 4], name)
    alone = torch.cat([losses_of([seed], name) for seed in (3, 1, 4)], dim=1)
    # Rounding of batched against single products grows along a trajectory, hence not 1e-15.
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)
    assert together[:, 0].sub(together[:, 1]).abs().min() > 1e-6


def test_same_batches_for_every_optimizer() -> None:
    first, second = DeepLinearMLP([0, 1], **SMALL), DeepLinearMLP([0, 1], **SMALL)
    torch.rand(5, generator=first.label_generators[0])
    for (x, _), (y, _) in zip(first.train_batches(32), second.train_batches(32), strict=True):
        assert torch.equal(x, y)


def test_an_epoch_shows_every_sample_once_in_a_new_order() -> None:
    problem = DeepLinearMLP([0], **SMALL)
    epochs = [torch.cat([x for x, _ in problem.train_batches(40)], dim=2)[0].T for _ in range(2)]
    assert [x.shape[-1] for x, _ in problem.train_batches(40)] == [40, 40, 16]
    assert not torch.equal(*epochs)
    known = {tuple(row) for row in problem.train_inputs[0].tolist()}
    assert all({tuple(row) for row in epoch.tolist()} == known for epoch in epochs)


def test_targets_are_a_linear_rule_and_inputs_standard_normal() -> None:
    problem = DeepLinearMLP([0, 1], train_samples=5000, test_samples=500)
    for r in range(2):
        inputs = torch.cat([problem.train_inputs[r], problem.test_inputs[r]]).double()
        targets = torch.cat([problem.train_targets[r], problem.test_targets[r]]).double()
        direction = torch.linalg.lstsq(inputs, (2 * targets - 1)[:, None]).solution
        agreement = ((inputs @ direction)[:, 0] > 0) == (targets > 0.5)
        assert agreement.double().mean() > 0.97
        assert inputs.mean(0).abs().max() < 0.06
        assert (inputs.T @ inputs / len(inputs) - torch.eye(10)).abs().max() < 0.08
    assert not torch.equal(problem.train_inputs[0], problem.train_inputs[1])


def test_initialisation_is_he_uniform_and_the_paper_s_size() -> None:
    problem = DeepLinearMLP([0])
    weights = [p for name, p in problem.model.named_parameters() if p.dim() == 3]
    assert len(weights) == 65
    assert sum(w.numel() for w in weights) == 64 * 100 + 10
    stacked = torch.cat([w.flatten() for w in weights])
    bound = math.sqrt(6 / 10)
    assert stacked.abs().max() <= bound
    assert stacked.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": "tanh"},
        {"batch_norm": False},
        {"batch_norm": False, "layer_norm": True},
    ],
)
def test_variants_run(options: dict) -> None:
    problem = DeepLinearMLP([0, 1], width=7, **SMALL, **options)
    inputs, targets = next(problem.train_batches(16))
    output = problem.model(inputs)
    assert output.shape == targets.shape == (2, 16)
    assert problem.losses(output, targets).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds must be distinct"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"depth": 0}, "depth must be positive"),
        ({"layer_norm": True}, "one kind of norm"),
        ({"activation": "gelu"}, "choose from identity, relu, tanh"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepLinearMLP(**options)


def test_accuracy_and_loss_are_per_seed() -> None:
    problem = DeepLinearMLP([0, 1], **SMALL)
    output = torch.tensor([[2.0, -3.0], [1.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert problem.accuracies(output, targets).tolist() == [1.0, 0.5]
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))) / 2
    assert problem.losses(output, targets)[0].item() == pytest.approx(expected, rel=1e-6)
