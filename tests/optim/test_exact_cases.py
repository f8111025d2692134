"""KFAC and TwoLevelKFAC where the answer is known without a twin."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kfac2 import KFAC, TwoLevelKFAC
from tests.reference.fisher import (
    gaussian_fisher,
    gradient,
    labelled_fisher,
    layer_size,
    linear_layers,
    negative_log_likelihood,
    parameter_vector,
    restriction,
)
from tests.reference.precision import float64
from tests.reference.problems import (
    BERNOULLI,
    CATEGORICAL,
    GAUSSIAN,
    Case,
    Replicated,
    forward,
    real_step,
)

# Float64 rounding, amplified as in test_trajectories.py.
close = partial(assert_close, rtol=1e-10, atol=1e-11)


def options_for(case: Case, **changes: Any) -> dict[str, Any]:
    defaults = {
        "lr": 5e-3,
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "damping": 1e-2,
        "kl_clip": 1e-4,
        "likelihood": case.likelihood,
        "factor_interval": 2,
        "inverse_interval": 4,
    }
    return defaults | changes


NATURAL_GRADIENT = options_for(GAUSSIAN, lr=0.1, momentum=0.0, weight_decay=0.0, kl_clip=None)
OPTIMIZERS: list[tuple[type[KFAC], dict[str, Any]]] = [
    (KFAC, {}),
    (TwoLevelKFAC, {"coarse_fisher": "kronecker"}),
    (TwoLevelKFAC, {"coarse_fisher": "exact"}),
]
each_optimizer = pytest.mark.parametrize(("optimizer_type", "extra"), OPTIMIZERS, ids=["one", "two", "exact"])


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def layer_vector(model: nn.Module) -> Tensor:
    """All parameters of the linear layers, in the order of the explicit Fisher matrices."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    return parameter_vector(list(linear_layers(model)), values)


