"""Whole trajectories of convolutional networks against the literal twins, in float64."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kfac2 import CoarseSpace, TwoLevelKFAC
from tests.optim.test_trajectories import (
    LEVELS,
    case_name,
    clip_between,
    close,
    compare,
    each_bias,
    each_inverse,
    each_level,
    name_in,
    options_for,
    parameters,
)
from tests.reference.coarse import LiteralTwoLevelKFAC
from tests.reference.kfac import LiteralKFAC
from tests.reference.precision import float64
from tests.reference.problems import BERNOULLI, CATEGORICAL, GAUSSIAN, Batch, Case, forward, real_step

STEPS = 10
IMAGE = (2, 7, 5)  # channels, rows, columns
each_grid = pytest.mark.parametrize("grid", ["pairwise", "common"])
each_resample = pytest.mark.parametrize("resample", ["nearest", "area"])


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def small_steps(case: Case, **changes: Any) -> dict[str, Any]:
    """At test_trajectories.py's learning rate some seeds diverge, and amplify rounding to any size."""
    return options_for(case, lr=1e-3, **changes)


class SmallResNet(nn.Module):
    """A residual block with a 1×1 shortcut; grids of (7, 5), (4, 3) and (6, 2), then one position."""

    def __init__(self, outputs: int | None, bias: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1, bias=bias)
        self.relu = nn.ReLU(inplace=True)  # directly after a convolution, and after a BatchNorm
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias)
        self.down_norm = nn.BatchNorm2d(4)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=bias)
        self.dilated_norm = nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(3, 4, 1, stride=2, bias=bias)
        self.shortcut_norm = nn.BatchNorm2d(4)
        self.tall = nn.Conv2d(4, 3, (1, 2), padding=(1, 0), bias=bias)
        self.head = nn.Linear(3, outputs or 1, bias=bias)
        self.flatten = nn.Flatten(start_dim=0 if outputs is None else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        h = self.relu(self.down_norm(self.down(x)))
        h = self.dilated_norm(self.dilated(h))
        h = self.relu(h + self.shortcut_norm(self.shortcut(x)))
        h = self.relu(self.tall(h)).mean(dim=(2, 3))
        return self.flatten(self.head(h))


def check_trajectory(
    level: str, network: nn.Module, case: Case, batches: list[Batch], **changes: Any
) -> LiteralKFAC:
    """Real optimizer and twin side by side, with a κ that clips some steps and not others."""
    real_type, twin_type, extra = LEVELS[level]
    options = small_steps(case, **extra | changes)
    options["kl_clip"] = clip_between(twin_type, network, batches[0], options)
    model, twin = deepcopy(network), twin_type(network, **options)
    compare(real_type(model, **options), model, [twin], [[batch] for batch in batches])
    assert min(twin.clips) < 1 == max(twin.clips)
    return twin


def images(case: Case, sample: tuple[int, ...] = IMAGE) -> list[Batch]:
    return case.batches(STEPS, size=5, sample=sample)


@each_level
@each_inverse
@each_bias
def test_a_small_resnet_follows_the_twin(level: str, inverse: str, bias: bool) -> None:
    check_trajectory(level, SmallResNet(2, bias), GAUSSIAN, images(GAUSSIAN), inverse=inverse)


@pytest.mark.parametrize("case", [CATEGORICAL, BERNOULLI], ids=case_name)
@each_level
def test_other_likelihoods_follow_the_twin(level: str, case: Case) -> None:
    check_trajectory(level, SmallResNet(case.outputs, bias=True), case, images(case))


@each_grid
@each_resample
@each_bias
def test_every_grid_follows_the_twin(grid: str, resample: str, bias: bool) -> None:
    """Not the categorical likelihood: its gradients sum to zero over the last layer's outputs."""
    options = {"coarse_grid": grid, "resample": resample}
    check_trajectory("two", SmallResNet(2, bias), GAUSSIAN, images(GAUSSIAN), **options)


def test_an_indefinite_coarse_fisher_follows_the_twin_and_is_counted() -> None:
    """Strides skip the pixels that make a finer grid's mean square small; all sums are positive."""
    network = nn.Sequential(
        nn.Softplus(),
        nn.Conv2d(2, 3, 1),
        nn.Softplus(),
        nn.Conv2d(3, 3, 1, stride=2),
        nn.Softplus(),
        nn.Conv2d(3, 2, 1, stride=(1, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for parameter in network.parameters():
        parameter.data.abs_()
    options = small_steps(GAUSSIAN, kl_clip=1e-3)
    model, twin, coarse = deepcopy(network), LiteralTwoLevelKFAC(network, **options), CoarseSpace()
    optimizer = TwoLevelKFAC(model, coarse=coarse, **options)
    compare(optimizer, model, [twin], [[batch] for batch in images(GAUSSIAN, (2, 6, 4))])
    assert coarse.indefinite == twin.indefinite == 3  # at all three refreshes of the inverses


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": (3, 2), "padding": "valid", "stride": 2},
    {"kernel_size": (1, 3), "padding": (2, 0)},
    {"kernel_size": 3, "padding": (0, 2), "dilation": (1, 2), "stride": (2, 1)},
    {"kernel_size": (7, 5)},  # one position
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@each_level
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_kind_of_convolution_follows_the_twin(level: str, options: dict[str, Any]) -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 2, 1, bias=False),
        nn.Conv2d(2, 3, **options),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, stride=2, padding=1),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    batches = images(GAUSSIAN)
    network(batches[0].inputs)
    check_trajectory(level, network, GAUSSIAN, batches)


class Sequences(nn.Module):
    """Linear layers on six positions, on three, and on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Linear(4, 3), nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fine(x).tanh()
        h = self.coarse(h[:, ::2] + h[:, 1::2]).tanh()
        return self.head(h.mean(dim=1))


class Patchwork(nn.Module):
    """An image beside a sequence made from it: grids of (7, 5), (3, 2), (6,) and one position."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2)
        self.tokens, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.coarse(self.fine(x).tanh()).tanh()
        tokens = self.tokens(h.flatten(2).transpose(1, 2)).tanh()
        return self.head(tokens.mean(dim=1))


@each_grid
@each_resample
@pytest.mark.parametrize(
    ("kind", "sample"), [(Sequences, (6, 4)), (Patchwork, IMAGE)], ids=["sequences", "beside-image"]
)
def test_sequences_follow_the_twin(
    kind: type[nn.Module], sample: tuple[int, ...], grid: str, resample: str
) -> None:
    options = {"coarse_grid": grid, "resample": resample}
    check_trajectory("two", kind(), GAUSSIAN, images(GAUSSIAN, sample), **options)


@pytest.mark.parametrize("level", ["one", "exact"])
def test_sequences_without_a_grid_follow_the_twin(level: str) -> None:
    check_trajectory(level, Sequences(), GAUSSIAN, images(GAUSSIAN, (6, 4)))


@each_level
def test_unsupported_convolutions_are_left_to_plain_sgd(level: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(2, 2, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    twin = check_trajectory(level, network, GAUSSIAN, images(GAUSSIAN))
    assert list(twin.preconditioned) == ["4"]
    optimizer = LEVELS[level][0](network)
    plain = {line.parameter: line.reason for line in optimizer.coverage if not line.preconditioned}
    assert list(plain) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "circular" in plain["0.weight"]
    assert "reflect" in plain["2.weight"]


@each_level
def test_images_of_changing_size_follow_the_twin(level: str) -> None:
    network = SmallResNet(2, bias=True)
    small, large = images(GAUSSIAN), images(GAUSSIAN, (2, 9, 8))
    batches = [large[step] if step % 4 == 2 else batch for step, batch in enumerate(small)]
    check_trajectory(level, network, GAUSSIAN, batches)


class Growing(nn.Module):
    """A coarser branch joins in when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 2, padding=1)
        self.late = nn.Conv2d(3, 2, 3, stride=2)
        self.last = nn.Linear(3, 2)
        self.grown = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        output = self.last(h.mean(dim=(2, 3)))
        return output + self.late(h).mean(dim=(2, 3)) if self.grown else output


@each_grid
def test_a_convolution_first_seen_late_starts_from_its_first_observation(grid: str) -> None:
    network = Growing()
    model = deepcopy(network)
    options = small_steps(GAUSSIAN, coarse_grid=grid)
    optimizer, twin = TwoLevelKFAC(model, **options), LiteralTwoLevelKFAC(network, **options)
    steps = [[batch] for batch in images(GAUSSIAN)]
    compare(optimizer, model, [twin], steps[:4])
    assert ("A", "late", "first") not in twin.averages
    model.grown = network.grown = True
    compare(optimizer, model, [twin], steps[4:])
    assert "late" in twin.preconditioned


@each_level
def test_micro_batches_follow_the_twin_of_the_whole_batch(level: str) -> None:
    real_type, twin_type, extra = LEVELS[level]
    network = Patchwork()
    model, options = deepcopy(network), small_steps(GAUSSIAN, kl_clip=1e-3, **extra)
    optimizer, twin = real_type(model, **options), twin_type(network, **options)
    for batch in images(GAUSSIAN):
        twin.step(batch.inputs, batch.labels, batch.loss)
        optimizer.zero_grad()
        for part in (slice(None, 2), slice(2, None)):
            output, labels, loss = forward(model, [batch.part(part)])
            optimizer.update_curvature(output, labels=labels)
            loss.backward()
        optimizer.step()
        close(parameters(model), parameters(network))


@each_level
def test_channels_last_is_the_same_trajectory(level: str) -> None:
    real_type, twin_type, extra = LEVELS[level]
    network = SmallResNet(2, bias=True)
    options = small_steps(GAUSSIAN, kl_clip=1e-3, **extra)
    model = deepcopy(network).to(memory_format=torch.channels_last)
    optimizer, twin = real_type(model, **options), twin_type(network, **options)
    for batch in images(GAUSSIAN):
        twin.step(batch.inputs, batch.labels, batch.loss)
        inputs = batch.inputs.to(memory_format=torch.channels_last)
        real_step(optimizer, model, [replace(batch, inputs=inputs)])
        close(parameters(model), parameters(network))


@each_level
def test_float32_stays_close_to_the_float64_twin(level: str) -> None:
    real_type, twin_type, extra = LEVELS[level]
    network = SmallResNet(2, bias=True)
    options = small_steps(GAUSSIAN, kl_clip=1e-3, **extra)
    model = deepcopy(network).float()
    optimizer, twin = real_type(model, **options), twin_type(network, **options)
    for batch in images(GAUSSIAN):
        twin.step(batch.inputs, batch.labels, batch.loss)
        single = {name: getattr(batch, name).float() for name in ("inputs", "labels", "targets")}
        real_step(optimizer, model, [replace(batch, **single)])
    for name, value in parameters(model).items():
        expected = network.get_parameter(name).detach()
        assert_close(value.double(), expected, rtol=1e-3, atol=1e-5, msg=name_in(name))
