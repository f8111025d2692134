"""Replicated layers are torch's own layers, side by side."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kfac2.nn import ReplicatedBatchNorm, ReplicatedLayerNorm, ReplicatedLinear, ReplicatedSequential

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
REPLICAS, FEATURES, SAMPLES = 3, 4, 6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def seeds(replicas: int = REPLICAS) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(r) for r in range(replicas)]


def replicated(hidden: int = FEATURES, bias: bool = True) -> ReplicatedSequential:
    """Two blocks of a linear layer and a batch norm, with random scales and shifts."""
    model = ReplicatedSequential(
        ReplicatedLinear(REPLICAS, FEATURES, hidden, bias=bias, generators=seeds()),
        ReplicatedBatchNorm(REPLICAS, hidden),
        nn.Tanh(),
        ReplicatedLinear(REPLICAS, hidden, FEATURES, bias=bias, generators=seeds()),
        ReplicatedBatchNorm(REPLICAS, FEATURES),
    )
    for p in model.parameters():
        if p.dim() < 3:
            nn.init.normal_(p)
    return model.double()


def alone(model: ReplicatedSequential, r: int) -> nn.Sequential:
    """Replica ``r`` in torch's own layers."""
    twins: list[nn.Module] = []
    for module in model:
        if isinstance(module, ReplicatedLinear):
            twin = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None).double()
            twin.load_state_dict({name: p[r] for name, p in module.named_parameters()})
        elif isinstance(module, ReplicatedBatchNorm):
            twin = nn.BatchNorm1d(module.features, eps=module.eps, momentum=module.momentum).double()
            state = {name: x.view(REPLICAS, -1)[r] for name, x in module.state_dict().items()}
            twin.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
        else:
            twin = deepcopy(module)
        twins.append(twin)
    return nn.Sequential(*twins)


def per_replica(parameter: Tensor) -> Tensor:
    return parameter if parameter.shape[0] == REPLICAS else parameter.view(REPLICAS, -1)


def assert_same(model: ReplicatedSequential, twins: Sequence[nn.Sequential], passes: int) -> None:
    """Outputs, input and parameter gradients, and running statistics agree after ``passes`` batches."""
    for _ in range(passes):
        x = torch.randn(REPLICAS, FEATURES, SAMPLES, dtype=torch.float64, requires_grad=True)
        xs = [one.T.detach().requires_grad_() for one in x]
        weights = torch.randn(REPLICAS, FEATURES, SAMPLES, dtype=torch.float64)
        output = model(x)
        (output * weights).sum().backward()
        for r, twin in enumerate(twins):
            expected = twin(xs[r])
            (expected * weights[r].T).sum().backward()
            close(output[r], expected.T)
            close(x.grad[r], xs[r].grad.T)  # pyright: ignore[reportOptionalSubscript, reportOptionalMemberAccess]
    for r, twin in enumerate(twins):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(per_replica(p.grad)[r], q.grad)  # pyright: ignore[reportArgumentType]
        for module, other in zip(model, twin, strict=True):
            if isinstance(other, nn.BatchNorm1d):
                assert isinstance(module, ReplicatedBatchNorm)
                close(module.running_mean.view(REPLICAS, -1)[r], other.running_mean)
                close(module.running_var.view(REPLICAS, -1)[r], other.running_var)


