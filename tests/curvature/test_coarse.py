"""CoarseSpace against Algorithm 1's dense matrices, in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac2 import CoarseSpace

LAYERS, REPLICAS, SAMPLES = 3, 2, 7
SHAPES = [(2, 4), (2, 4), (5, 3)]  # (d_out, d_in): layers 0 and 1 share a block
Samples = dict[int, tuple[Tensor, Tensor]]


def space(
    shapes: Sequence[tuple[int, int]] = SHAPES, replicas: int = REPLICAS, **options: Any
) -> CoarseSpace:
    coarse = CoarseSpace(**options)
    coarse.bind(shapes, replicas, torch.device("cpu"))
    return coarse


def samples(seed: int, count: int = SAMPLES) -> Samples:
    """Layer inputs and output gradients, a column per sample."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return {
        i: (
            torch.randn(REPLICAS, d_in, count, **options) + 0.5,
            torch.randn(REPLICAS, d_out, count, **options),
        )
        for i, (d_out, d_in) in enumerate(SHAPES)
    }


def observe(coarse: CoarseSpace, data: Samples) -> None:
    coarse.accumulate({i: (a.sum(1), g.sum(1)) for i, (a, g) in data.items()})


def dense(fisher: str, data: Samples, replica: int) -> Tensor:
    """``Z F Zᵀ``, entry by entry: eq. 7's Kronecker products, or the per-sample gradients' sums."""
    matrix = torch.zeros(LAYERS, LAYERS, dtype=torch.float64)
    for i, (a_i, g_i) in data.items():
        for j, (a_j, g_j) in data.items():
            (x, y), (u, v) = (a_i[replica], a_j[replica]), (g_i[replica], g_j[replica])
            if fisher == "kronecker":
                matrix[i, j] = torch.kron(x @ y.T / SAMPLES, u @ v.T / SAMPLES).sum()
            else:
                gradients = torch.einsum("ib,jb->bij", u, x), torch.einsum("ib,jb->bij", v, y)
                sums = [gradient.sum((1, 2)) for gradient in gradients]
                matrix[i, j] = (sums[0] * sums[1]).mean()
    return matrix


def folded(fisher: str, seed: int = 0) -> CoarseSpace:
    coarse = space(fisher=fisher)
    observe(coarse, samples(seed))
    assert not coarse.fold(0.0).any()
    return coarse


each_fisher = pytest.mark.parametrize("fisher", ["kronecker", "exact"])


@each_fisher
def test_matrix_is_the_dense_one(fisher: str) -> None:
    matrix = folded(fisher).matrix()
    assert matrix.dtype == torch.float64
    for r in range(REPLICAS):
        torch.testing.assert_close(matrix[r], dense(fisher, samples(0), r), rtol=1e-12, atol=1e-12)


@each_fisher
def test_micro_batches_are_one_batch(fisher: str) -> None:
    data, coarse = samples(0), space(fisher=fisher)
    for part in (slice(0, 2), slice(2, None)):
        observe(coarse, {i: (a[..., part], g[..., part]) for i, (a, g) in data.items()})
    coarse.fold(0.0)
    torch.testing.assert_close(coarse.matrix(), folded(fisher).matrix(), rtol=1e-12, atol=1e-12)


@each_fisher
def test_grams_not_their_products_are_averaged(fisher: str) -> None:
    coarse, first, second = folded(fisher, 0), folded(fisher, 0), folded(fisher, 1)
    observe(coarse, samples(1))
    coarse.fold(0.25)
    expected = (0.25 * first.grams + 0.75 * second.grams).prod(0)
    torch.testing.assert_close(coarse.matrix(), expected)


@each_fisher
def test_solve_inverts_the_damped_matrix(fisher: str) -> None:
    coarse = folded(fisher)
    assert not coarse.refresh(0.1).any()
    assert coarse.has_inverse().all()
    right = torch.randn(REPLICAS, LAYERS, dtype=torch.float64)
    damped = coarse.matrix() + 0.1 * torch.eye(LAYERS).double()
    torch.testing.assert_close(coarse.solve(right), torch.linalg.solve(damped, right))
    assert coarse.indefinite == 0


