"""Damped inverses against dense float64 matrices; one bad matrix never touches another."""

import pytest
import torch
from torch import Tensor

from kfac2.curvature import INVERSES
from kfac2.curvature.inverses import eigh_or_nan, spd_inverse_or_nan, tikhonov_pi

D_OUT, D_IN, DAMPING = 3, 4, 1e-2
each_inverse = pytest.mark.parametrize("name", INVERSES)


def psd(*shape: int, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rank = rank or shape[-1]
    x = torch.randn(*shape, rank, generator=generator, dtype=torch.float64)
    return x @ x.mT / rank


def factors(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.randn(*leading, D_OUT, D_IN, dtype=torch.float64)
    return psd(*leading, D_IN, seed=1), psd(*leading, D_OUT, seed=2), gradient


def dense_solution(name: str, a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """Solve with the whole damped block, the gradient's rows stacked: ``G ⊗ A``."""
    if name == "eigen":
        block = torch.kron(g, a) + DAMPING * torch.eye(len(g) * len(a)).double()
    else:
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        damped_a = a + pi * DAMPING**0.5 * torch.eye(len(a)).double()
        damped_g = g + DAMPING**0.5 / pi * torch.eye(len(g)).double()
        block = torch.kron(damped_g, damped_a)
    return torch.linalg.solve(block, gradient.flatten()).view_as(gradient)


@each_inverse
def test_inverse_is_the_dense_one(name: str) -> None:
    a, g, gradient = factors()
    solution = INVERSES[name].compute(a, g, DAMPING).apply(gradient)
    torch.testing.assert_close(solution, dense_solution(name, a, g, gradient), rtol=1e-11, atol=1e-11)


@each_inverse
def test_a_batch_is_its_members(name: str) -> None:
    a, g, gradient = factors(2, 3)
    batched = INVERSES[name].compute(a, g, DAMPING).apply(gradient)
    for i in range(2):
        for r in range(3):
            alone = dense_solution(name, a[i, r], g[i, r], gradient[i, r])
            torch.testing.assert_close(batched[i, r], alone, rtol=1e-10, atol=1e-10)


@each_inverse
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_spoils_its_own_slot_only(name: str, bad: float) -> None:
    a, g, gradient = factors(3)
    good = INVERSES[name].compute(a, g, DAMPING).apply(gradient)
    a[1, 0, 0] = bad
    solution = INVERSES[name].compute(a, g, DAMPING).apply(gradient)
    assert not solution[1].isfinite().all()
    assert torch.equal(solution[[0, 2]], good[[0, 2]])


@each_inverse
@pytest.mark.parametrize("zero", ["a", "g", "both"])
def test_zero_factors_give_the_damping_alone(name: str, zero: str) -> None:
    a, g, gradient = factors()
    a = torch.zeros_like(a) if zero != "g" else a
    g = torch.zeros_like(g) if zero != "a" else g
    solution = INVERSES[name].compute(a, g, DAMPING).apply(gradient)
    assert solution.isfinite().all()
    if name == "eigen" or zero == "both":
        torch.testing.assert_close(solution, gradient / DAMPING)


@each_inverse
def test_no_damping_inverts_a_regular_block_and_fails_on_a_singular_one(name: str) -> None:
    a, g, gradient = factors(2)
    a[1] = 0
    inverse = INVERSES[name].compute(a, g, 0.0)
    torch.testing.assert_close((g @ inverse.apply(gradient) @ a)[0], gradient[0])
    assert not all(part[1].isfinite().all() for part in inverse)


def test_negative_eigenvalues_count_as_zero() -> None:
    a, g = torch.diag(torch.tensor([2.0, -1e-3])), torch.eye(1)
    solution = INVERSES["eigen"].compute(a, g, DAMPING).apply(torch.ones(1, 2))
    torch.testing.assert_close(solution, torch.tensor([[1 / (2 + DAMPING), 1 / DAMPING]]))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_pi_is_equation_8_and_a_rescaled_pair_of_factors_moves_it_along(scale: float) -> None:
    a, g, gradient = factors()
    pi = tikhonov_pi(a, g)
    torch.testing.assert_close(pi, ((a.trace() / D_IN) / (g.trace() / D_OUT)).sqrt())
    torch.testing.assert_close(tikhonov_pi(scale * a, g / scale), scale * pi)
    solutions = [INVERSES["tikhonov"].compute(c * a, g / c, DAMPING).apply(gradient) for c in (1.0, scale)]
    torch.testing.assert_close(*solutions, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_without_a_trace_is_one(a: float, g: float) -> None:
    assert tikhonov_pi(a * torch.eye(3), g * torch.eye(2)) == 1


def test_eigh_failure_is_handled_per_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x = psd(2, 3, 4)
    expected = torch.linalg.eigh(x)
    poison, eigh, calls = x[1, 0].clone(), torch.linalg.eigh, []

    def failing(matrices: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrices.shape)
        if any(torch.equal(matrix, poison) for matrix in matrices.reshape(-1, 4, 4)):
            raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigh_or_nan(x)
    assert len(calls) == 7
    good = torch.ones(2, 3, dtype=torch.bool)
    good[1, 0] = False
    torch.testing.assert_close(values[good], expected.eigenvalues[good])
    torch.testing.assert_close((vectors * values[..., None, :] @ vectors.mT)[good], x[good])
    assert values[1, 0].isnan().all()
    assert vectors[1, 0].isnan().all()


def test_cholesky_of_an_indefinite_matrix_is_nan_in_its_slot_only() -> None:
    x = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))])
    inverse = spd_inverse_or_nan(x, torch.full((2, 1, 1), 0.25))
    torch.testing.assert_close(inverse[0], torch.eye(2) / 1.25)
    assert inverse[1].isnan().all()
