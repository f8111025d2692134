"""The literal twins against textbook formulas and explicit Fisher matrices."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from tests.reference.coarse import LiteralTwoLevelKFAC
from tests.reference.fisher import (
    gaussian_fisher,
    labelled_fisher,
    negative_log_likelihood,
    per_sample_gradients,
    restriction,
    unvec,
    vec,
)
from tests.reference.kfac import LiteralKFAC, damped_block_inverse
from tests.reference.precision import float64

# Every comparison is between float64 numbers of order one to a hundred, reached by sums of at most
# some thousand terms and inverses of condition number below 1e5.
close = partial(assert_close, rtol=1e-9, atol=1e-10)


def settings(**changes: Any) -> dict[str, Any]:
    defaults = {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "damping": 1e-2,
        "kl_clip": None,
        "likelihood": "gaussian",
        "inverse": "eigen",
        "factor_interval": 1,
        "inverse_interval": 1,
    }
    return defaults | changes


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def random_factor(size: int) -> Tensor:
    root = torch.randn(size, size + 1)
    return root @ root.T / size


def network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 3, bias=bias),
        nn.Tanh(),
        nn.Linear(3, 5, bias=bias),
        nn.Linear(5, 2, bias=bias),
    )


def test_vec_turns_kronecker_products_into_matrix_products() -> None:
    V, A, G = torch.randn(3, 5), random_factor(5), random_factor(3)
    close(unvec(vec(V), 3, 5), V)
    close(vec(torch.tensor([[1.0, 3.0], [2.0, 4.0]])), torch.arange(1.0, 5.0))
    close(torch.kron(A, G) @ vec(V), vec(G @ V @ A))


def test_eigen_inverse_is_the_papers_exact_inverse() -> None:
    V, A, G, damping = torch.randn(3, 5), random_factor(5), random_factor(3), 1e-2
    eigenvalues_A, Q_A = torch.linalg.eigh(A)
    eigenvalues_G, Q_G = torch.linalg.eigh(G)
    rotated = Q_G.T @ V @ Q_A / (torch.outer(eigenvalues_G, eigenvalues_A) + damping)
    expected = Q_G @ rotated @ Q_A.T
    close(unvec(damped_block_inverse(A, G, damping, "eigen") @ vec(V), 3, 5), expected)


def test_tikhonov_inverse_is_equation_9() -> None:
    V, A, G, damping = torch.randn(3, 5), random_factor(5), random_factor(3), 1e-2
    pi = ((A.trace() / 5) / (G.trace() / 3)).sqrt()
    damped_A = A + pi * damping**0.5 * torch.eye(5)
    damped_G = G + damping**0.5 / pi * torch.eye(3)
    expected = torch.linalg.solve(damped_G, V) @ torch.linalg.inv(damped_A)
    close(unvec(damped_block_inverse(A, G, damping, "tikhonov") @ vec(V), 3, 5), expected)


@pytest.mark.parametrize(
    ("likelihood", "shape", "builtin"),
    [
        ("gaussian", (6, 2), nn.MSELoss(reduction="sum")),
        ("bernoulli", (6, 2), nn.BCEWithLogitsLoss(reduction="sum")),
        ("bernoulli", (6,), nn.BCEWithLogitsLoss(reduction="sum")),
        ("categorical", (6, 3), nn.CrossEntropyLoss(reduction="sum")),
    ],
)
def test_likelihoods_are_torchs_summed_losses(
    likelihood: str, shape: tuple[int, ...], builtin: nn.Module
) -> None:
    output = torch.randn(shape)
    labels = {
        "gaussian": torch.randn(shape),
        "bernoulli": torch.randint(2, shape).double(),
        "categorical": torch.randint(3, shape[:1]),
    }[likelihood]
    scale = 0.5 if likelihood == "gaussian" else 1.0
    losses = negative_log_likelihood(output, labels, likelihood)
    assert losses.shape == (6,)
    close(losses.sum(), scale * builtin(output, labels))


@pytest.mark.parametrize("bias", [False, True])
def test_captured_inputs_and_output_gradients_give_the_per_sample_gradients(bias: bool) -> None:
    model, x, labels = network(bias), torch.randn(6, 4), torch.randn(6, 2)
    twin = LiteralKFAC(model, **settings())
    a, outputs, output = twin.forward(x)
    g = twin.output_gradients(outputs, output, labels)
    rows = [torch.cat([vec(torch.outer(g[name][n], a[name][n])) for name in a]) for n in range(len(x))]
    close(torch.stack(rows), per_sample_gradients(model, x, labels, "gaussian"))


def observe(twin: LiteralKFAC, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Iterations without a training gradient, to see the running averages alone."""
    for x, labels in batches:
        twin.step(x, labels, lambda output: 0.0 * output.sum())


@pytest.mark.parametrize("bias", [False, True])
def test_algorithm_1_is_a_hadamard_product_of_two_averaged_gram_matrices(bias: bool) -> None:
    model = network(bias)
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(4)]
    twin = LiteralTwoLevelKFAC(model, **settings(lr=0.0))
    observe(twin, batches)
    alphas, gammas = [], []
    for x, labels in batches:
        a, outputs, output = twin.forward(x)
        g = twin.output_gradients(outputs, output, labels)
        alphas.append(torch.stack([value.sum(dim=1) for value in a.values()]))
        gammas.append(torch.stack([value.sum(dim=1) for value in g.values()]))
    alpha, gamma = torch.cat(alphas, dim=1), torch.cat(gammas, dim=1)  # decay 1 - 1/t: plain means
    grams = (alpha @ alpha.T / alpha.shape[1]) * (gamma @ gamma.T / gamma.shape[1])
    close(twin.coarse_matrix(), grams)


