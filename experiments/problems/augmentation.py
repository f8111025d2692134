"""The usual CIFAR-10 augmentation on whole batches: random crop after padding, horizontal flip."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4
# Per-channel mean and standard deviation of CIFAR-10's training images, as fractions of 255.
MEAN = (0.4914, 0.4822, 0.4465)
STANDARD_DEVIATION = (0.2470, 0.2435, 0.2616)


def draw_crops(samples: int, generator: torch.Generator) -> Tensor:
    """Row offset, column offset (0 to 8) and whether to mirror (0 or 1), ``(3, B)``, for ``crop_and_flip``.

    Args:
        generator: a CPU generator, so that every device sees the same batches.
    """
    offsets = torch.randint(2 * PADDING + 1, (2, samples), generator=generator)
    mirrored = torch.rand(samples, generator=generator) < 0.5
    return torch.cat([offsets, mirrored[None]])


def crop_and_flip(images: Tensor, drawn: Tensor) -> Tensor:
    """Each image shifted by up to 4 pixels, black where it leaves the frame, and mirrored half of the time.

    Args:
        images: ``(B, C, H, W)``, any type.
        drawn: what ``draw_crops`` gives, on the images' device.
    """
    samples, _, height, width = images.shape
    rows, columns, mirrored = drawn
    padded = F.pad(images, [PADDING] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, offset, offset, H, W)
    crops = windows[torch.arange(samples, device=images.device), :, rows, columns]
    return torch.where(mirrored.bool()[:, None, None, None], crops.flip(3), crops)


def normalise(images: Tensor) -> Tensor:
    """Pixels 0-255 ``(B, 3, H, W)`` to float32 of mean 0 and variance 1 per channel over the data set."""
    mean, deviation = _statistics(images.device)
    return (images.float() - mean).div_(deviation)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels, ``(3, 1, 1)``, copied to the device once."""
    mean, deviation = (torch.tensor(values, device=device) for values in (MEAN, STANDARD_DEVIATION))
    return 255 * mean[:, None, None], 255 * deviation[:, None, None]
