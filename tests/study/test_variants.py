"""Every variant of the coarse space against its dense definition, over trajectories in float64."""

from collections.abc import Hashable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from experiments.figures.study.records import Study
from experiments.study import variants
from experiments.study.arms import two
from experiments.study.forms import SPACES
from experiments.study.lengths import SCHEDULE, PermutedBySeed, schedule, scheduled
from experiments.study.variants import VARIANTS, Observed, Permuted, RandomBasis, Scheduled, two_level_variant
from kfac2 import TwoLevelKFAC
from tests.optim.test_convolution_trajectories import SmallResNet, images, small_steps
from tests.optim.test_trajectories import compare, options_for
from tests.reference.coarse import LiteralTwoLevelKFAC, lower_triangle, matrix_absolute
from tests.reference.fisher import restriction, vec
from tests.reference.kfac import LiteralKFAC, PerLayer, eye_like
from tests.reference.maps import grid_of, pair_grid, positions, resample, rows
from tests.reference.precision import float64
from tests.reference.problems import BERNOULLI, GAUSSIAN, Replicated, real_step

STEPS = 10
RECORDS = Path(__file__).parents[2] / "results" / "study"


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(variants, "MLP_EPOCH_STEPS", 1)
    with float64():
        yield


class Literal(LiteralTwoLevelKFAC):
    """The full correction; ``coarse`` is the real optimizer's coarse space, for what is random in it."""

    coarse: Any = None

    def one_level(self) -> Tensor:
        return LiteralKFAC.form_preconditioner(self)

    def damped_inverse(self) -> Tensor:
        matrix = matrix_absolute(self.coarse_matrix())
        return torch.linalg.inv(matrix + self.damping * torch.eye(len(matrix)))


class LiteralDiagonal(Literal):
    def coarse_matrix(self) -> Tensor:
        return super().coarse_matrix().diagonal().diag()


class LiteralDampingOnly(Literal):
    def form_preconditioner(self) -> Tensor:
        Z = restriction(self.sizes)
        return self.one_level() + Z.T @ Z / self.damping


class LiteralConsistent(Literal):
    """``Zᵀ (F̃_coarse + λ Z Zᵀ)^{-1} Z``."""

    def form_preconditioner(self) -> Tensor:
        Z = restriction(self.sizes)
        return self.one_level() + Z.T @ torch.linalg.inv(self.coarse_matrix() + self.damping * Z @ Z.T) @ Z


class LiteralBounded(Literal):
    """A correction longer than the one-level update is brought to its length."""

    def form_preconditioner(self) -> Tensor:
        Z, self.blocks = restriction(self.sizes), self.one_level()
        self.correction = Z.T @ self.damped_inverse() @ Z
        return self.blocks

    def precondition(self, nabla: Tensor) -> Tensor:
        own, correction = self.blocks @ nabla, self.correction @ nabla
        return own + correction * min(1.0, own.norm() / correction.norm())


class LiteralMatched(Literal):
    """A direction ``Zᵀ M Z ∇`` as long as the full correction."""

    def middle(self) -> Tensor:
        raise NotImplementedError

    def form_preconditioner(self) -> Tensor:
        self.blocks, self.inverse_of_coarse, self.M = self.one_level(), self.damped_inverse(), self.middle()
        return self.blocks

    def precondition(self, nabla: Tensor) -> Tensor:
        Z = restriction(self.sizes)
        full, other = Z.T @ self.inverse_of_coarse @ Z @ nabla, Z.T @ self.M @ Z @ nabla
        return self.blocks @ nabla + other * full.norm() / other.norm()


class LiteralIdentity(LiteralMatched):
    def middle(self) -> Tensor:
        return torch.eye(len(self.sizes))


class LiteralDiagonalMatched(LiteralMatched):
    def middle(self) -> Tensor:
        return torch.linalg.inv(
            self.coarse_matrix().diagonal().diag() + self.damping * torch.eye(len(self.sizes))
        )


class LiteralPermuted(LiteralMatched):
    refreshes = 0

    def middle(self) -> Tensor:
        self.refreshes += 1
        order = torch.randperm(len(self.sizes), generator=torch.Generator().manual_seed(self.refreshes))
        P = torch.eye(len(self.sizes))[order]
        return P @ self.damped_inverse() @ P.T


class LiteralBasis(Literal):
    """Any ``Z`` with one row per layer, in dense Kronecker products."""

    def rows(self) -> dict[str, Tensor]:
        return {
            name: vec(torch.outer(*pattern))
            for name, pattern in zip(self.preconditioned, self.coarse.patterns, strict=True)
        }

    def coarse_entry(self, i: str, j: str) -> Tensor:
        block = torch.kron(self.averages["A", i, j], self.averages["G", i, j])
        return self.rows()[i] @ block @ self.rows()[j]

    def form_preconditioner(self) -> Tensor:
        Z = torch.block_diag(*[row[None] for row in self.rows().values()])
        return self.one_level() + Z.T @ self.damped_inverse() @ Z


