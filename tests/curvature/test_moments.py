"""Second moments against the columns written out."""

import pytest
import torch

from kfac2.curvature.moments import SMALLEST_HALVED, second_moment


@pytest.mark.parametrize("rows", [1, 4, SMALLEST_HALVED - 1, SMALLEST_HALVED, 2 * SMALLEST_HALVED + 1])
@pytest.mark.parametrize("with_one", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_second_moment_is_the_sum_of_outer_products(rows: int, with_one: bool, diagonal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 9, rows, generator=generator, dtype=torch.float64).mT
    written_out = torch.cat([columns, torch.ones(2, 1, 9)], 1) if with_one else columns
    expected = sum(torch.einsum("ri,rj->rij", c, c) for c in written_out.unbind(-1))
    assert isinstance(expected, torch.Tensor)
    if diagonal:
        expected = expected.diagonal(dim1=-2, dim2=-1)[:, None]
    torch.testing.assert_close(second_moment(columns, diagonal, with_one), expected, rtol=1e-12, atol=1e-12)
