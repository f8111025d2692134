"""Moments and sums of patches against explicitly unfolded ones, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac2.curvature import patches
from kfac2.curvature.patches import Window, patch_moment, patch_sums
from kfac2.optim.layers import ConvolutionLayer

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "1x1-stride-2": {"kernel_size": 1, "stride": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "stride-2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "vertical-stride-only": {"kernel_size": 2, "stride": (2, 1)},
    "horizontal-stride-only": {"kernel_size": 3, "stride": (1, 3), "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": (2, 3)},
    "tall": {"kernel_size": (4, 1), "padding": (2, 0)},
    "wide": {"kernel_size": (1, 4), "padding": (0, 3)},
    "same-even": {"kernel_size": (2, 4), "padding": "same"},
    "more-padding-than-image": {"kernel_size": 3, "padding": 8, "dilation": 2},
    "kernel-as-tall-as-image": {"kernel_size": (5, 3)},
    "no-row-meets-all-kernel-rows": {"kernel_size": (5, 1), "padding": (4, 0)},
}
each_convolution = pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def unfolded(x: Tensor, convolution: nn.Conv2d, with_ones: bool) -> tuple[Tensor, Tensor]:
    """Patches ``(B, d, T)`` by torch's own unfolding, and the convolution's output."""
    padded = F.pad(x, convolution._reversed_padding_repeated_twice)
    columns = F.unfold(
        padded, convolution.kernel_size, dilation=convolution.dilation, stride=convolution.stride
    )
    ones = columns.new_ones(len(x), int(with_ones), columns.shape[2])
    return torch.cat([columns, ones], dim=1), convolution(x)


def example(options: dict, with_ones: bool = False) -> tuple[Tensor, nn.Conv2d, Window]:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 2, **options, bias=with_ones).double()
    return torch.randn(4, 3, 5, 7).double(), convolution, ConvolutionLayer("", convolution, with_ones).window


@each_convolution
@pytest.mark.parametrize("with_ones", [False, True])
@pytest.mark.parametrize("images_at_once", [1, 3, 100])
def test_moment_is_that_of_unfolded_patches(
    options: dict, with_ones: bool, images_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, convolution, window = example(options, with_ones)
    taps = window.kernel[0] * window.kernel[1]
    monkeypatch.setattr(patches, "LARGEST_UNFOLDING", images_at_once * x[0].numel() * taps)
    columns, _ = unfolded(x, convolution, with_ones)
    expected = torch.einsum("bit,bjt->ij", columns, columns)
    torch.testing.assert_close(patch_moment(x, window, with_ones), expected, rtol=1e-12, atol=1e-12)


@each_convolution
def test_sums_are_those_of_unfolded_patches(options: dict) -> None:
    x, convolution, window = example(options)
    columns, output = unfolded(x, convolution, with_ones=False)
    sums = patch_sums(x, window)
    assert sums.shape == output[:, 0].shape
    torch.testing.assert_close(sums.flatten(1), columns.sum(1), rtol=1e-12, atol=1e-12)


def test_memory_formats_agree() -> None:
    x, _, window = example(CONVOLUTIONS["3x3"])
    other = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(patch_moment(other, window, True), patch_moment(x, window, True))
    torch.testing.assert_close(patch_sums(other, window), patch_sums(x, window))


def test_rows_need_a_third_of_the_products_of_patches() -> None:
    """3×3, stride 1: three products of unfolded rows, and the border's, for nine times nine offsets."""
    with FlopCounterMode(display=False) as counter:
        patch_moment(torch.randn(1, 4, 32, 32), Window((3, 3), padding=(1, 1, 1, 1)), with_ones=False)
    of_patches = 2 * (9 * 4) ** 2 * 32 * 32
    assert counter.get_total_flops() < 0.36 * of_patches
