"""CIFAR ResNets (He et al. 2016, Section 4.2) on CIFAR-10 (Section 4 of the paper)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.problems.augmentation import crop_and_flip, draw_crops, normalise
from experiments.problems.cifar10 import CLASSES, IMAGES, JPEG_COPY, Cifar10, DataError

CHANNELS = (16, 32, 64)
EVALUATION_BATCH = 500


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


class CifarResNet:
    """A CIFAR ResNet on CIFAR-10 for one seed, which gives initialisation, batches and label draws.

    Args:
        seeds: exactly one.
        depth: 6n + 2.
        train_samples, test_samples: so many images of a fixed shuffle of the split; None: all.
        label: what records made from this problem must say, if anything; the data may add to it.
        data: where CIFAR-10 comes from.
        device: where model and images live.

    Raises:
        ValueError: more than one seed, a depth that is not 6n + 2, no images.
        DataError: the images cannot be had.
    """

    likelihood = "categorical"
    one_record_per_seed = True

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        depth: int = 110,
        train_samples: int | None = None,
        test_samples: int | None = None,
        label: str | None = None,
        data: Cifar10 | None = None,
        device: torch.device | str = "cpu",
    ):
        self.seeds = list(seeds)
        if len(self.seeds) != 1:
            raise ValueError(
                f"a ResNet trains one seed at a time, got seeds={self.seeds}: make one problem per seed"
            )
        for name, samples in {"train_samples": train_samples, "test_samples": test_samples}.items():
            if samples is not None and samples < 1:
                raise ValueError(f"{name} must be positive, got {samples}")
        self._generator = torch.Generator().manual_seed(self.seeds[0])
        self.model = cifar_resnet(depth, self._generator).to(device)
        self.label_generators = [
            torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
        ]
        train, test = (data or Cifar10()).load(train_samples, test_samples)
        for name, split, samples in (("train", train, train_samples), ("test", test, test_samples)):
            if samples is None and len(split.labels) != IMAGES[name]:
                raise DataError(
                    f"all of the {name} split are {IMAGES[name]:,} images, but there are {len(split.labels):,}: "
                    f"find the missing files, or set problem.{name}_samples"
                )
        self.train_images, self.train_targets = train.images.to(device), train.labels.to(device)
        self.test_images, self.test_targets = test.images.to(device), test.labels.to(device)
        notes = [label, JPEG_COPY if train.is_jpeg or test.is_jpeg else None]
        self.label = "; ".join(note for note in notes if note) or None

    def train_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images ``(B, 3, 32, 32)`` and classes ``(B,)``."""
        device = self.train_targets.device
        batches = torch.randperm(len(self.train_targets), generator=self._generator).split(batch_size)
        # All that is random of the epoch goes to the device at once, so that no step waits for a copy.
        draws = torch.cat([draw_crops(len(batch), self._generator) for batch in batches], dim=1).to(device)
        order = torch.cat(batches).to(device)
        for batch, drawn in zip(order.split(batch_size), draws.split(batch_size, dim=1), strict=True):
            yield normalise(crop_and_flip(self.train_images[batch], drawn)), self.train_targets[batch]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        splits = self.test_images.split(EVALUATION_BATCH), self.test_targets.split(EVALUATION_BATCH)
        for images, targets in zip(*splits, strict=True):
            yield normalise(images), targets

    def full_batch(self) -> None:
        return None

    def batch_size(self, targets: Tensor) -> int:
        return len(targets)

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), targets)[None]

    def accuracies(self, output: Tensor, targets: Tensor) -> Tensor:
        """NaN for an output that is not finite: its largest entry is no prediction."""
        accuracy = (output.argmax(1) == targets).float().mean()
        return torch.where(output.isfinite().all(), accuracy, torch.nan)[None]

    def state_dict(self) -> dict[str, Any]:
        return {"generators": [g.get_state() for g in (self._generator, *self.label_generators)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        generators = (self._generator, *self.label_generators)
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.set_state(saved)