@pytest.mark.parametrize("replicas", [None, 2])
@pytest.mark.parametrize("inverse", ["eigen", "tikhonov"])
def test_a_coarse_weight_of_zero_is_kfac(replicas: int | None, inverse: str) -> None:
    case = CATEGORICAL
    networks = [case.network(bias=True) for _ in range(replicas or 1)]
    one = Replicated(networks) if replicas else networks[0]
    two = deepcopy(one)
    options = options_for(case, inverse=inverse)
    kfac = KFAC(one, **options)
    two_level = TwoLevelKFAC(two, coarse_weight=0.0, **options)
    for batches in zip(*[case.batches(8) for _ in networks], strict=True):
        real_step(kfac, one, batches)
        real_step(two_level, two, batches)
        assert_close(list(two.parameters()), list(one.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("replicas", [None, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0, 1e3])
def test_the_bound_on_the_correction(replicas: int | None, weight: float) -> None:
    """0 is one level, infinity no bound, and what lies between holds in each replica for itself."""
    case = CATEGORICAL
    networks = [case.network(bias=True) for _ in range(replicas or 1)]
    options = options_for(case, kl_clip=None)
    models = [Replicated(networks) if replicas else deepcopy(networks[0]) for _ in range(5)]
    bounds: list[float | None] = [0.0, None, float("inf"), 0.5]
    kfac = KFAC(models[4], **options)
    zero, none, infinite, half = (
        TwoLevelKFAC(model, coarse_weight=weight, coarse_max_ratio=bound, **options)
        for model, bound in zip(models, bounds, strict=False)
    )
    for batches in zip(*[case.batches(8) for _ in networks], strict=True):
        start = deepcopy(models[1].state_dict())
        for model in models:
            model.load_state_dict(start)
        for optimizer, model in zip((zero, none, infinite, half, kfac), models, strict=True):
            real_step(optimizer, model, batches)
        assert_close(list(models[0].parameters()), list(models[4].parameters()), rtol=0, atol=0)
        assert_close(list(models[1].parameters()), list(models[2].parameters()), rtol=0, atol=0)
        assert not zero.diagnostics["coarse_ratio"].any()
        free = none.diagnostics["coarse_ratio"]
        assert_close(half.diagnostics["coarse_ratio"], free.clamp(max=0.5))


ERRORS = {
    # Mean 0 and covariance I: the labels of a unit-variance Gaussian, so the true Fisher.
    "true": 2**0.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double(),
    "empirical": torch.tensor([[1.0, 2.0], [-0.5, 0.3], [0.1, -1.0]]).double(),
}


@pytest.mark.parametrize("fisher", ERRORS)
@pytest.mark.parametrize("bias", [False, True])
def test_one_linear_layer_follows_the_dense_natural_gradient(fisher: str, bias: bool) -> None:
    """Every input meets every error: ``a`` and ``g`` are independent, and K-FAC is exact."""
    errors = ERRORS[fisher]
    model = nn.Sequential(nn.Linear(3, 2, bias=bias))
    inputs = torch.randn(5, 3).repeat_interleave(len(errors), dim=0)
    targets = torch.randn(len(inputs), 2)
    optimizer = KFAC(model, **NATURAL_GRADIENT)
    for _ in range(6):
        labels = model(inputs).detach() + errors.repeat(5, 1)
        if fisher == "true":
            F = gaussian_fisher(model, inputs)
        else:
            F = labelled_fisher(model, inputs, labels, "gaussian")
            targets = labels  # the empirical Fisher: curvature and gradient from the same labels
        optimizer.zero_grad()
        output = model(inputs)
        loss = negative_log_likelihood(output, targets, "gaussian").mean()
        step = torch.linalg.solve(F + 1e-2 * torch.eye(len(F)), gradient(model, loss))
        expected = layer_vector(model) - 0.1 * step
        optimizer.update_curvature(output, labels=labels)
        loss.backward()
        optimizer.step()
        close(layer_vector(model), expected)


@each_optimizer
def test_one_datum_gives_the_dense_damped_blocks_and_coarse_correction(
    optimizer_type: type[KFAC], extra: dict[str, Any]
) -> None:
    """One sample makes every ``A kron G`` a Fisher block, and both coarse Fishers ``Z F Zᵀ``."""
    model = GAUSSIAN.network(bias=True, batch_norm=False)
    (batch,) = GAUSSIAN.batches(1, size=1)
    optimizer = optimizer_type(model, **(NATURAL_GRADIENT | extra))

    F = labelled_fisher(model, batch.inputs, batch.labels, "gaussian")
    sizes = [layer_size(layer) for layer in linear_layers(model).values()]
    blocks = F * torch.block_diag(*[torch.ones(size, size) for size in sizes])
    nabla = gradient(model, batch.loss(model(batch.inputs)))
    step = torch.linalg.solve(blocks + 1e-2 * torch.eye(len(F)), nabla)
    if optimizer_type is TwoLevelKFAC:
        Z = restriction(sizes)
        step += Z.T @ torch.linalg.solve(Z @ F @ Z.T + 1e-2 * torch.eye(len(Z)), Z @ nabla)
    expected = layer_vector(model) - 0.1 * step

    real_step(optimizer, model, [batch])
    close(layer_vector(model), expected)


@each_optimizer
def test_two_replicas_are_two_runs_also_with_sampled_labels(
    optimizer_type: type[KFAC], extra: dict[str, Any]
) -> None:
    case = BERNOULLI
    networks = [case.network(bias=True) for _ in range(2)]
    options = options_for(case, **extra)
    data = [case.batches(12), case.batches(12)]
    alone = []
    for seed, (network, batches) in enumerate(zip(networks, data, strict=True)):
        model = Replicated([network])
        generator = torch.Generator().manual_seed(seed)
        optimizer = optimizer_type(model, generator=[generator], **options)
        alone.append(sampled_trajectory(optimizer, model, [[batch] for batch in batches]))
    together = Replicated(networks)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    optimizer = optimizer_type(together, generator=generators, **options)
    both = sampled_trajectory(optimizer, together, list(zip(*data, strict=True)))
    for together_now, *alone_now in zip(both, *alone, strict=True):
        for name, value in together_now.items():
            close(value, torch.cat([a[name] for a in alone_now]).reshape(value.shape))


def sampled_trajectory(
    optimizer: KFAC, model: nn.Module, steps: Sequence[Sequence[Any]]
) -> list[dict[str, Tensor]]:
    """The parameters after every step, the curvature's labels drawn by the optimizer."""
    trajectory = []
    for batches in steps:
        optimizer.zero_grad()
        output, _, loss = forward(model, batches)
        optimizer.update_curvature(output)
        loss.backward()
        optimizer.step()
        trajectory.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return trajectory


@each_optimizer
@pytest.mark.parametrize("first", [4, 3], ids=["halves", "uneven"])
@pytest.mark.parametrize("replicas", [None, 2])
def test_micro_batches_add_up_to_the_whole_batch(
    optimizer_type: type[KFAC], extra: dict[str, Any], first: int, replicas: int | None
) -> None:
    case = CATEGORICAL
    networks = [case.network(bias=True, batch_norm=False) for _ in range(replicas or 1)]
    whole = Replicated(networks) if replicas else networks[0]
    pieces = deepcopy(whole)
    options = options_for(case, **extra)
    on_whole, on_pieces = optimizer_type(whole, **options), optimizer_type(pieces, **options)
    for batches in zip(*[case.batches(8, size=8) for _ in networks], strict=True):
        real_step(on_whole, whole, batches)
        on_pieces.zero_grad()
        for part in (slice(None, first), slice(first, None)):
            output, labels, loss = forward(pieces, [batch.part(part) for batch in batches])
            on_pieces.update_curvature(output, labels=labels)
            loss.backward()
        on_pieces.step()
        close(list(pieces.parameters()), list(whole.parameters()))
