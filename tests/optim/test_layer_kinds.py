"""Every kind of layer against the literal twin of the linear layers it stands for, in float64."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac2 import KFAC
from tests.optim.test_trajectories import (
    LEVELS,
    clip_between,
    close,
    each_inverse,
    each_level,
    name_in,
    options_for,
    parameters,
)
from tests.reference.precision import float64
from tests.reference.problems import GAUSSIAN, real_step
from tests.reference.unfolded import Convolution, Transposed, Unfoldable, Unfolded

STEPS = 6


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def follows_its_twin(level: str, network: nn.Sequential, sample: tuple[int, ...], **changes: Any) -> KFAC:
    """The optimizer on the network, the literal one on the network spelled out."""
    real_type, twin_type, extra = LEVELS[level]
    batches = GAUSSIAN.batches(STEPS, size=4, sample=sample)
    network(batches[0].inputs)  # which gives lazy layers their shapes
    model, spelled_out = deepcopy(network), Unfoldable(network)
    options = options_for(GAUSSIAN, lr=1e-3, **extra | changes)
    optimizer = real_type(model, **options)
    if level != "one":
        options["outside_coarse"] = grouped(spelled_out)
    kl_clip = clip_between(twin_type, spelled_out, batches[0], options)
    options["kl_clip"] = kl_clip
    twin = twin_type(spelled_out, **options)
    for group in optimizer.param_groups:
        group["kl_clip"] = kl_clip
    for batch in batches:
        real_step(optimizer, model, [batch])
        twin.step(batch.inputs, batch.labels, batch.loss)
        expected = spelled_out.named_values()
        for name, value in parameters(model).items():
            close(value, expected[name], msg=name_in(name))
    assert min(twin.clips) < 1 == max(twin.clips)
    assert all(line.preconditioned for line in optimizer.coverage)
    return optimizer


def grouped(model: nn.Module) -> list[str]:
    """Linear layers that are one of several groups."""
    return [
        f"{name}.groups.{group}"
        for name, module in model.named_modules()
        if isinstance(module, Unfolded) and len(module.groups) > 1
        for group in range(len(module.groups))
    ]


def convolutions() -> dict[str, tuple[list[Convolution | Transposed], tuple[int, ...]]]:
    """Layers, and the shape of a sample."""
    return {
        "1d": ([nn.Conv1d(2, 2, 3, padding=2, dilation=2), nn.Conv1d(2, 3, 3, stride=2, bias=False)], (2, 9)),
        "3d": ([nn.Conv3d(2, 2, (2, 3, 1), padding=(0, 1, 1)), nn.Conv3d(2, 3, 2, stride=2)], (2, 4, 3, 4)),
        "depthwise-1d": ([nn.Conv1d(3, 3, 3, groups=3), nn.Conv1d(3, 3, 3, groups=3)], (3, 8)),
        "depthwise-2d": (
            [nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), nn.Conv2d(3, 6, 2, stride=2, groups=3)],
            (3, 6, 4),
        ),
        "grouped-2d": ([nn.Conv2d(4, 6, (1, 3), groups=2), nn.Conv2d(6, 4, 2, dilation=2)], (4, 5, 6)),
        "transposed-1d": (
            [nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), nn.ConvTranspose1d(3, 2, 2, bias=False)],
            (2, 4),
        ),
        "transposed-2d": (
            [nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), output_padding=1), nn.Conv2d(3, 2, 3, stride=3)],
            (2, 3, 3),
        ),
        "transposed-3d": (
            [nn.ConvTranspose3d(2, 2, 2, dilation=(1, 2, 1)), nn.ConvTranspose3d(2, 2, 1, padding=1)],
            (2, 3, 2, 3),
        ),
        "transposed-grouped": (
            [nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.ConvTranspose2d(6, 3, 1, groups=3)],
            (4, 2, 3),
        ),
        "grouped-3d": ([nn.Conv3d(4, 2, 2, groups=2), nn.Conv3d(2, 2, 1)], (4, 3, 3, 3)),
    }


@each_level
@each_inverse
@pytest.mark.parametrize("kind", convolutions())
def test_convolutions_follow_the_twin(level: str, inverse: str, kind: str) -> None:
    (one, two), sample = convolutions()[kind]
    network = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    optimizer = follows_its_twin(level, network, sample, inverse=inverse)
    outside = {line.parameter for line in optimizer.coverage if "outside the coarse space" in line.reason}
    groups = {f"{name}.weight" for name, layer in (("0", one), ("2", two)) if layer.groups > 1}
    assert {name for name in outside if name.endswith("weight")} == (groups if level != "one" else set())


def test_a_transposed_convolution_may_be_told_its_output_size() -> None:
    """An output size is an output padding that comes with the call."""

    class Asking(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            layer = self[0]
            assert isinstance(layer, nn.ConvTranspose1d)
            return self[1](layer(input, output_size=[8]).flatten(1))

    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.ConvTranspose1d(2, 1, 3, stride=2, padding=1, output_padding=1), nn.Flatten(), nn.Linear(8, 2)
    )
    asking = Asking(nn.ConvTranspose1d(2, 1, 3, stride=2, padding=1), nn.Linear(8, 2))
    for one, other in zip(asking.parameters(), plain.parameters(), strict=True):
        one.data = other.data.clone()
    optimizers = [KFAC(model, **options_for(GAUSSIAN)) for model in (plain, asking)]
    for batch in GAUSSIAN.batches(STEPS, sample=(2, 4)):
        for optimizer, model in zip(optimizers, (plain, asking), strict=True):
            real_step(optimizer, model, [batch])
    for one, other in zip(asking.parameters(), plain.parameters(), strict=True):
        close(one, other)
