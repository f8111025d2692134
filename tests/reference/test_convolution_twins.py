"""The literal twins' convolutions, positions and grids against hand-computed cases."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.reference.coarse import LiteralTwoLevelKFAC, matrix_absolute
from tests.reference.fisher import (
    labelled_fisher,
    layer_matrix,
    linear_layers,
    per_sample_gradients,
    restriction,
    vec,
)
from tests.reference.kfac import LiteralKFAC
from tests.reference.maps import common_grid, pair_grid, resample
from tests.reference.precision import float64
from tests.reference.problems import GAUSSIAN
from tests.reference.test_twins import observe, settings

close = partial(assert_close, rtol=1e-9, atol=1e-10)  # as in test_twins.py


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


class Sum(nn.Module):
    """All of a sample's numbers added up: ``(B, ...) -> (B, 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(dim=1, keepdim=True)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "stride": 3, "padding": 1, "bias": False},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 2, "padding": "valid"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_is_a_linear_layer_of_its_patches(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, **options), nn.ReLU(inplace=True), Sum())
    x, y = torch.randn(4, 2, 7, 8), torch.randn(4, 1)
    twin = LiteralKFAC(model, **settings())
    a, outputs, output = twin.forward(x)
    W = layer_matrix("0", {n: p.detach() for n, p in model.named_parameters()})
    close(torch.einsum("od,bdyx->boyx", W, a["0"]), outputs["0"].detach())
    # A sample's gradient sums over its positions; the ReLU in place has not spoiled it.
    g = twin.output_gradients(outputs, output, y)
    gradients = torch.einsum("boyx,bdyx->bod", g["0"], a["0"])
    expected = per_sample_gradients(model, x, y, "gaussian")
    close(torch.stack([vec(gradient) for gradient in gradients]), expected)


def test_the_input_factor_averages_over_positions_and_the_gradient_factor_sums() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), Sum())
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, None]
    twin = LiteralKFAC(model, **settings(lr=0.0))
    observe(twin, [(x, model(x).detach() - 2.0)])  # g = 2 at every one of six positions
    close(twin.averages["A", "0"], torch.tensor([[91 / 6, 21 / 6], [21 / 6, 1.0]]))
    close(twin.averages["G", "0"], torch.tensor([[24.0]]))


@pytest.mark.parametrize("inverse", ["eigen", "tikhonov"])
def test_1x1_convolutions_of_1x1_images_are_linear_layers(inverse: str) -> None:
    linear = GAUSSIAN.network(bias=True)
    convolutions = nn.Sequential(
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 3, 1),
        nn.Tanh(),
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 2, 1),
        nn.Flatten(),
    )
    for p, q in zip(convolutions.parameters(), linear.parameters(), strict=True):
        p.data = q.detach().reshape(p.shape)
    twins = [LiteralTwoLevelKFAC(m, **settings(inverse=inverse)) for m in (linear, convolutions)]
    for batch in GAUSSIAN.batches(5):
        twins[0].step(batch.inputs, batch.labels, batch.loss)
        twins[1].step(batch.inputs[:, :, None, None], batch.labels, batch.loss)
        for p, q in zip(convolutions.parameters(), linear.parameters(), strict=True):
            close(p.detach().reshape(q.shape), q.detach())


def test_1x1_convolutions_of_one_row_are_linear_layers_on_a_sequence() -> None:
    sequence = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), Sum())
    row = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 1), Sum())
    for p, q in zip(row.parameters(), sequence.parameters(), strict=True):
        p.data = q.detach().reshape(p.shape)
    x, y = torch.randn(6, 5, 4), torch.randn(6, 1)
    twins = [LiteralTwoLevelKFAC(m, **settings(lr=0.0)) for m in (sequence, row)]
    observe(twins[0], [(x, y)])
    observe(twins[1], [(x.transpose(1, 2).unsqueeze(2), y)])
    close(twins[1].preconditioner, twins[0].preconditioner)