class LiteralAuthorsScale(Literal):
    """Off the diagonal, sums over positions in place of means; a layer with one position meets an average."""

    def statistics(self, a: PerLayer, g: PerLayer) -> dict[Hashable, Tensor]:
        statistics = super().statistics(a, g)
        for i, j in lower_triangle([name for name in self.layers if name in a]):
            if i != j:
                statistics["A", i, j] = self.sum_over_positions(a, i, j)
                statistics["G", i, j] = self.sum_over_positions(g, i, j)
        return statistics

    def sum_over_positions(self, maps: PerLayer, i: str, j: str) -> Tensor:
        one, other = maps[i], maps[j]
        grid = () if 1 in (positions(one), positions(other)) else pair_grid(grid_of(one), grid_of(other))
        left, right = (rows(resample(x, grid, self.resample)) for x in (one, other))
        return left.T @ right / len(one)


class LiteralAuthorsAccumulated(LiteralAuthorsScale):
    """An upper triangle that is added to, a diagonal that is overwritten, a plain inverse."""

    def form_preconditioner(self) -> Tensor:
        latest = super().coarse_matrix()
        self.kept = getattr(self, "kept", torch.zeros_like(latest))
        for i in range(len(latest)):
            self.kept[i, i] = latest[i, i]
            for j in range(i):
                self.kept[i, j] = self.kept[j, i] = self.kept[i, j] + latest[i, j]
        Z = restriction(self.sizes)
        return self.one_level() + Z.T @ torch.linalg.inv(self.kept + self.damping * eye_like(latest)) @ Z


class LiteralScheduled(Literal):
    def form_preconditioner(self) -> Tensor:
        self.blocks = self.one_level()
        return super().form_preconditioner()

    def precondition(self, nabla: Tensor) -> Tensor:
        first, last = self.coarse.first, self.coarse.last or STEPS
        return (self.preconditioner if first <= self.t <= last else self.blocks) @ nabla


class LiteralOfLength(LiteralMatched):
    """A direction as many times as long as the one-level step as is said for the step; an epoch is one step."""

    def ratio(self) -> float:
        ratios = pd.read_csv(SCHEDULE)["ratio"].to_numpy(dtype=float)
        return float(np.exp(np.log(ratios).mean()) if self.constant else ratios[self.t - 1])

    constant = False

    def restriction(self) -> Tensor:
        return restriction(self.sizes)

    def precondition(self, nabla: Tensor) -> Tensor:
        own, Z = self.blocks @ nabla, self.restriction()
        other = Z.T @ self.M @ Z @ nabla
        return own + other * self.ratio() * own.norm() / other.norm()

    def middle(self) -> Tensor:
        return self.damped_inverse()


class LiteralIdentityOfLength(LiteralOfLength):
    def middle(self) -> Tensor:
        return torch.eye(len(self.sizes))


class LiteralDiagonalOfLength(LiteralOfLength):
    def coarse_matrix(self) -> Tensor:
        return super().coarse_matrix().diagonal().diag()


class LiteralPermutedOfLength(LiteralOfLength):
    def middle(self) -> Tensor:
        order = torch.randperm(len(self.sizes), generator=torch.Generator().manual_seed(0))
        P = torch.eye(len(self.sizes))[order]
        return P @ self.damped_inverse() @ P.T


class LiteralBasisOfLength(LiteralOfLength, LiteralBasis):
    def form_preconditioner(self) -> Tensor:
        return LiteralOfLength.form_preconditioner(self)

    def restriction(self) -> Tensor:
        return torch.block_diag(*[row[None] for row in self.rows().values()])


