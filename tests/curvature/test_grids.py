"""Grids of positions on which layers are compared."""

import pytest
import torch

from kfac2.curvature.grids import common_grid, pair_grid, resample


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((4, 6), (8, 3), (4, 3)),  # per axis the smaller
        ((5,), (7,), (5,)),
        ((4, 6), (1, 1), ()),  # one position is repeated: the other's map is averaged
        ((), (4, 6), ()),
        ((), (), ()),
        ((4, 6), (1, 8), (1, 6)),  # one row is not one position
        ((1, 8), (8, 1), ()),  # a row and a column
        ((4, 6), (24,), ()),  # an image and a sequence
    ],
    ids=str,
)
def test_grid_of_a_pair(one: tuple[int, ...], other: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert pair_grid(one, other) == pair_grid(other, one) == expected


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(8, 4), (4, 8), (), (1, 1), (6, 6)], (4, 4)),
        ([(), ()], ()),
        ([(8, 4), (5,)], ()),
    ],
    ids=str,
)
def test_common_grid(grids: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    assert common_grid(grids) == expected


def test_resampling_by_hand() -> None:
    maps = torch.arange(16.0).view(1, 1, 1, 4, 4)
    nearest, area = resample(maps, (2, 4), "nearest"), resample(maps, (2, 2), "area")
    assert nearest[0, 0, 0].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert area[0, 0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert resample(maps, (), "nearest").tolist() == [[[7.5]]]
    assert resample(maps, (4, 4), "nearest") is maps
