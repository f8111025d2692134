"""Registered norms against the same norm without scale and shift, and a depthwise convolution that has them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kfac2
from kfac2 import KFAC
from kfac2.optim.layers import ADAPTERS, BatchNormLayer, GroupNormLayer, LayerNormLayer
from tests.optim.test_trajectories import close, options_for
from tests.reference.precision import float64
from tests.reference.problems import GAUSSIAN, real_step


@pytest.fixture(autouse=True)
def norms_in_float64() -> Iterator[None]:
    before = dict(ADAPTERS)
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        kfac2.register_layer(kind, BatchNormLayer)
    kfac2.register_layer(nn.GroupNorm, GroupNormLayer)
    kfac2.register_layer(nn.LayerNorm, LayerNormLayer)
    with float64():
        yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


def norm_of(kind: str, affine: bool) -> nn.Module:
    """Of four channels."""
    if kind == "layer":
        return ChannelsLast(nn.LayerNorm(4, elementwise_affine=affine))
    if kind == "group":
        return nn.GroupNorm(2, 4, affine=affine)
    return nn.BatchNorm2d(4, affine=affine).train(kind == "batch")


@pytest.mark.parametrize("kind", ["layer", "group", "batch", "batch, evaluating"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("level", [KFAC, kfac2.TwoLevelKFAC])
def test_scale_and_shift_are_a_depthwise_convolution(kind: str, sharing: str, level: type[KFAC]) -> None:
    norm, bare, convolution = norm_of(kind, True), norm_of(kind, False), nn.Conv2d(4, 4, 1, groups=4)
    for own, other in zip(norm.parameters(), convolution.parameters(), strict=True):
        own.data = torch.randn_like(own)
        other.data = own.data.reshape(other.shape).clone()
    last = nn.LazyLinear(2)
    model = nn.Sequential(norm, nn.Tanh(), nn.Flatten(), last)
    twin = nn.Sequential(nn.Sequential(bare, convolution), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    batches = GAUSSIAN.batches(5, sample=(4, 3, 2))
    for net in (model, twin):
        net(batches[0].inputs)  # which gives lazy layers their shapes
    twin[-1].load_state_dict(last.state_dict())
    options = options_for(GAUSSIAN, lr=1e-3, kl_clip=1e-4, weight_sharing=sharing)
    optimizers = [level(net, **options) for net in (model, twin)]
    assert all(line.preconditioned for optimizer in optimizers for line in optimizer.coverage)
    for batch in batches:
        for optimizer, net in zip(optimizers, (model, twin), strict=True):
            real_step(optimizer, net, [batch])
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            close(own, other.reshape(own.shape))


def test_a_layer_norm_over_several_axes_is_left_plain() -> None:
    optimizer = KFAC(nn.Sequential(nn.LayerNorm([2, 3]), nn.Flatten(), nn.Linear(6, 2)))
    assert "more than one axis" in optimizer.coverage[0].reason
