"""A factor of which only the diagonal is kept is the full factor with zeros elsewhere."""

import pytest
import torch
from torch import Tensor

from kfac2.curvature import INVERSES, KroneckerBlocks
from kfac2.curvature.moments import second_moment
from tests.curvature.test_blocks import D_IN, D_OUT, LAYERS, REPLICAS, each_inverse

DAMPING = 0.1
SIDES = [(True, False), (False, True), (True, True)]
each_side = pytest.mark.parametrize("diagonal", SIDES, ids=["G", "A", "both"])


def factors(diagonal: tuple[bool, bool]) -> tuple[list[Tensor], list[Tensor]]:
    """A and G as they are kept, and as full matrices."""
    generator = torch.Generator().manual_seed(0)
    kept, full = [], []
    for only, d in zip(reversed(diagonal), (D_IN, D_OUT), strict=True):
        columns = torch.randn(LAYERS * REPLICAS, d, 9, generator=generator, dtype=torch.float64)
        shape = (LAYERS, REPLICAS, -1, d)
        moment = second_moment(columns, only).reshape(shape)
        kept.append(moment)
        full.append(torch.diag_embed(moment.squeeze(-2)) if only else moment)
    return kept, full


def test_the_diagonal_is_that_of_the_second_moment() -> None:
    columns = torch.randn(2, 4, 9, dtype=torch.float64)
    diagonal = second_moment(columns, False).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(second_moment(columns, True), diagonal[:, None])


@each_inverse
@each_side
def test_the_inverse_is_that_of_the_full_matrix(inverse: str, diagonal: tuple[bool, bool]) -> None:
    kept, full = factors(diagonal)
    gradient = torch.randn(LAYERS, REPLICAS, D_OUT, D_IN, dtype=torch.float64)
    own, other = (INVERSES[inverse].compute(a, g, DAMPING).apply(gradient) for a, g in (kept, full))
    torch.testing.assert_close(own, other)


@each_side
def test_the_exact_inverse_solves_the_dense_system(diagonal: tuple[bool, bool]) -> None:
    kept, full = factors(diagonal)
    gradient = torch.randn(LAYERS, REPLICAS, D_OUT, D_IN, dtype=torch.float64)
    update = INVERSES["eigen"].compute(kept[0], kept[1], DAMPING).apply(gradient)
    for place in [(0, 0), (LAYERS - 1, REPLICAS - 1)]:
        block = torch.kron(full[1][place].contiguous(), full[0][place].contiguous())
        block += DAMPING * torch.eye(len(block), dtype=block.dtype)
        solved = torch.linalg.solve(block, gradient[place].flatten())
        torch.testing.assert_close(update[place].flatten(), solved)


@each_inverse
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_factor_spoils_its_own_slot_only(inverse: str, bad: float) -> None:
    (a, g), _ = factors((True, True))
    gradient = torch.ones(LAYERS, REPLICAS, D_OUT, D_IN, dtype=torch.float64)
    good = INVERSES[inverse].compute(a, g, DAMPING).apply(gradient)
    a[1, 0, 0, 2] = bad
    spoiled = INVERSES[inverse].compute(a, g, DAMPING).apply(gradient)
    assert spoiled[1, 0].isnan().all()
    spoiled[1, 0] = good[1, 0]
    torch.testing.assert_close(spoiled, good, rtol=0, atol=0)


@each_inverse
def test_a_singular_diagonal_without_damping_has_no_inverse(inverse: str) -> None:
    (a, g), _ = factors((True, False))
    g[0, 0, 0, 1] = 0
    blocks = KroneckerBlocks(LAYERS, REPLICAS, D_OUT, D_IN, inverse, (True, False), dtype=a.dtype)
    assert not blocks.fold(a, g, torch.ones(LAYERS, dtype=torch.bool), 0.0).any()
    assert blocks.refresh_inverse(0.0).nonzero().tolist() == [[0, 0]]
    gradient = torch.randn(LAYERS, REPLICAS, D_OUT, D_IN, dtype=torch.float64)
    torch.testing.assert_close(blocks.inverse.apply(gradient)[0, 0], gradient[0, 0])  # a plain step
    assert not blocks.refresh_inverse(DAMPING).any()


@each_inverse
def test_the_diagonal_takes_the_room_of_one_row(inverse: str) -> None:
    blocks = KroneckerBlocks(1, 1, 50_000, 4, inverse, (True, False), device="meta")
    others = 50_000 * 4 if inverse == "eigen" else 0
    numbers = sum(x.numel() for x in blocks.state(0).values())
    assert numbers == 2 * (50_000 + 16) + others + 2