OF_LENGTH = {
    "full": LiteralOfLength,
    "identity": LiteralIdentityOfLength,
    "diagonal": LiteralDiagonalOfLength,
    "permuted": LiteralPermutedOfLength,
}
TWINS: dict[str, tuple[type[Literal], dict[str, Any]]] = {
    "full": (Literal, {}),
    "exact": (Literal, {"coarse_fisher": "exact"}),
    "observed": (Literal, {}),
    "diagonal": (LiteralDiagonal, {}),
    "damping_only": (LiteralDampingOnly, {}),
    "identity": (LiteralIdentity, {}),
    "diagonal_matched": (LiteralDiagonalMatched, {}),
    "permuted": (LiteralPermuted, {}),
    "signs": (LiteralBasis, {}),
    "gaussian": (LiteralBasis, {}),
    **{name: (LiteralBasis, {}) for name in ("signs_2", "signs_3", "gaussian_2", "gaussian_3")},
    "consistent": (LiteralConsistent, {}),
    "bounded": (LiteralBounded, {}),
    "authors_scale": (LiteralAuthorsScale, {}),
    "authors_accumulated": (LiteralAuthorsAccumulated, {}),
    "first_step": (LiteralScheduled, {}),
    "first_epoch": (LiteralScheduled, {}),
    "after_epoch_5": (LiteralScheduled, {}),
    **{f"{name}_scheduled": (twin, {}) for name, twin in OF_LENGTH.items()},
    **{
        f"{name}_constant": (type("Constant", (twin,), {"constant": True}), {})
        for name, twin in OF_LENGTH.items()
    },
    **{
        f"{basis}{n}_scheduled": (LiteralBasisOfLength, {})
        for basis in ("signs", "gaussian")
        for n in ("", "_2", "_3")
    },
}
PERMUTED_BY_SEED = ("permuted_scheduled", "permuted_constant")  # a seed's permutation is that of its place


def test_every_variant_has_its_twin() -> None:
    assert set(TWINS) == set(VARIANTS) - set(SPACES)  # which have tests of their own


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_a_variant_is_its_dense_definition(name: str, bias: bool) -> None:
    torch.manual_seed(3)
    model, batches = BERNOULLI.network(bias), [[batch] for batch in BERNOULLI.batches(STEPS)]
    reference = deepcopy(model)
    twin_of, settings = TWINS[name]
    options = options_for(BERNOULLI, damping=0.1, kl_clip=1e-3)
    twin = twin_of(deepcopy(model), **settings, **options)
    optimizer = two_level_variant(model, coarse=name, **options)
    twin.coarse = optimizer.coarse
    compare(optimizer, model, [twin], batches)

    full = TwoLevelKFAC(reference, **options)
    for step in batches:
        real_step(full, reference, step)
    same = all(
        torch.allclose(a, b, rtol=1e-6)
        for a, b in zip(reference.parameters(), model.parameters(), strict=True)
    )
    assert same == (name in ("full", "observed", "authors_scale"))  # one position: nothing to scale


@pytest.mark.parametrize("name", ["authors_scale", "authors_accumulated"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_authors_convolutions_are_their_literal_definition(name: str, bias: bool) -> None:
    torch.manual_seed(7)
    network, batches = SmallResNet(2, bias), [[batch] for batch in images(GAUSSIAN)]
    twin_of, settings = TWINS[name]
    options = small_steps(GAUSSIAN, kl_clip=1e-3)
    model, twin = deepcopy(network), twin_of(network, **settings, **options)
    optimizer = two_level_variant(model, coarse=name, **options)
    compare(optimizer, model, [twin], batches)
    assert optimizer.coarse is not None
    assert optimizer.coarse.indefinite > 0


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_authors_off_diagonals_are_as_many_times_too_large_as_a_map_has_positions(size: int) -> None:
    torch.manual_seed(8)
    maps = {i: (torch.randn(1, 4, size, size), torch.randn(1, 4, size, size)) for i in range(3)}
    matrices = []
    for name in ("full", "authors_scale"):
        space = VARIANTS[name]()
        space.bind([(5, 4)] * 3, 1, torch.device("cpu"))
        space.accumulate(maps)
        space.fold(0.0)
        matrices.append(space.matrix()[0])
    ours, theirs = matrices
    times = torch.full((3, 3), float(size**2)).fill_diagonal_(1)
    assert_close(theirs, ours * times, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in PERMUTED_BY_SEED | SPACES.keys()])
def test_a_replica_evolves_as_it_would_alone(name: str) -> None:
    torch.manual_seed(4)
    networks = [BERNOULLI.network(bias=False) for _ in range(2)]
    model = Replicated(networks)
    options = options_for(BERNOULLI, damping=0.1, kl_clip=1e-3)
    together = two_level_variant(model, coarse=name, **options)
    alone = [two_level_variant(network, coarse=name, **options) for network in networks]
    for batches in zip(BERNOULLI.batches(6), BERNOULLI.batches(6), strict=True):
        real_step(together, model, batches)
        for optimizer, network, batch in zip(alone, networks, batches, strict=True):
            real_step(optimizer, network, [batch])
    for key, value in model.named_parameters():
        expected = torch.stack([network.get_parameter(key) for network in networks])
        assert_close(value, expected.reshape(value.shape), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "permuted",
        "diagonal_matched",
        "first_epoch",
        "signs",
        "authors_accumulated",
        "signs_scheduled",
        "permuted_constant",
    ],
)
def test_a_resumed_variant_goes_on_bit_identically(name: str) -> None:
    torch.manual_seed(5)
    model, batches = BERNOULLI.network(bias=True), BERNOULLI.batches(8)
    options = options_for(BERNOULLI)
    optimizer = two_level_variant(model, coarse=name, **options)
    for batch in batches[:5]:
        real_step(optimizer, model, [batch])
    resumed_model = deepcopy(model)
    resumed = two_level_variant(resumed_model, coarse=name, **options)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for batch in batches[5:]:
        real_step(optimizer, model, [batch])
        real_step(resumed, resumed_model, [batch])
    for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_observed_is_the_exact_coarse_fisher() -> None:
    torch.manual_seed(6)
    model = BERNOULLI.network(bias=True)
    twin_model, options = deepcopy(model), options_for(BERNOULLI)
    optimizer = two_level_variant(model, coarse="observed", **options)
    exact = TwoLevelKFAC(twin_model, coarse_fisher="exact", **options)
    for batch in BERNOULLI.batches(3):
        twin_model.load_state_dict(model.state_dict())
        real_step(optimizer, model, [batch])
        real_step(exact, twin_model, [batch])
    assert isinstance(optimizer.coarse, Observed)
    assert exact.coarse is not None
    assert_close(optimizer.coarse.exact_matrix(), exact.coarse.matrix())


