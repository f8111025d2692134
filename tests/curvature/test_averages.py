"""Running averages and KL clipping against their definitions."""

import pytest
import torch

from kfac2.curvature.averages import decay_at, finite_matrices, running_average
from kfac2.curvature.clipping import kl_clip_factor

YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize(("t", "decay"), [(1, 0.0), (2, 0.5), (11, 10 / 11), (20, 0.95), (1000, 0.95)])
def test_decay_is_algorithm_1s(t: int, decay: float) -> None:
    assert decay_at(t, 0.95) == pytest.approx(decay)


def test_decay_stops_at_the_given_one() -> None:
    assert decay_at(1000, 0.5) == 0.5


def test_average_weighs_old_and_new() -> None:
    old, new = torch.randn(2, 3, 3)
    torch.testing.assert_close(running_average(old, new, YES, YES, 0.9), 0.9 * old + 0.1 * new)


def test_first_observation_is_taken_whole() -> None:
    old, new = torch.full((2, 2), torch.nan), torch.randn(2, 2)
    assert torch.equal(running_average(old, new, YES, NO, 0.9), new)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_rejected_sample_leaves_the_average(bad: float) -> None:
    old = torch.randn(2, 3, 3)
    new = torch.full((2, 3, 3), bad)
    take = torch.tensor([False, True])[:, None, None]
    new[1] = 1.0
    average = running_average(old, new, take, YES, 0.5)
    assert torch.equal(average[0], old[0])
    torch.testing.assert_close(average[1], 0.5 * old[1] + 0.5)


def test_average_leaves_its_arguments_alone() -> None:
    old, new = torch.zeros(2, 2), torch.ones(2, 2)
    running_average(old, new, YES, YES, 0.5)
    assert torch.equal(old, torch.zeros(2, 2))
    assert torch.equal(new, torch.ones(2, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_entry_marks_its_matrix_only(bad: float) -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 0] = bad
    expected = torch.ones(2, 3, dtype=torch.bool)
    expected[1, 2] = False
    assert torch.equal(finite_matrices(x), expected)


def test_clip_factor_is_equation_10() -> None:
    norms = torch.tensor([4.0, 1e-8, 0.0, torch.nan, torch.inf])
    nu = kl_clip_factor(norms, 1e-2)
    torch.testing.assert_close(nu, torch.tensor([0.05, 1.0, 1.0, torch.nan, 0.0]), equal_nan=True)
