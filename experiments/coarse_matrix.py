"""The coarse Fisher of a network while two-level K-FAC trains it, Kronecker beside exact (study, question 8).

python -m experiments.coarse_matrix problem=resnet20_cifar10_preview optimizer=two_level_variant \\
    optimizer.coarse=observed

Takes the arguments of experiments.train, one seed after another. Leaves ``coarse.csv``, a row per epoch and matrix,
and ``provenance.json`` in ``<runs>/coarse_matrix/<problem>/<optimizer>/<variant>/seed=<s>/``.
"""

import hydra
import torch
from omegaconf import DictConfig

from experiments.command_line import CONFIGS, launch, user_errors
from experiments.measurement import Rows, check_measurement, measure_missing
from experiments.study.microscope import coarse_numbers
from experiments.study.variants import Observed
from experiments.training.trainer import Training

KIND = "coarse_matrix"


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    with user_errors():
        measure_missing(config, KIND, lambda training: {"coarse": measure_training(training)})


def measure_training(training: Training) -> Rows:
    """Rows of one seed's training, after each epoch: ``coarse_numbers`` of both running matrices beside the
    exact one, and how many of its eigenvalues are negative.

    Raises:
        ValueError: the optimizer does not observe the exact coarse Fisher.
    """
    coarse = getattr(training.optimizer, "coarse", None)
    if not isinstance(coarse, Observed):
        raise ValueError("only with optimizer=two_level_variant optimizer.coarse=observed")
    rows: Rows = []
    for epoch in range(1, training.settings.epochs + 1):
        (latest,) = training.train_epoch()
        exact = coarse.exact_matrix()[0]
        for name, matrix in (("kronecker", coarse.matrix()[0]), ("exact", exact)):
            negative = int((torch.linalg.eigvalsh(matrix) < 0).sum())
            row = {"seed": latest["seed"], "epoch": epoch, "train_loss": latest["train_loss"], "matrix": name}
            rows.append(row | coarse_numbers(matrix, exact) | {"negative_eigenvalues": negative})
    return rows


if __name__ == "__main__":
    launch(main, check_measurement)
