"""Convolutions where the answer is known without a twin, and what they leave in memory."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.problems import cifar_resnet
from kfac2 import KFAC, TwoLevelKFAC

BATCH, POSITIONS, CHANNELS, CLASSES = 6, 5, 3, 4
each_level = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KFAC, {}),
        (TwoLevelKFAC, {}),
        (TwoLevelKFAC, {"coarse_grid": "common"}),
        (TwoLevelKFAC, {"coarse_fisher": "exact"}),
    ],
    ids=["one", "pairwise", "common", "exact"],
)


def build(kind: type[KFAC], model: nn.Module, **options: Any) -> KFAC:
    return kind(model, 0.02, factor_interval=2, inverse_interval=4, damping=1e-2, kl_clip=1e-2, **options)


def train(model: nn.Module, optimizer: KFAC, inputs: list[Tensor], first: int = 0) -> Tensor:
    """Trains on ``inputs`` with labels for curvature and gradient that depend on the step alone."""
    losses = []
    for step, x in enumerate(inputs, first):
        labels = torch.arange(step, step + len(x)) % CLASSES
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output, labels=labels.flip(0))
        loss = F.cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def batches(*shape: int, steps: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, *shape, generator=generator).double() for _ in range(steps)]


def same_parameters(models: tuple[nn.Module, nn.Module]) -> None:
    with torch.no_grad():
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.copy_(p.reshape(q.shape))


class Mean(nn.Module):
    def __init__(self, dims: int | tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def on_sequence() -> nn.Module:
    layers = nn.Linear(CHANNELS, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh()
    return nn.Sequential(*layers, Mean(1), nn.Linear(4, CLASSES)).double()


def on_image() -> nn.Module:
    layers = nn.Conv2d(CHANNELS, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1, bias=False), nn.Tanh()
    return nn.Sequential(*layers, Mean((2, 3)), nn.Linear(4, CLASSES)).double()


def whole_image_kernel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, (3, 5)), nn.Flatten(), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def flattened_image() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def as_image(x: Tensor) -> Tensor:
    return x.mT[..., None]


@each_level
@pytest.mark.parametrize(
    ("one", "other", "shape", "convert"),
    [
        (on_sequence, on_image, (POSITIONS, CHANNELS), as_image),
        (whole_image_kernel, flattened_image, (2, 3, 5), lambda x: x),
    ],
    ids=["1x1-is-linear-on-positions", "whole-image-is-linear"],
)
def test_a_convolution_that_is_a_linear_layer(
    kind: type[KFAC],
    options: dict[str, Any],
    one: Callable[[], nn.Module],
    other: Callable[[], nn.Module],
    shape: tuple[int, ...],
    convert: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    models = one(), other()
    same_parameters(models)
    inputs = batches(*shape)
    losses = train(models[0], build(kind, models[0], **options), inputs)
    others = train(models[1], build(kind, models[1], **options), [convert(x) for x in inputs])
    torch.testing.assert_close(losses, others, rtol=1e-10, atol=1e-12)


@each_level
def test_a_saved_state_goes_on_bit_identically(kind: type[KFAC], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    inputs = batches(CHANNELS, 4, 4)
    model = on_image()
    optimizer = build(kind, model, **options)
    train(model, optimizer, inputs[:5])
    twin = on_image()
    twin.load_state_dict(model.state_dict())
    resumed = build(kind, twin, **options)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    on = train(model, optimizer, inputs[5:], first=5)
    assert torch.equal(on, train(twin, resumed, inputs[5:], first=5))


def test_a_memory_format_changed_after_construction() -> None:
    """The fused update reads raw memory, where such a model's gradients no longer lie as its parameters did."""
    inputs, losses = batches(CHANNELS, 4, 4), []
    for late in (False, True):
        torch.manual_seed(0)
        layers = nn.Conv2d(CHANNELS, 4, 3, bias=False), nn.Tanh(), nn.Conv2d(4, 4, 2, bias=False)
        model = nn.Sequential(*layers, Mean((2, 3)), nn.Linear(4, CLASSES, bias=False)).double()
        optimizer = build(KFAC, model)
        if late:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        losses.append(train(model, optimizer, inputs))
    torch.testing.assert_close(*losses)


def test_a_momentum_of_another_memory_format() -> None:
    inputs, losses = batches(4, 4, 4), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layers = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), Mean((2, 3)), nn.Linear(4, CLASSES)
        model = nn.Sequential(*layers).double()
        first = deepcopy(model).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        optimizer = build(KFAC, first)
        train(first, optimizer, inputs[:3])
        model.load_state_dict(first.state_dict())
        resumed = build(KFAC, model)
        resumed.load_state_dict(optimizer.state_dict())
        losses.append(train(model, resumed, inputs[3:], first=3))
    torch.testing.assert_close(*losses)


def test_every_convolution_of_a_resnet_is_covered() -> None:
    optimizer = TwoLevelKFAC(cifar_resnet(110), inverse="tikhonov")
    assert len(optimizer.preconditioner.layers) == 1 + 108 + 2 + 1  # stem, blocks, shortcuts, linear
    plain = [line for line in optimizer.coverage if not line.preconditioned]
    assert {line.reason for line in plain} == {"BatchNorm2d is not a supported layer"}


def test_no_patches_are_kept() -> None:
    """Of a layer that was visited, its factors stay and two maps of sums, until the batch has ended."""
    model = cifar_resnet(8)
    optimizer = TwoLevelKFAC(model, inverse="tikhonov")
    preconditioner = optimizer.preconditioner
    held: list[int] = []
    end = preconditioner.end_batch

    def measure(nodes: Any = ()) -> None:
        batch = preconditioner._batch
        assert batch is not None
        tensors = [x for moments in batch._moments.values() for x in (moments.a, moments.g)]
        tensors += [x for calls in batch._maps.values() for _, _, *maps in calls for x in maps]
        held.append(sum(x.untyped_storage().nbytes() for x in tensors))
        end(nodes)

    preconditioner.end_batch = measure
    optimizer.update_curvature(model(torch.randn(16, 3, 16, 16)))
    factors = sum(stack.blocks.a.numel() + stack.blocks.g.numel() for stack in preconditioner.stacks)
    positions = 3 * 16**2 + 3 * 8**2 + 3 * 4**2 + 1  # of stem and three stages with two shortcuts, linear
    assert held == [4 * (factors + 2 * 16 * positions)]
    assert preconditioner._batch is None