@pytest.mark.parametrize("hidden", [FEATURES, FEATURES + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_training_is_torchs(bias: bool, hidden: int) -> None:
    model = replicated(hidden, bias)
    assert_same(model, [alone(model, r) for r in range(REPLICAS)], passes=3)


def test_evaluation_after_training_is_torchs() -> None:
    model = replicated()
    for _ in range(3):
        model(torch.randn(REPLICAS, FEATURES, SAMPLES, dtype=torch.float64))
    twins = [alone(model, r).eval() for r in range(REPLICAS)]
    assert_same(model.eval(), twins, passes=2)


def test_norms_frozen_in_evaluation_mode_while_the_model_trains() -> None:
    model = replicated()
    twins = [alone(model, r) for r in range(REPLICAS)]
    for network in (model, *twins):
        for module in network:
            if isinstance(module, ReplicatedBatchNorm | nn.BatchNorm1d):
                module.eval()
    assert_same(model, twins, passes=2)


def test_norms_of_different_momentum_or_epsilon_keep_their_own_or_are_refused() -> None:
    norms = (
        ReplicatedBatchNorm(REPLICAS, FEATURES, momentum=0.5, eps=1e-1),
        ReplicatedBatchNorm(REPLICAS, FEATURES, momentum=0.01, eps=1e-5),
    )
    try:
        model = ReplicatedSequential(*norms).double()
    except ValueError as error:
        assert "momentum" in str(error)  # noqa: PT017
    else:
        assert_same(model, [alone(model, r) for r in range(REPLICAS)], passes=2)


def test_a_replica_alone_is_the_same_among_others() -> None:
    """Initialisation, forward pass and running statistics, up to rounding."""
    many = replicated(bias=False)
    x = torch.randn(REPLICAS, FEATURES, SAMPLES, dtype=torch.float64)
    output = many(x)
    for r, seed in enumerate(seeds()):
        one = ReplicatedLinear(1, FEATURES, FEATURES, generators=[seed]).double()
        assert torch.equal(one.weight[0], many.get_parameter("0.weight")[r])
        single = ReplicatedSequential(
            ReplicatedLinear(1, FEATURES, FEATURES),
            ReplicatedBatchNorm(1, FEATURES),
            nn.Tanh(),
            ReplicatedLinear(1, FEATURES, FEATURES),
            ReplicatedBatchNorm(1, FEATURES),
        ).double()
        with torch.no_grad():
            for p, q in zip(single.parameters(), many.parameters(), strict=True):
                p.copy_(per_replica(q)[r].view_as(p))
        close(single(x[r : r + 1])[0], output[r])
        close(single.get_buffer("1.running_var")[0], many.get_buffer("1.running_var").view(REPLICAS, -1)[r])


def test_a_replica_of_nan_leaves_the_others_alone() -> None:
    model = replicated()
    twin = deepcopy(model)
    x = torch.randn(REPLICAS, FEATURES, SAMPLES, dtype=torch.float64)
    expected = twin(x)
    x[1] = torch.nan
    output = model(x)
    assert output[1].isnan().all()
    assert torch.equal(output[[0, 2]], expected[[0, 2]])
    left, right = (one.get_buffer("1.running_var").view(REPLICAS, -1) for one in (model, twin))
    assert torch.equal(left[[0, 2]], right[[0, 2]])


def test_initialisation_is_he_uniform() -> None:
    layer = ReplicatedLinear(2, 50, 400, bias=True, generators=seeds(2))
    bound = (6 / 50) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert not layer.bias.any()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    "nest", [nn.Sequential, lambda *layers: ReplicatedSequential(nn.Sequential(*layers))]
)
def test_norms_outside_a_replicated_sequential_keep_their_statistics_too(nest: type[nn.Sequential]) -> None:
    inside = replicated()
    outside = nest(*deepcopy(inside)).double()
    for module in outside.modules():
        if isinstance(module, ReplicatedBatchNorm):
            module.container_updates = isinstance(outside, ReplicatedSequential)
    x = torch.randn(REPLICAS, FEATURES, SAMPLES, dtype=torch.float64)
    for _ in range(2):
        close(outside(x), inside(x))
    close(outside.eval()(x), inside.eval()(x))


def test_layer_norm_is_torch_s_by_sample_and_replica() -> None:
    norm = ReplicatedLayerNorm(REPLICAS, FEATURES).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(REPLICAS, FEATURES, SAMPLES).double()
    for r, own in enumerate(norm(x)):
        twin = nn.LayerNorm(FEATURES, eps=norm.eps).double()
        twin.load_state_dict({name: p[r] for name, p in norm.named_parameters()})
        close(own, twin(x[r].mT).mT)
