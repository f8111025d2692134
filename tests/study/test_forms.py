"""Forms and bases of the coarse correction against dense matrices, in float64."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.study.forms import SPACES, Formed
from experiments.study.variants import two_level_variant
from kfac2.nn import ReplicatedLinear
from tests.reference.precision import float64

SHAPES = [(3, 2), (3, 3), (3, 3), (1, 3)]
STACKS = [[0], [1, 2], [3]]
REPLICAS, SAMPLES, DAMPING = 2, 5, 0.1
SIZES = [d_out * d_in for d_out, d_in in SHAPES]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


class Case:
    """A batch, gradients and a one-level inverse, of three stacks of layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.inputs = [torch.randn(REPLICAS, d_in, SAMPLES) for _, d_in in SHAPES]
        self.outputs = [torch.randn(REPLICAS, d_out, SAMPLES) for d_out, _ in SHAPES]
        self.gradients = [torch.randn(REPLICAS, *shape) for shape in SHAPES]
        roots = [torch.randn(REPLICAS, size, size) for size in SIZES]
        self.P = [root @ root.mT + torch.eye(root.shape[-1]) for root in roots]

    def stacked(self, layers: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack([layers[i] for i in stack]) for stack in STACKS]

    def one_level(self, x: Sequence[Tensor]) -> list[Tensor]:
        layers = [each for stack in x for each in stack]
        return self.stacked(
            [
                (P @ each.reshape(REPLICAS, -1, 1)).view_as(each)
                for P, each in zip(self.P, layers, strict=True)
            ]
        )

    def corrections(self, space: Formed) -> Tensor:
        """``(R, n)``."""
        space.bind(SHAPES, REPLICAS, torch.device("cpu"))
        for i, (a, g) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            space.look_at(i, a, g)
        space.accumulate(
            {i: (a.sum(1), g.sum(1)) for i, (a, g) in enumerate(zip(self.inputs, self.outputs, strict=True))}
        )
        space.fold(0.0)
        space.refresh(DAMPING)
        gradients = self.stacked(self.gradients)
        blocks = [(torch.tensor(stack), g) for stack, g in zip(STACKS, gradients, strict=True)]
        found = space.corrections(blocks, self.one_level(gradients), self.one_level)
        return torch.cat([x.flatten(2) for stack in found for x in stack[:, None]], dim=-1)[0]


def dense(
    case: Case, replica: int, form: str, basis: str, damping: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The correction, ``F_λ``, ``R₀`` and the whole direction, from their definitions."""
    rows = [
        torch.cat(
            [
                torch.outer(g[replica, :, b], a[replica, :, b]).flatten()
                for a, g in zip(case.inputs, case.outputs, strict=True)
            ]
        )
        for b in range(SAMPLES)
    ]
    J = torch.stack(rows)
    F = J.T @ J / SAMPLES + DAMPING * torch.eye(sum(SIZES))
    P = torch.block_diag(*(each[replica] for each in case.P))
    g = torch.cat([each[replica].flatten() for each in case.gradients])
    residual = (P @ (g - F @ P @ g)).split(SIZES)
    patterns = {
        "ones": [[torch.ones(size)] for size in SIZES],
        "smallest": [[eigenvector(case, replica, i, 0)] for i in range(len(SIZES))],
        "largest": [[eigenvector(case, replica, i, -1)] for i in range(len(SIZES))],
        "residual": [[r] for r in residual],
        "krylov": [[r, each[replica] @ r] for r, each in zip(residual, case.P, strict=True)],
    }[basis]
    R0 = []
    for i, own in enumerate(patterns):
        for r in own:
            padded = [torch.zeros(size) for size in SIZES]
            padded[i] = r * SIZES[i] ** 0.5 / r.norm()
            R0.append(torch.cat(padded))
    R = torch.stack(R0)
    M = R @ (F - DAMPING * torch.eye(len(F))) @ R.T + DAMPING * (
        torch.eye(len(R)) if damping == "identity" else R @ R.T
    )
    right = g if form == "additive" else g - F @ P @ g
    correction = R.T @ torch.linalg.solve(M, R @ right)
    return correction, F, R, P @ g + correction


def eigenvector(case: Case, replica: int, layer: int, place: int) -> Tensor:
    u, v = (
        torch.linalg.eigh(x[replica] @ x[replica].T)[1][:, place]
        for x in (case.outputs[layer], case.inputs[layer])
    )
    return torch.outer(u, v).flatten()


@pytest.mark.parametrize("name", SPACES)
def test_a_correction_is_its_dense_definition(name: str) -> None:
    case, (form, basis, damping) = Case(), name.split("_")
    space = SPACES[name]()
    assert isinstance(space, Formed)
    found = case.corrections(space)
    for replica in range(REPLICAS):
        correction, F, R, direction = dense(case, replica, form, basis, damping)
        torch.testing.assert_close(found[replica], correction)
        left = R @ (torch.cat([x[replica].flatten() for x in case.gradients]) - F @ direction)
        assert (left.norm() < 1e-8) == (form == "galerkin" and damping == "consistent")


def test_the_paper_s_is_the_exact_coarse_fisher_of_one_batch() -> None:
    steps = []
    for coarse in ("additive_ones_identity", "exact"):
        torch.manual_seed(0)
        draws = [torch.Generator().manual_seed(r) for r in range(REPLICAS)]
        layers = [ReplicatedLinear(REPLICAS, *sizes, generators=draws) for sizes in ((4, 3), (3, 1))]
        model = torch.nn.Sequential(*layers)
        options: dict[str, Any] = {"likelihood": "bernoulli", "kl_clip": None, "generator": draws}
        optimizer = two_level_variant(model, 0.1, coarse=coarse, **options)
        output = model(torch.randn(REPLICAS, 4, 8)).squeeze(1)
        optimizer.update_curvature(output)
        output.square().mean(1).sum().backward()
        optimizer.step()
        steps.append([p.detach().clone() for p in model.parameters()])
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(*steps)


def test_other_layers_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = two_level_variant(model, coarse="galerkin_ones_consistent")
    with pytest.raises(ValueError, match="for ReplicatedLinear layers without biases"):
        optimizer.update_curvature(model(torch.randn(4, 3)))
