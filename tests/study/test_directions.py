"""The exact Fisher against brute force, and the directions against dense matrices, in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from experiments.problems import DeepLinearMLP
from experiments.study.fisher import DampedFisher, frozen_statistics, logit_jacobian
from experiments.study.microscope import (
    Layout,
    coarse_numbers,
    direction_errors,
    pcg_iterations,
    preconditioners,
)
from kfac2 import TwoLevelKFAC
from tests.reference.fisher import labelled_fisher
from tests.reference.precision import float64

DAMPING = 1e-2
SAMPLES = 12


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


def network(batch_norm: bool = True, depth: int = 3) -> tuple[nn.Module, Tensor]:
    problem = DeepLinearMLP(
        [0], depth=depth, width=4, batch_norm=batch_norm, train_samples=SAMPLES, test_samples=1
    )
    (inputs, _), *_ = problem.train_batches(SAMPLES)
    return problem.model.double(), inputs.double()


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.dim() == 3]


def brute_force_jacobian(model: nn.Module, inputs: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    names = {id(p): name for name, p in model.named_parameters()}

    def logits(*values: Tensor) -> Tensor:
        state = dict(zip([names[id(p)] for p in parameters], values, strict=True))
        return functional_call(model, state, (inputs,)).reshape(-1)

    parts = torch.autograd.functional.jacobian(logits, tuple(p.detach() for p in parameters))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_jacobian_of_the_batch_s_logits(batch_norm: bool) -> None:
    model, inputs = network(batch_norm)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits, jacobian = logit_jacobian(model, inputs, weights(model))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert_close(jacobian, brute_force_jacobian(model, inputs, weights(model)))
    assert_close(logits, model(inputs).reshape(-1).detach())


def test_batch_norm_s_jacobian_by_differences() -> None:
    """Independent of autograd: the batch's statistics move with the weights."""
    model, inputs = network()
    first = weights(model)[0]
    _, jacobian = logit_jacobian(model, inputs, [first])
    step = 1e-6
    for k in (0, 7):
        shifted = []
        for sign in (1, -1):
            with torch.no_grad():
                first.view(-1)[k] += sign * step
                shifted.append(model(inputs).reshape(-1))
                first.view(-1)[k] -= sign * step
        assert_close(jacobian[:, k], (shifted[0] - shifted[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_frozen_statistics_make_samples_independent() -> None:
    model, inputs = network()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    together, coupled = logit_jacobian(model, inputs, weights(model))
    with frozen_statistics(model, inputs):
        logits, jacobian = logit_jacobian(model, inputs, weights(model))
        for i in (0, 5):
            alone, row = logit_jacobian(model, inputs[..., i : i + 1], weights(model))
            assert_close(row[0], jacobian[i])
            assert_close(alone[0], logits[i])
    assert_close(logits, together)
    assert not torch.allclose(coupled, jacobian, rtol=1e-2)
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_without_batch_norm_it_is_the_mean_over_samples_and_labels() -> None:
    torch.manual_seed(0)
    model, inputs = plain_network(), torch.randn(6, 3)
    p = model(inputs).detach().sigmoid()
    expected = torch.zeros(())
    for x, positive in zip(inputs, p, strict=True):  # the expectation over the model's own labels
        for label, probability in ((1.0, positive), (0.0, 1 - positive)):
            expected = expected + probability * labelled_fisher(
                model, x[None], torch.tensor([label]), "bernoulli"
            )
    logits, jacobian = logit_jacobian(model, inputs, list(model.parameters()))
    fisher = DampedFisher(jacobian, logits, DAMPING)
    ours = fisher.root.T @ fisher.root
    # The twin orders a layer's entries by columns, the bias last: compare what does not depend on it.
    assert_close(
        torch.linalg.eigvalsh(ours), torch.linalg.eigvalsh(expected / len(inputs)), rtol=1e-9, atol=1e-12
    )


@pytest.fixture
def fisher() -> DampedFisher:
    model, inputs = network()
    logits, jacobian = logit_jacobian(model, inputs, weights(model))
    return DampedFisher(jacobian, logits, DAMPING)


def test_the_damped_fisher_is_a_dense_matrix(fisher: DampedFisher) -> None:
    dense = fisher.root.T @ fisher.root + DAMPING * torch.eye(fisher.root.shape[1])
    g = torch.randn(len(dense))
    assert_close(fisher.apply(g), dense @ g)
    assert_close(fisher.solve(g), torch.linalg.solve(dense, g))
    assert fisher.norm(g) == pytest.approx((g @ dense @ g).sqrt().item())
    assert_close(fisher.block(slice(3, 9)), dense[3:9, 3:9])
    Z = torch.randn(2, len(dense))
    assert_close(fisher.coarse(Z), Z @ (dense - DAMPING * torch.eye(len(dense))) @ Z.T)
    with pytest.raises(ValueError, match="damping must be positive"):
        DampedFisher(fisher.root, torch.zeros(SAMPLES), 0)


class Scene:
    """A network whose optimizer has just refreshed on a batch, its gradient, and everything dense."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        model, inputs = network()
        optimizer = TwoLevelKFAC(model, likelihood="bernoulli", damping=DAMPING)
        output = model(inputs)
        optimizer.update_curvature(output)
        nn.functional.binary_cross_entropy_with_logits(output, torch.ones_like(output)).backward()
        optimizer.preconditioner.refresh_factors()
        optimizer.preconditioner.refresh_inverses(DAMPING)
        own = optimizer.preconditioner
        logits, jacobian = logit_jacobian(model, inputs, [layer.weight for layer in own.layers])
        self.fisher, self.layout = DampedFisher(jacobian, logits, DAMPING), Layout(own)
        self.optimizer, self.operators = optimizer, preconditioners(own, self.fisher)
        grads = [layer.weight.grad for layer in own.layers]
        self.g = torch.cat([grad.reshape(-1) for grad in grads if grad is not None])
        self.F = self.fisher.root.T @ self.fisher.root + DAMPING * torch.eye(len(self.g))
        self.P1 = torch.stack([self.operators["one_level"](e) for e in torch.eye(len(self.g))], dim=1)
        self.Z = self.layout.ones()
        self.Q = self.Z.T @ torch.linalg.solve(self.Z @ self.F @ self.Z.T, self.Z)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_optimizer_s_own_directions(scene: Scene) -> None:
    own = scene.optimizer.preconditioner
    gradients, active = own.gradients()
    assert_close(scene.layout.vector(gradients), scene.g)
    two = own.precondition(gradients, active)
    assert_close(scene.operators["two_level"](scene.g), scene.layout.vector(two))
    one = [s.precondition(g, active) for s, g in zip(own.stacks, gradients, strict=True)]
    assert_close(scene.operators["one_level"](scene.g), scene.layout.vector(one))
    for block, again in zip(gradients, scene.layout.blocks(scene.g), strict=True):
        assert torch.equal(block, again)


def test_the_other_directions_are_their_dense_definitions(scene: Scene) -> None:
    F, P1, Q, Z, g = scene.F, scene.P1, scene.Q, scene.Z, scene.g
    undamped = Z @ (F - scene.fisher.damping * torch.eye(len(g))) @ Z.T
    identity = torch.eye(len(g))
    blocks = torch.block_diag(*[torch.linalg.inv(F[part, part]) for part in scene.layout.parts])
    expected = {
        "none": g,
        "block_diagonal": blocks @ g,
        "true_coarse": (P1 + Z.T @ torch.linalg.inv(undamped + scene.fisher.damping * torch.eye(len(Z))) @ Z)
        @ g,
        "consistent_coarse": (P1 + Q) @ g,
        "galerkin": P1 @ g + Q @ (g - F @ P1 @ g),
        "deflated": (Q + (identity - Q @ F) @ P1 @ (identity - F @ Q)) @ g,
    }
    for name, direction in expected.items():
        assert_close(scene.operators[name](g), direction)


def test_galerkin_is_the_best_of_its_space(scene: Scene) -> None:
    g, fisher = scene.g, scene.fisher
    best = scene.operators["galerkin"](g)
    x = fisher.solve(g)
    root = torch.linalg.cholesky(scene.F).T  # ‖v‖_F = ‖root v‖: a least-squares problem for β
    start = scene.operators["one_level"](g)
    beta = torch.linalg.lstsq(root @ scene.Z.T, (root @ (x - start))[:, None]).solution[:, 0]
    assert_close(best, start + scene.Z.T @ beta)
    error = direction_errors(best, g, fisher)["error"]
    for _ in range(5):
        other = best + 0.1 * scene.Z.T @ torch.randn(len(scene.Z))
        assert direction_errors(other, g, fisher)["error"] > error
    assert error <= direction_errors(start, g, fisher)["error"]
    assert error <= direction_errors(scene.operators["two_level"](g), g, fisher)["error"]


def test_errors_of_a_direction(scene: Scene) -> None:
    g, fisher = scene.g, scene.fisher
    x = fisher.solve(g)
    exact = direction_errors(3 * x, g, fisher)
    assert exact["error"] == pytest.approx(2)
    assert exact["scaled_error"] == pytest.approx(0, abs=1e-7)
    assert exact["cosine"] == pytest.approx(1)
    v = scene.operators["one_level"](g)
    found = direction_errors(v, g, fisher)
    scales = torch.logspace(-4, 1, 4000)
    best = min(fisher.norm(s * v - x) / fisher.norm(x) for s in scales)
    assert found["scaled_error"] == pytest.approx(best, rel=1e-3)
    assert found["scaled_error"] <= found["error"]


def test_conjugate_gradients(scene: Scene) -> None:
    g, fisher = scene.g, scene.fisher
    assert pcg_iterations(fisher.solve, g, fisher) == 1
    rank = torch.linalg.matrix_rank(fisher.root).item()
    plain = pcg_iterations(scene.operators["none"], g, fisher)
    assert 1 < plain <= rank + 1
    assert pcg_iterations(scene.operators["none"], g, fisher, limit=1) == 1
    for name in ("one_level", "two_level", "block_diagonal", "true_coarse", "consistent_coarse", "deflated"):
        assert 1 < pcg_iterations(scene.operators[name], g, fisher) <= len(g)


def test_numbers_of_a_coarse_matrix() -> None:
    true = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    found = coarse_numbers(torch.diag(torch.tensor([4.0, 1.0])), true)
    assert found["distance"] == pytest.approx((8 / 25) ** 0.5)
    assert found["size"] == found["cosine"] == pytest.approx((17 / 25) ** 0.5)
    assert found["off_diagonal"] == 0
    assert found["condition"] == pytest.approx(4)
    assert coarse_numbers(true, true)["off_diagonal"] == pytest.approx(8 / 25)
    assert coarse_numbers(true, true)["normalised_off_diagonal"] == pytest.approx(0.5)
