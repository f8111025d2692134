"""Whole trajectories of KFAC and TwoLevelKFAC against the literal twins, in float64."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kfac2 import KFAC, TwoLevelKFAC
from tests.reference.coarse import LiteralTwoLevelKFAC
from tests.reference.kfac import LiteralKFAC
from tests.reference.precision import float64
from tests.reference.problems import CASES, GAUSSIAN, Batch, Case, Replicated, real_step

# Float64 rounding, 1e-16 relative, is amplified by the damped inverses and by every step. Measured over
# three seeds: 5e-14 at most after a dozen steps; two twins whose first parameters differ in the last bit
# drift apart as far. The rest is margin for other machines.
close = partial(assert_close, rtol=1e-10, atol=1e-11)

STEPS = 12
LEVELS: dict[str, tuple[type[KFAC], type[LiteralKFAC], dict[str, Any]]] = {
    "one": (KFAC, LiteralKFAC, {}),
    "two": (TwoLevelKFAC, LiteralTwoLevelKFAC, {"coarse_fisher": "kronecker"}),
    "exact": (TwoLevelKFAC, LiteralTwoLevelKFAC, {"coarse_fisher": "exact"}),
}


def options_for(case: Case, **changes: Any) -> dict[str, Any]:
    defaults = {
        "lr": 5e-3,  # two levels diverge at 2e-2, and amplify rounding to 1e-9
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "damping": 1e-2,
        "kl_clip": None,
        "likelihood": case.likelihood,
        "inverse": "eigen",
        "factor_interval": 2,
        "inverse_interval": 4,
    }
    return defaults | changes


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def compare(
    optimizer: KFAC,
    model: nn.Module,
    twins: Sequence[LiteralKFAC],
    steps: Sequence[Sequence[Batch]],
) -> None:
    """Step both through the same batches; all parameters agree after every step."""
    for batches in steps:
        real_step(optimizer, model, batches)
        for twin, batch in zip(twins, batches, strict=True):
            twin.step(batch.inputs, batch.labels, batch.loss)
        literal = [parameters(twin.model) for twin in twins]
        for name, value in parameters(model).items():
            close(
                value,
                torch.stack([p[name] for p in literal]).reshape(value.shape),
                msg=name_in(name),
            )


def name_in(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def check_trajectory(
    level: str, case: Case, *, bias: bool, replicas: int | None, clip: bool = True, **changes: Any
) -> None:
    """Real optimizer and twins side by side, with a κ that clips some steps and not others."""
    real_type, twin_type, extra = LEVELS[level]
    options = options_for(case, **extra | changes)
    networks = [case.network(bias) for _ in range(replicas or 1)]
    model = Replicated(networks) if replicas else deepcopy(networks[0])
    steps = list(zip(*[case.batches(STEPS) for _ in networks], strict=True))
    if clip:
        options["kl_clip"] = clip_between(twin_type, networks[0], steps[0][0], options)
    twins = [twin_type(network, **options) for network in networks]
    compare(real_type(model, **options), model, twins, steps)
    clipped = [nu < 1 for twin in twins for nu in twin.clips]
    assert (any(clipped) and not all(clipped)) if clip else not any(clipped)


def clip_between(
    twin_type: type[LiteralKFAC], network: nn.Module, batch: Batch, options: dict[str, Any]
) -> float:
    """A κ between ``Σ η² |V · ∇|`` of the first step and of one with a 4 times larger gradient."""
    twin = twin_type(deepcopy(network), **options)
    twin.step(batch.inputs, batch.labels, batch.loss)
    return 4 * twin.clip_norms[0]


def case_name(case: Case) -> str:
    return f"{case.likelihood}-{case.outputs}"


each_case = pytest.mark.parametrize("case", CASES, ids=case_name)
each_bias = pytest.mark.parametrize("bias", [False, True])
each_level = pytest.mark.parametrize("level", LEVELS)
each_inverse = pytest.mark.parametrize("inverse", ["eigen", "tikhonov"])


@each_level
@each_inverse
@each_case
@each_bias
def test_a_plain_network_follows_the_twin(level: str, inverse: str, case: Case, bias: bool) -> None:
    check_trajectory(level, case, bias=bias, replicas=None, inverse=inverse)


@each_level
@each_inverse
@each_case
@each_bias
def test_every_replica_follows_its_twin(level: str, inverse: str, case: Case, bias: bool) -> None:
    check_trajectory(level, case, bias=bias, replicas=2, inverse=inverse)


@pytest.mark.parametrize("replicas", [None, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"factor_interval": 1, "inverse_interval": 1},
        {"factor_interval": 3, "inverse_interval": 6},
        {"factor_interval": 3, "inverse_interval": 4},  # inverses of factors that are not of today
        {"factor_decay": 0.5},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"exclude": ["2"]},
        {"coarse_weight": 0.5},
    ],
    ids=str,
)
def test_settings_are_the_twins(replicas: int | None, changes: dict[str, Any]) -> None:
    check_trajectory("two", GAUSSIAN, bias=True, replicas=replicas, **changes)


@each_level
@pytest.mark.parametrize("replicas", [None, 2])
def test_no_clipping_without_kl_clip(level: str, replicas: int | None) -> None:
    case = Case("bernoulli", 2)  # several independent labels per sample
    check_trajectory(level, case, bias=True, replicas=replicas, clip=False)


@each_level
def test_weights_and_biases_in_groups_of_their_own_follow_the_twin(level: str) -> None:
    real_type, twin_type, extra = LEVELS[level]
    case = GAUSSIAN
    network = case.network(bias=True)
    model, steps = deepcopy(network), [[batch] for batch in case.batches(STEPS)]
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.endswith("weight")], "lr": 5e-3, "weight_decay": 1e-2},
        {"params": [p for n, p in named if n.endswith("bias")], "lr": 2e-2, "weight_decay": 0.0},
    ]
    lr = {n: 5e-3 if n.endswith("weight") else 2e-2 for n, _ in named}
    decay = {n: 1e-2 if n.endswith("weight") else 0.0 for n, _ in named}
    options = options_for(case, lr=lr, weight_decay=decay, **extra)
    options["kl_clip"] = kl_clip = clip_between(twin_type, network, steps[0][0], options)
    twin = twin_type(network, **options)
    optimizer = real_type(model, params=groups, **options_for(case, kl_clip=kl_clip, **extra))
    compare(optimizer, model, [twin], steps[:6])
    for group in optimizer.param_groups:  # what a scheduler does
        group["lr"] *= 0.1
    twin.lr = {name: 0.1 * value for name, value in lr.items()}
    compare(optimizer, model, [twin], steps[6:])
    assert min(twin.clips) < 1 == max(twin.clips)


class Growing(nn.Module):
    """A network whose residual layer joins in when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.grown = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.late(h) if self.grown else h)


@each_level
def test_a_layer_first_seen_late_starts_from_its_first_observation(level: str) -> None:
    real_type, twin_type, extra = LEVELS[level]
    network = Growing()
    model = deepcopy(network)
    options = options_for(GAUSSIAN, kl_clip=1e-3, **extra)
    optimizer, twin = real_type(model, **options), twin_type(network, **options)
    steps = [[batch] for batch in GAUSSIAN.batches(STEPS)]
    compare(optimizer, model, [twin], steps[:4])
    assert ("A", "late") not in twin.averages
    model.grown = network.grown = True
    compare(optimizer, model, [twin], steps[4:])
    assert "late" in twin.preconditioned
    if level == "exact":  # averages over different batches: here |w| differs from w
        assert isinstance(twin, LiteralTwoLevelKFAC)
        assert twin.was_indefinite