@each_fisher
@pytest.mark.parametrize("dampings", [("identity", "consistent"), ("consistent", "identity")])
def test_consistent_damping_is_the_coarse_matrix_of_the_damped_fisher(
    fisher: str, dampings: tuple[str, str]
) -> None:
    """``Z (F + λI) Zᵀ = Z F Zᵀ + λ Z Zᵀ``; a state saved with the other damping is good until the next refresh."""
    z = torch.block_diag(*(torch.ones(1, d_out * d_in) for d_out, d_in in SHAPES)).double()
    squares = {"identity": torch.eye(LAYERS).double(), "consistent": z @ z.T}
    coarse = space(fisher=fisher, damping=dampings[0])
    observe(coarse, samples(0))
    coarse.fold(0.0)
    coarse.refresh(0.1)
    other = space(fisher=fisher, damping=dampings[1])
    other.load_state_dict(coarse.state_dict())
    right = torch.randn(REPLICAS, LAYERS, dtype=torch.float64)
    for r in range(REPLICAS):
        damped = dense(fisher, samples(0), r) + 0.1 * squares[dampings[0]]
        for one in (coarse, other):
            torch.testing.assert_close(one.solve(right)[r], torch.linalg.solve(damped, right[r]))
    other.refresh(0.1)
    for r in range(REPLICAS):
        damped = dense(fisher, samples(0), r) + 0.1 * squares[dampings[1]]
        torch.testing.assert_close(other.solve(right)[r], torch.linalg.solve(damped, right[r]))


def test_float64_where_float32_would_fail() -> None:
    """Eigenvalues over twelve decades, from float32 sums."""
    coarse = space(SHAPES[:2], replicas=1, fisher="exact")
    alpha = torch.tensor([[1e6, 1e6]]), torch.tensor([[1.0, -1.0]])
    ones = torch.ones(1, 2)
    coarse.accumulate({i: (alpha[i], ones) for i in range(2)})
    coarse.fold(0.0)
    coarse.refresh(1e-3)
    solution = coarse.solve(torch.ones(1, 2, dtype=torch.float64))
    torch.testing.assert_close(solution[0, 1].item(), 1 / 1.001)
    torch.testing.assert_close(solution[0, 0].item(), 1 / (1e12 + 1e-3))


@each_fisher
def test_sums_of_float32_samples_are_float64(fisher: str) -> None:
    single, double = space(fisher=fisher), space(fisher=fisher)
    sums = {i: (torch.randn(REPLICAS, 500), torch.randn(REPLICAS, 500)) for i in range(LAYERS)}
    single.accumulate(sums)
    double.accumulate({i: (alpha.double(), gamma.double()) for i, (alpha, gamma) in sums.items()})
    for coarse in (single, double):
        coarse.fold(0.0)
    torch.testing.assert_close(single.matrix(), double.matrix(), rtol=1e-12, atol=1e-12)


def test_a_clearly_negative_eigenvalue_gets_a_small_step_and_is_counted() -> None:
    coarse = space(SHAPES[:2], replicas=2)
    coarse.seen[:] = True
    coarse.grams[0] = torch.tensor([[[0.0, 4.0], [4.0, 0.0]], [[2.0, 1.0], [1.0, 2.0]]])
    coarse.grams[1] = 1.0
    coarse.refresh(0.5)
    torch.testing.assert_close(coarse.inverse[0], torch.eye(2).double() / 4.5)
    torch.testing.assert_close(
        coarse.inverse[1], torch.linalg.inv(coarse.matrix()[1] + 0.5 * torch.eye(2).double())
    )
    assert coarse.indefinite == 1
    assert coarse.negative_eigenvalues.tolist() == [1, 0]


def test_restrict_and_prolong_are_z() -> None:
    coarse = folded("kronecker")
    coarse.weight = 0.5
    pair = torch.randn(2, REPLICAS, *SHAPES[0], dtype=torch.float64)
    single = torch.randn(1, REPLICAS, *SHAPES[2], dtype=torch.float64)
    blocks = [(torch.tensor([2]), single), (torch.tensor([0, 1]), pair)]
    sizes = [d_out * d_in for d_out, d_in in SHAPES]
    z = torch.block_diag(*(torch.ones(1, size) for size in sizes)).double()
    gradients = torch.cat([pair[0].flatten(1), pair[1].flatten(1), single[0].flatten(1)], dim=1)
    torch.testing.assert_close(coarse.restrict(blocks), gradients @ z.T)

    coefficients = torch.randn(REPLICAS, LAYERS, dtype=torch.float64)
    on_single, on_pair = coarse.prolong(coefficients, blocks)
    updates = [block.expand_as(like) for block, like in ((on_pair, pair), (on_single, single))]
    flat = [updates[0][0].flatten(1), updates[0][1].flatten(1), updates[1][0].flatten(1)]
    torch.testing.assert_close(torch.cat(flat, dim=1), 0.5 * coefficients @ z)