def test_running_averages_forget_with_the_given_decay() -> None:
    twin = LiteralKFAC(nn.Sequential(nn.Linear(1, 1, bias=False)), **settings(lr=0.0, factor_decay=0.6))
    values = [1.0, 2.0, 3.0, 4.0]
    observe(twin, [(torch.tensor([[v]]), torch.zeros(1, 1)) for v in values])
    expected = 1.0
    for value, decay in zip(values[1:], [1 / 2, 0.6, 0.6], strict=True):
        expected = decay * expected + (1 - decay) * value**2
    close(twin.averages["A", "0"], torch.tensor([[expected]]))
    twin.average({"new": torch.tensor(5.0)})  # first seen at t = 4
    close(twin.averages["new"], torch.tensor(5.0))


def test_exact_coarse_fisher_of_a_deep_linear_net_is_the_restricted_fisher() -> None:
    model = nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False), nn.Linear(5, 1, bias=False)
    )
    x, y = torch.randn(7, 4), torch.randn(7, 1)
    twin = LiteralTwoLevelKFAC(model, coarse_fisher="exact", **settings(lr=0.0))
    observe(twin, [(x, y)])

    # f = W_3 W_2 W_1 x, so that d(f - y)²/2 / dW_i = (f - y) (W_3 .. W_{i+1})ᵀ (W_{i-1} .. W_1 x)ᵀ.
    W_1, W_2, W_3 = (parameter.detach() for parameter in model.parameters())
    rows = []
    for x_n, y_n in zip(x, y, strict=True):
        residual = W_3 @ W_2 @ W_1 @ x_n - y_n
        rows.append(
            torch.cat(
                [
                    vec(residual * torch.outer((W_3 @ W_2)[0], x_n)),
                    vec(residual * torch.outer(W_3[0], W_1 @ x_n)),
                    vec(residual * (W_2 @ W_1 @ x_n)[None]),
                ]
            )
        )
    closed_form = torch.stack(rows)
    close(per_sample_gradients(model, x, y, "gaussian"), closed_form)

    F = labelled_fisher(model, x, y, "gaussian")
    close(F, closed_form.T @ closed_form / len(x))
    Z = restriction([12, 15, 5])
    close(twin.coarse_matrix(), Z @ F @ Z.T)


@pytest.mark.parametrize("coarse_fisher", ["kronecker", "exact"])
def test_one_datum_makes_every_kronecker_approximation_exact(coarse_fisher: str) -> None:
    model, x, y, damping = network(), torch.randn(1, 4), torch.randn(1, 2), 1e-2
    twin = LiteralTwoLevelKFAC(model, coarse_fisher=coarse_fisher, coarse_weight=0.5, **settings(lr=0.0))
    observe(twin, [(x, y)])
    F = labelled_fisher(model, x, y, "gaussian")
    sizes = twin.sizes
    Z = restriction(sizes)
    mask = torch.block_diag(*[torch.ones(size, size) for size in sizes])
    blocks = torch.linalg.inv(F * mask + damping * torch.eye(len(F)))
    coarse = torch.linalg.inv(Z @ F @ Z.T + damping * torch.eye(len(Z)))
    close(twin.preconditioner, blocks + 0.5 * Z.T @ coarse @ Z)


def test_gaussian_fisher_is_the_labelled_one_with_labels_integrated_out() -> None:
    model, x = network(), torch.randn(3, 4)
    output = model(x).detach()
    # The errors ±√2 e_k have mean 0 and covariance I, as the unit-variance Gaussian of size 2.
    errors = 2**0.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    labelled = [labelled_fisher(model, x, output + error, "gaussian") for error in errors]
    close(torch.stack(labelled).mean(dim=0), gaussian_fisher(model, x))


def test_layers_left_out_follow_torchs_sgd() -> None:
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    first_layer_only = {name: 0.05 * name.startswith("0.") for name, _ in model.named_parameters()}
    twin = LiteralKFAC(model, **settings(lr=first_layer_only, exclude=["0"]))
    sgd = torch.optim.SGD(other[0].parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(4):
        x, y = torch.randn(6, 4), torch.randn(6, 2)
        twin.step(x, y, lambda output, y=y: mse_loss(output, y))
        sgd.zero_grad()
        mse_loss(other(x), y).backward()
        sgd.step()
        close(dict(model.named_parameters()), dict(other.named_parameters()))


def test_clipping_caps_the_step_at_kappa_and_counts_each_part_with_its_learning_rate() -> None:
    model, kappa = nn.Sequential(nn.Linear(3, 2)), 1e-4
    lr = {"0.weight": 0.05, "0.bias": 0.2}
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    gradients = torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))
    twin = LiteralKFAC(model, **settings(lr=lr, weight_decay=0.0, kl_clip=kappa))
    twin.step(x, y, lambda output: mse_loss(output, y))
    assert twin.clips[0] < 1
    # The first step moves θ by η ν V; clipped, Σ η² ν² V · ∇ = κ.
    clipped = torch.zeros(())
    for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True):
        clipped += lr[name] * twin.clips[0] * ((before[name] - value.detach()) * gradient).sum()
    close(clipped, torch.tensor(kappa))
