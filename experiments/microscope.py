"""Measure K-FAC's directions against the exact natural gradient while an optimizer trains (study, question 7).

python -m experiments.microscope optimizer=two_level_kfac seeds=[0,1,2]

Takes the arguments of experiments.train, one seed after another. Leaves ``directions.csv``, ``coarse.csv``,
``spectrum.csv`` and ``provenance.json`` in ``<runs>/microscope/<problem>/<optimizer>/<variant>/seed=<s>/``.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.command_line import CONFIGS, launch, user_errors
from experiments.measurement import Rows, check_measurement, measure_missing
from experiments.study.fisher import DampedFisher, frozen_statistics, logit_jacobian
from experiments.study.microscope import (
    Layout,
    coarse_numbers,
    direction_errors,
    pcg_iterations,
    preconditioners,
)
from experiments.training.trainer import Training
from kfac2 import CoarseSpace, TwoLevelKFAC
from kfac2.optim.preconditioner import Preconditioner

KIND = "microscope"
EPOCHS = (0, 1, 5, 20)
DRAWS = 20  # of labels, averaged in the factors, so that their noise is not what is measured
UNSYMMETRIC = ("galerkin",)  # no preconditioner for conjugate gradients
OWN = {"epochs": list(EPOCHS), "draws": DRAWS}  # of a measurement's identity
TABLES = ("directions", "coarse", "spectrum")


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    with user_errors():
        measure_missing(
            config,
            KIND,
            lambda training: measure_training(training, training.problem.seeds[0], config.optimizer.damping),
            **OWN,
        )


def measure_training(training: Training, seed: int, damping: float) -> dict[str, Rows]:
    """The tables of one seed's training: its parameters at ``EPOCHS``, always on the same batch."""
    problem = training.problem
    inputs = problem.train_inputs[:, : training.settings.batch_size].mT.double()  # pyright: ignore
    targets = problem.train_targets[:, : training.settings.batch_size].double()  # pyright: ignore
    tables: dict[str, Rows] = {name: [] for name in TABLES}
    for epoch in range(max(EPOCHS) + 1):
        if epoch > 0:
            training.train_epoch()
        if epoch in EPOCHS:
            model = deepcopy(problem.model).double().train()
            for name, row in measure(model, inputs, targets, damping):
                tables[name].append({"seed": seed, "epoch": epoch} | row)
    return tables


def measure(
    model: nn.Module, inputs: Tensor, targets: Tensor, damping: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the tables, each with its table's name, at the model's parameters."""
    kronecker = observed(model, inputs, damping, "kronecker")
    exact = observed(model, inputs, damping, "exact")
    loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), targets)
    weights = [dict(model.named_modules())[layer.name].weight for layer in kronecker.layers]
    g = torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(loss, weights)])  # pyright: ignore
    matrices = {"kronecker": coarse_matrix(kronecker), "exact": coarse_matrix(exact)}
    Z = Layout(kronecker).ones()
    for statistics in ("batch", "frozen"):
        fisher = exact_fisher(model, inputs, weights, damping, frozen=statistics == "frozen")
        for name, operator in preconditioners(kronecker, fisher).items():
            row = {"statistics": statistics, "direction": name}
            row |= direction_errors(operator(g), g, fisher)
            if name not in UNSYMMETRIC:
                row["pcg_iterations"] = pcg_iterations(operator, g, fisher)
            yield "directions", row
        true = fisher.coarse(Z)
        for name, matrix in {**matrices, "true": true}.items():
            yield "coarse", {"statistics": statistics, "matrix": name} | coarse_numbers(matrix, true)
            for place, value in enumerate(torch.linalg.eigvalsh(matrix).flip(0).tolist()):
                yield (
                    "spectrum",
                    {"statistics": statistics, "matrix": name, "place": place, "eigenvalue": value},
                )


def observed(model: nn.Module, inputs: Tensor, damping: float, fisher: str) -> Preconditioner:
    """The preconditioner of two-level K-FAC that has seen this batch alone, ``DRAWS`` times."""
    own = deepcopy(model)
    optimizer = TwoLevelKFAC(
        own,
        likelihood="bernoulli",
        damping=damping,
        coarse=CoarseSpace(fisher),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(DRAWS):
        optimizer.update_curvature(own(inputs))
    optimizer.preconditioner.refresh_factors()
    optimizer.preconditioner.refresh_inverses(damping)
    return optimizer.preconditioner


def coarse_matrix(preconditioner: Preconditioner) -> Tensor:
    assert preconditioner.coarse is not None
    return preconditioner.coarse.matrix()[0]


def exact_fisher(
    model: nn.Module, inputs: Tensor, weights: list[Any], damping: float, frozen: bool
) -> DampedFisher:
    with frozen_statistics(model, inputs) if frozen else nullcontext():
        logits, jacobian = logit_jacobian(model, inputs, weights)
    return DampedFisher(jacobian, logits, damping)


if __name__ == "__main__":
    launch(main, check_measurement)