@pytest.mark.parametrize("coarse_fisher", ["kronecker", "exact"])
def test_one_datum_at_one_position_makes_every_kronecker_approximation_exact(coarse_fisher: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2, 2)
    )
    x, y, damping = torch.randn(1, 2, 2, 3), torch.randn(1, 2), 1e-2
    twin = LiteralTwoLevelKFAC(model, coarse_fisher=coarse_fisher, **settings(lr=0.0))
    observe(twin, [(x, y)])
    F = labelled_fisher(model, x, y, "gaussian")
    Z = restriction(twin.sizes)
    mask = torch.block_diag(*[torch.ones(size, size) for size in twin.sizes])
    blocks = torch.linalg.inv(F * mask + damping * torch.eye(len(F)))
    coarse = torch.linalg.inv(Z @ F @ Z.T + damping * torch.eye(len(Z)))
    close(twin.preconditioner, blocks + Z.T @ coarse @ Z)


def pyramid() -> nn.Sequential:
    """Scalar layers on grids of ``(4, 6)``, ``(2, 6)``, ``(2, 2)`` and one position."""
    return nn.Sequential(
        nn.Conv2d(1, 1, 1),
        nn.Tanh(),
        nn.Conv2d(1, 1, (2, 1), stride=(2, 1), bias=False),
        nn.Tanh(),
        nn.Conv2d(1, 1, (1, 3), stride=(1, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1, 1),
    )


def test_exact_coarse_fisher_of_a_convolutional_net_is_the_restricted_fisher() -> None:
    model, x, y = pyramid(), torch.randn(5, 1, 4, 6), torch.randn(5, 1)
    twin = LiteralTwoLevelKFAC(model, coarse_fisher="exact", **settings(lr=0.0))
    observe(twin, [(x, y)])
    Z = restriction(twin.sizes)
    close(twin.coarse_matrix(), Z @ labelled_fisher(model, x, y, "gaussian") @ Z.T)


def summed_maps(twin: LiteralKFAC, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """The layers' ``α`` and ``γ``, shape ``(B, rows, columns)``, a linear layer's ``(B, 1, 1)``."""
    a, outputs, output = twin.forward(x)
    g = twin.output_gradients(outputs, output, y)
    return [
        [m.sum(dim=1).reshape(len(m), *(m.shape[2:] or (1, 1))) for m in maps.values()] for maps in (a, g)
    ]


def test_the_coarse_entries_of_a_pyramid_by_hand() -> None:
    model, x, y = pyramid(), torch.randn(5, 1, 4, 6), torch.randn(5, 1)
    twin = LiteralTwoLevelKFAC(model, **settings(lr=0.0))
    observe(twin, [(x, y)])
    alpha, gamma = summed_maps(twin, x, y)
    F = twin.coarse_matrix()

    def entry(scale: float, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        means = [(left * right).mean() for left, right in pairs]
        return scale * means[0] * means[1]

    # T = 24, 12, 4, 1: the diagonal is KFC's, nearest takes every 2nd row and every 3rd column.
    for i, (name, T) in enumerate({"0": 24, "2": 12, "4": 4, "7": 1}.items()):
        close(F[i, i], entry(T, (alpha[i], alpha[i]), (gamma[i], gamma[i])))
        close(F[i, i], torch.kron(twin.averages["A", name], twin.averages["G", name]).sum())
    (a0, a1, a2, a3), (g0, g1, g2, g3) = alpha, gamma
    close(F[0, 1], entry((24 * 12) ** 0.5, (a0[:, ::2], a1), (g0[:, ::2], g1)))
    close(F[0, 2], entry((24 * 4) ** 0.5, (a0[:, ::2, ::3], a2), (g0[:, ::2, ::3], g2)))
    close(F[1, 2], entry((12 * 4) ** 0.5, (a1[:, :, ::3], a2), (g1[:, :, ::3], g2)))
    close(F[0, 3], entry(24**0.5, (a0, a3), (g0, g3)))  # the one position is repeated
    close(F[2, 3], entry(4**0.5, (a2, a3), (g2, g3)))


@pytest.mark.parametrize("mode", ["nearest", "area"])
def test_on_the_common_grid_the_coarse_fisher_is_a_product_of_two_gram_matrices(mode: str) -> None:
    model, x, y = pyramid(), torch.randn(5, 1, 4, 6), torch.randn(5, 1)
    twin = LiteralTwoLevelKFAC(model, coarse_grid="common", resample=mode, **settings(lr=0.0))
    observe(twin, [(x, y)])

    def common(m: Tensor) -> Tensor:
        """``(B, rows, columns) -> (B · 2 · 2,)``"""
        down, right = max(m.shape[1] // 2, 1), max(m.shape[2] // 2, 1)
        cells = m.unfold(1, down, down).unfold(2, right, right)
        cells = cells[..., 0, 0] if mode == "nearest" else cells.mean(dim=(-2, -1))
        return cells.expand(-1, 2, 2).flatten()

    alpha, gamma = (torch.stack([common(m) for m in maps]) for maps in summed_maps(twin, x, y))
    T = torch.tensor([24.0, 12.0, 4.0, 1.0])
    scale = torch.outer(T, T).sqrt() / alpha.shape[1] ** 2
    close(twin.coarse_matrix(), scale * (alpha @ alpha.T) * (gamma @ gamma.T))


def test_grids() -> None:
    assert pair_grid((8, 3), (4, 6)) == (4, 3)
    assert pair_grid((8, 3), ()) == pair_grid((1, 1), (8, 3)) == pair_grid((8, 3), (1,)) == (8, 3)
    assert pair_grid((8, 3), (24,)) == ()
    assert pair_grid((7,), (5,)) == (5,)
    assert common_grid([(8, 3), (), (4, 6), (1, 1)]) == (4, 3)
    assert common_grid([(8, 3), (24,), ()]) == common_grid([(), (1, 1)]) == ()


def test_resampling_by_hand() -> None:
    x = torch.arange(5.0)[None, None]
    assert resample(x, (3,), "nearest").tolist() == [[[0.0, 1.0, 3.0]]]  # floor(0, 5/3, 10/3)
    assert resample(x, (3,), "area").tolist() == [[[0.5, 2.0, 3.5]]]  # 0-1, 1-3, 3-4
    assert resample(x, (), "nearest").tolist() == [[2.0]]
    assert resample(torch.tensor([[7.0]]), (2, 2), "area").tolist() == [[[[7.0, 7.0], [7.0, 7.0]]]]
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resample(image, (2, 2), "nearest").tolist() == [[[[0.0, 2.0], [8.0, 10.0]]]]
    assert resample(image, (2, 2), "area").tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_a_sequence_and_an_image_meet_in_their_averages() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(1), nn.Unflatten(1, (6, 1)), nn.Linear(1, 1), Sum())
    x, y = torch.randn(5, 1, 2, 3), torch.randn(5, 1)
    twin = LiteralTwoLevelKFAC(model, **settings(lr=0.0))
    observe(twin, [(x, y)])
    a, outputs, output = twin.forward(x)
    g = twin.output_gradients(outputs, output, y)
    (a0, a1), (g0, g1) = ([m.flatten(2).sum(dim=1).mean(dim=1) for m in maps.values()] for maps in (a, g))
    close(twin.coarse_matrix()[0, 1], 6 * (a0 * a1).mean() * (g0 * g1).mean())


def test_indefinite_refreshes_are_counted_where_an_eigenvalue_is_clearly_negative() -> None:
    twin = LiteralTwoLevelKFAC(pyramid(), **settings(lr=0.0))
    observe(twin, [(torch.randn(5, 1, 4, 6), torch.randn(5, 1))])
    for name in ("0", "2", "4"):
        twin.averages["G", name, name] *= 0  # the diagonal far below what is beside it
    before, w = twin.indefinite, torch.linalg.eigvalsh(twin.coarse_matrix())
    assert w[0] < 0
    twin.damping = -1.01 * w[0].item()
    twin.form_preconditioner()
    assert twin.indefinite == before
    twin.damping = -0.99 * w[0].item()
    preconditioner = twin.form_preconditioner()
    assert twin.indefinite == before + 1
    assert torch.linalg.eigvalsh(preconditioner)[0] > 0
    close(matrix_absolute(torch.tensor([[0.0, 4.0], [4.0, 0.0]])), 4.0 * torch.eye(2))


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_grouped_and_reflecting_convolutions_are_left_to_sgd(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 2, **options), nn.Conv2d(2, 2, 1))
    assert list(linear_layers(model)) == ["1"]
