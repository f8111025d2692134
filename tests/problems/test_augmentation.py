"""The vectorised augmentation against torchvision's, image by image."""

import pytest
import torch
import torchvision.transforms.functional as TF

from experiments.problems.augmentation import MEAN, STANDARD_DEVIATION, crop_and_flip, draw_crops, normalise
from tests.problems.cifar_files import pixels

SAMPLES = 64


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def images() -> torch.Tensor:
    return torch.from_numpy(pixels(SAMPLES)).permute(0, 3, 1, 2)


def test_equals_torchvision_image_by_image() -> None:
    draws = generator()
    rows, columns = torch.randint(9, (2, SAMPLES), generator=draws).tolist()
    mirrored = (torch.rand(SAMPLES, generator=draws) < 0.5).tolist()
    expected = []
    for image, top, left, flip in zip(images(), rows, columns, mirrored, strict=True):
        view = TF.crop(TF.pad(image, [4], fill=0), top, left, 32, 32)
        expected.append(TF.to_tensor(TF.to_pil_image(TF.hflip(view) if flip else view)))
    augmented = crop_and_flip(images(), draw_crops(SAMPLES, generator()))
    assert augmented.dtype == torch.uint8
    assert torch.equal(augmented.float() / 255, torch.stack(expected))
    normalised = [TF.normalize(image, list(MEAN), list(STANDARD_DEVIATION)) for image in expected]
    torch.testing.assert_close(normalise(augmented), torch.stack(normalised), rtol=1e-5, atol=1e-6)


def test_every_shift_and_both_sides_occur_alike() -> None:
    samples = 20_000
    ramp = torch.arange(32 * 32, dtype=torch.int32).reshape(1, 1, 32, 32).expand(samples, 1, 32, 32)
    views = crop_and_flip(ramp, draw_crops(samples, generator()))[:, 0]
    centre = views[:, 16, 15:17]
    flipped = centre[:, 0] > centre[:, 1]
    positions = torch.where(flipped, centre[:, 1], centre[:, 0])
    rows, columns = positions // 32 - 16, positions % 32 - 15
    for shifts in (rows, columns):
        counts = torch.bincount(shifts + 4, minlength=9)
        assert len(counts) == 9
        assert (counts / samples - 1 / 9).abs().max() < 0.01
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.015)
