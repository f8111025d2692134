"""Any finite semi-definite factors give a finite inverse that acts as float64's does."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kfac2.curvature import INVERSES
from kfac2.curvature.inverses import eigh_or_nan, spd_inverse_or_nan, tikhonov_pi

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
each_inverse = pytest.mark.parametrize("name", INVERSES)


@dataclass(frozen=True)
class Factor:
    """A recipe for ``x xᵀ``: ``log_*`` are powers of ten, ``zeros`` the share of rows that are zero, ``mean`` the
    features' mean in units of their deviation."""

    size: int
    rank: int
    log_scale: float = 0.0
    log_condition: float = 0.0
    zeros: float = 0.0
    mean: float = 0.0
    seed: int = 0

    def matrix(self) -> Tensor:
        """``(size, size)``, float32; its largest entry is about ``10^log_scale``."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.size, self.rank, generator=generator, dtype=torch.float64) + self.mean
        order = torch.randperm(self.size, generator=generator)
        x *= torch.logspace(0, -self.log_condition / 2, self.size, dtype=torch.float64)[order, None]
        x[torch.rand(self.size, generator=generator) < self.zeros] = 0
        moment = x @ x.T
        return (moment / moment.max().clamp(min=1e-300) * 10.0**self.log_scale).float()


any_factor = st.builds(
    Factor,
    size=st.sampled_from([1, 2, 5, 40, 90]),
    rank=st.sampled_from([1, 2, 30, 90]),
    log_scale=st.floats(-30, 30),
    log_condition=st.floats(0, 30),
    zeros=st.sampled_from([0.0, 0.1, 0.8, 1.0]),
    mean=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
dead_units = Factor(257, 60, zeros=0.8)
lost_shift = Factor(30, 60, log_scale=6, mean=1e3)


PAIRS = [
    (dead_units, Factor(5, 5)),
    (lost_shift, Factor(5, 5)),
    (Factor(40, 5, log_scale=30), Factor(40, 5, log_scale=30)),
    (Factor(40, 5, log_scale=30), Factor(40, 5, log_scale=-30)),
    (Factor(40, 5, log_scale=-30), Factor(40, 5, log_scale=-30)),
]


def damped_factors(name: str, a: Tensor, g: Tensor, damping: float) -> list[tuple[Tensor, Tensor, float]]:
    """Terms ``(G, A, c)`` of the damped block ``V ↦ Σ c G V A``, float64."""
    a, g = a.double(), g.double()
    one_a, one_g = torch.eye(len(a)).double(), torch.eye(len(g)).double()
    if name == "eigen":
        return [(g, a, 1.0), (one_g, one_a, damping)]
    pi, root = tikhonov_pi(a, g), damping**0.5
    return [(g + root / pi * one_g, a + pi * root * one_a, 1.0)]


@each_inverse
@few
@given(any_factor, any_factor, st.floats(-6, 0))
def test_the_action_is_that_of_float64(name: str, first: Factor, second: Factor, log_damping: float) -> None:
    check_action(name, first.matrix(), second.matrix(), 10.0**log_damping)


@each_inverse
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_action_on_what_failed_once(name: str, first: Factor, second: Factor) -> None:
    check_action(name, first.matrix(), second.matrix(), 1e-2)


def check_action(name: str, a: Tensor, g: Tensor, damping: float) -> None:
    """The tolerance is ``20 ε κ``, ε float32's rounding, κ the damped block's condition, twice over: for the update's
    distance from float64's, relative to the longest update that the damping allows (at most 2, whatever κ), and for
    what is left of the gradient when the damped block is applied to the update (of any κ)."""
    gradient = torch.randn(len(g), len(a), generator=torch.Generator().manual_seed(1))
    inverse = INVERSES[name].compute(a, g, damping)
    assert all(part.isfinite().all() for part in inverse)
    update, longest = inverse.apply(gradient).double(), gradient.double().norm() / damping
    exact = INVERSES[name].compute(a.double(), g.double(), damping).apply(gradient.double())
    rounding = 20 * torch.finfo(torch.float32).eps
    block = damped_factors(name, a, g, damping)
    norm = sum(c * torch.linalg.matrix_norm(g, 2) * torch.linalg.matrix_norm(a, 2) for g, a, c in block)
    assert (update - exact).norm() <= min(rounding * float(norm) / damping, 2.0) * longest
    left = gradient.double() - sum(c * g @ update @ a for g, a, c in block)
    underflow = len(a) * len(g) * torch.finfo(torch.float32).tiny
    assert left.norm() <= rounding * norm * update.norm() + norm * underflow


@few
@given(any_factor)
def test_eigh_restores_the_matrix(factor: Factor) -> None:
    x = factor.matrix()
    values, vectors = eigh_or_nan(x)
    restored = (vectors.double() * values.double()) @ vectors.double().mT
    assert (restored - x.double()).norm() <= 1e-5 * x.double().norm() + torch.finfo(x.dtype).tiny
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(x)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [1e-3, 1e-12, 1e-30])
def test_a_shift_below_rounding_is_not_lost(shift: float) -> None:
    x = torch.ones(3, 3)
    inverse = spd_inverse_or_nan(x, torch.full((1, 1), shift, dtype=torch.float64))
    across = torch.tensor([1.0, -1.0, 0.0])
    torch.testing.assert_close(shift * (inverse @ across), across, rtol=1e-3, atol=1e-3)


def test_a_shift_that_cholesky_loses_unnoticed_is_not_lost() -> None:
    x, shift = Factor(10, 1).matrix(), torch.full((1, 1), 1e-7, dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(x + shift.float() * torch.eye(10))
    assert info == 0
    assert torch.cholesky_inverse(factor).diagonal().max() > 1.1 / shift
    assert spd_inverse_or_nan(x, shift).diagonal().max() <= 1.01 / shift


@pytest.mark.parametrize("silent", [False, True])
def test_what_fails_in_single_precision_is_decomposed_in_double(
    monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    x, eigh, precisions = (
        torch.stack([Factor(5, 9, seed=s).matrix() for s in range(3)]),
        torch.linalg.eigh,
        [],
    )
    expected = eigh(x)

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        precisions.append(matrix.dtype)
        values, vectors = eigh(matrix)
        bad = (matrix == x[1]).all((-2, -1)) & (matrix.dtype == torch.float32)
        if bad.any() and not silent:
            raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]
        return values.masked_fill(bad[..., None], torch.nan), vectors

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigh_or_nan(x)
    single, double = torch.float32, torch.float64
    alone = [single, double] if silent else [single, single, double, single]
    assert precisions == [single, *alone]
    torch.testing.assert_close(values, expected.eigenvalues)
    torch.testing.assert_close((vectors * values[:, None, :]) @ vectors.mT, x)


@each_inverse
def test_layers_with_other_rows_zero_are_their_own_blocks(name: str) -> None:
    a = torch.stack([Factor(90, 30, zeros=0.8, seed=seed).matrix() for seed in range(3)])
    g = torch.stack([Factor(5, 9, seed=seed).matrix() for seed in range(3)])
    gradient = torch.randn(3, 5, 90, generator=torch.Generator().manual_seed(0))
    together = INVERSES[name].compute(a, g, 1e-2).apply(gradient)
    alone = torch.stack([INVERSES[name].compute(a[i], g[i], 1e-2).apply(gradient[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@each_inverse
def test_numbers_near_the_largest_do_not_overflow(name: str) -> None:
    a, g = torch.full((40, 40), 1e38), torch.eye(2)
    g[1, 1] = 0
    assert INVERSES[name].compute(a, g, 1e-2).apply(torch.ones(2, 40)).isfinite().all()
