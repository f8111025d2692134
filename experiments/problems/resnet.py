"""CIFAR ResNets (He et al. 2016, Section 4.2) on CIFAR-10 (Section 4 of the paper)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.problems.cifar10 import CLASSES
from experiments.problems.cifar_problem import CifarProblem

CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks, average pooling, one linear layer.

    ``(B, 3, H, W)`` → logits ``(B, classes)``.
    """

    def __init__(self, blocks: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.Sequential()
        channels_in = CHANNELS[0]
        for channels in CHANNELS:
            first = BasicBlock(channels_in, channels, stride=channels // channels_in)
            rest = [BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            channels_in = channels
        self.linear = nn.Linear(CHANNELS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.norm(self.conv(x))))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int = 110, generator: torch.Generator | None = None) -> ResNet:
    """A CIFAR ResNet of ``depth`` = 6n + 2 layers for ten classes.

    Convolutions have no biases and start He-normal (fan-out, ReLU gain), the linear layer as torch does.

    Args:
        depth: 20, 32, 44, 56, 110, ...
        generator: for the initialisation; torch's global one by default.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a CIFAR ResNet's depth is 6n + 2 (8, 14, 20, 32, 44, 56, 110), got {depth}")
    model = ResNet((depth - 2) // 6, CLASSES)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    bound = model.linear.in_features**-0.5
    nn.init.uniform_(model.linear.weight, -bound, bound, generator=generator)
    nn.init.uniform_(model.linear.bias, -bound, bound, generator=generator)
    return model


class CifarResNet(CifarProblem):
    """A CIFAR ResNet of ``depth`` = 6n + 2; the other arguments, and what is raised, are ``CifarProblem``'s."""

    model: ResNet

    def __init__(self, seeds: Sequence[int] = (0,), depth: int = 110, **options: Any):
        super().__init__(partial(cifar_resnet, depth), seeds, **options)