@each_fisher
def test_a_layer_never_seen_takes_no_part(fisher: str) -> None:
    coarse, data = space(fisher=fisher), samples(0)
    del data[1]
    observe(coarse, data)
    coarse.fold(0.0)
    coarse.refresh(0.1)
    assert not coarse.inverse[:, 1].any()
    assert not coarse.inverse[:, :, 1].any()
    kept = folded(fisher).matrix()[:, [0, 2]][:, :, [0, 2]]
    expected = torch.linalg.inv(kept + 0.1 * torch.eye(2).double())
    torch.testing.assert_close(coarse.inverse[:, [0, 2]][:, :, [0, 2]], expected)


@each_fisher
def test_a_layer_seen_late_starts_from_its_first_observation(fisher: str) -> None:
    coarse, data = space(fisher=fisher), samples(0)
    observe(coarse, {i: data[i] for i in (0, 2)})
    coarse.fold(0.0)
    observe(coarse, samples(1))
    coarse.fold(0.9)
    late, fresh = coarse.matrix(), folded(fisher, 1).matrix()
    torch.testing.assert_close(late[:, 1], fresh[:, 1])
    assert not torch.allclose(late[:, 0, 0], fresh[:, 0, 0])


@each_fisher
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_of_one_replica_is_rejected_alone(fisher: str, bad: float) -> None:
    coarse, data = folded(fisher), samples(1)
    before = coarse.grams.clone()
    data[1][1][0, 0, 0] = bad
    observe(coarse, data)
    assert coarse.fold(0.5).tolist() == [True, False]
    healthy = folded(fisher)
    observe(healthy, samples(1))
    healthy.fold(0.5)
    assert torch.equal(coarse.grams[:, 0], before[:, 0])
    assert torch.equal(coarse.grams[:, 1], healthy.grams[:, 1])


def test_a_bad_first_sample_leaves_no_inverse_and_the_next_one_heals() -> None:
    coarse, data = space(), samples(0)
    data[0][0][1] = torch.nan
    observe(coarse, data)
    coarse.fold(0.0)
    assert coarse.refresh(0.1).tolist() == [False, True]
    assert coarse.has_inverse().tolist() == [True, False]
    observe(coarse, samples(1))
    coarse.fold(0.5)
    assert not coarse.refresh(0.1).any()
    torch.testing.assert_close(coarse.matrix()[1], folded("kronecker", 1).matrix()[1])


def test_a_failed_decomposition_keeps_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = folded("kronecker")
    coarse.refresh(0.1)
    before = coarse.inverse.clone()

    def fail(x: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert coarse.refresh(1.0).all()
    assert torch.equal(coarse.inverse, before)


@each_fisher
def test_state_goes_through_and_is_not_changed_afterwards(fisher: str) -> None:
    source, target = folded(fisher), space(fisher=fisher)
    source.refresh(0.1)
    state = source.state_dict()
    held = {key: torch.as_tensor(value).clone() for key, value in state.items()}
    target.load_state_dict(state)
    for coarse in (source, target):
        observe(coarse, samples(1))
        coarse.fold(0.5)
        coarse.refresh(0.2)
    assert torch.equal(source.inverse, target.inverse)
    assert all(torch.equal(torch.as_tensor(value), held[key]) for key, value in state.items())


@pytest.mark.parametrize(
    "other", [{"fisher": "exact"}, {"shapes": [*SHAPES, (1, 1)]}, {"replicas": REPLICAS + 1}]
)
def test_foreign_states_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shape"):
        space(**other).check_state_dict(folded("kronecker").state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "diagonal"}, "coarse_fisher 'diagonal'.*kronecker, exact"),
        ({"grid": "finest"}, "coarse_grid 'finest'.*pairwise, common"),
        ({"resample": "cubic"}, "resample 'cubic'.*nearest, area"),
        ({"weight": -1.0}, "coarse_weight.*-1.0"),
        ({"weight": float("nan")}, "coarse_weight.*nan"),
        ({"weight": float("inf")}, "coarse_weight.*inf"),
        ({"damping": "none"}, "coarse_damping 'none'.*identity, consistent"),
        ({"max_ratio": -1.0}, "coarse_max_ratio.*-1.0"),
        ({"max_ratio": float("nan")}, "coarse_max_ratio.*nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoarseSpace(**options)