def test_schedules() -> None:
    spaces = {name: VARIANTS[name]() for name in ("first_step", "first_epoch", "after_epoch_5")}
    limits = {name: (s.first, s.last) for name, s in spaces.items() if isinstance(s, Scheduled)}
    assert limits == {"first_step": (1, 1), "first_epoch": (1, 1), "after_epoch_5": (6, None)}


def test_the_schedule_is_the_first_edition_s() -> None:
    ratios = Study(RECORDS).run(two()).table("coarse_ratio").median(axis=1)
    assert schedule() == pytest.approx(ratios.tolist(), rel=1e-3)
    assert (scheduled(1, 49), scheduled(49, 49), scheduled(50, 49)) == (9.774, 9.774, 5.628)
    assert scheduled(10**6, 49) == schedule()[-1]


def test_each_seed_has_a_permutation_of_its_own_which_stays() -> None:
    space = PermutedBySeed()
    space.bind([(1, 1)] * 20, 3, torch.device("cpu"))
    orders = space.permutations()
    assert [order.sort().values.tolist() for order in orders] == [list(range(20))] * 3
    assert len({tuple(order.tolist()) for order in orders}) == 3
    space.refresh(0.1)
    assert torch.equal(space.permutations(), orders)
    space.inverse = torch.randn(3, 20, 20)
    gradient = torch.randn(3, 20)
    permutations = torch.eye(20)[orders]
    expected = permutations @ space.inverse @ permutations.mT @ gradient[..., None]
    assert_close(space.solve(gradient), expected.squeeze(-1))


def test_random_bases_are_fixed_and_as_long_as_the_ones() -> None:
    for name in ("signs", "gaussian"):
        first, second = (VARIANTS[name]() for _ in range(2))
        assert isinstance(first, RandomBasis)
        assert isinstance(second, RandomBasis)
        for space in (first, second):
            space.bind([(5, 4), (5, 4), (3, 7)], 1, torch.device("cpu"))
        for i, size in enumerate((20, 20, 21)):
            assert torch.outer(*first.patterns[i]).square().sum() == pytest.approx(size)
            for one, other in zip(first.patterns[i], second.patterns[i], strict=True):
                assert torch.equal(one, other)
        assert not torch.equal(first.patterns[0][0], first.patterns[1][0])
        another = VARIANTS[f"{name}_2"]()
        assert isinstance(another, RandomBasis)
        another.bind([(5, 4), (5, 4), (3, 7)], 1, torch.device("cpu"))
        assert not torch.equal(first.patterns[0][0], another.patterns[0][0])


def test_permutations_differ_between_refreshes() -> None:
    space = VARIANTS["permuted"]()
    assert isinstance(space, Permuted)
    space.bind([(1, 1)] * 20, 1, torch.device("cpu"))
    orders = []
    for _ in range(2):
        space.refresh(0.1)
        orders.append(space.permutation())
        assert orders[-1].sort().values.tolist() == list(range(20))
    assert not torch.equal(*orders)


def test_an_unknown_variant_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown optimizer\.coarse 'half': choose from full, exact, observed"
    ):
        two_level_variant(BERNOULLI.network(bias=False), coarse="half")


def test_convolutions_have_no_other_basis_than_the_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    optimizer = two_level_variant(model, coarse="signs")
    with pytest.raises(NotImplementedError, match="a convolution's coarse basis is the ones only"):
        optimizer.update_curvature(model(torch.randn(3, 1, 3, 3)))
