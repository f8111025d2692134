"""The usual CIFAR-10 augmentation on whole batches: random crop after padding, horizontal flip."""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4
# Per-channel mean and standard deviation of CIFAR-10's training images, as fractions of 255.
MEAN = (0.4914, 0.4822, 0.4465)
STANDARD_DEVIATION = (0.2470, 0.2435, 0.2616)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels, black where it leaves the frame, and mirrored half of the time.

    Args:
        images: ``(B, C, H, W)``, any type.
        generator: a CPU generator, so that every device sees the same batches.
    """
    samples, _, height, width = images.shape
    rows, columns = torch.randint(2 * PADDING + 1, (2, samples), generator=generator).to(images.device)
    mirrored = (torch.rand(samples, generator=generator) < 0.5).to(images.device)
    padded = F.pad(images, [PADDING] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, offset, offset, H, W)
    crops = windows[torch.arange(samples, device=images.device), :, rows, columns]
    return torch.where(mirrored[:, None, None, None], crops.flip(3), crops)


def normalise(images: Tensor) -> Tensor:
    """Pixels 0-255 ``(B, 3, H, W)`` to float32 of mean 0 and variance 1 per channel over the data set."""
    mean = 255 * torch.tensor(MEAN, device=images.device)[:, None, None]
    deviation = 255 * torch.tensor(STANDARD_DEVIATION, device=images.device)[:, None, None]
    return (images.float() - mean).div_(deviation)
