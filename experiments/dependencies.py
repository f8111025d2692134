"""How layers depend on each other while a network trains: blocks beside the whole natural gradient (rules, 7).

python -m experiments.dependencies problem=vit_cifar10 optimizer=adam problem.attention=false

Takes the arguments of experiments.train, one seed after another. Leaves ``directions.csv``, a row per epoch and λ, and
``provenance.json`` in ``<runs>/dependencies/<problem>/<optimizer>/<variant>/seed=<s>/``.
"""

from copy import deepcopy

import hydra
from omegaconf import DictConfig

from experiments.command_line import CONFIGS, launch, user_errors
from experiments.measurement import Rows, check_measurement, measure_missing
from experiments.study.dependencies import dependencies
from experiments.training.trainer import Training

KIND = "dependencies"
DAMPINGS = (1e-4, 1e-2)
IMAGES = 64


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    own = {"dampings": list(DAMPINGS), "images": IMAGES}
    with user_errors():
        measure_missing(config, KIND, lambda training: {"directions": measure_training(training)}, **own)


def measure_training(training: Training) -> Rows:
    """Before the first and after the last epoch, always on the same test images, in float64."""
    problem, rows = training.problem, []
    images, targets = (x[:IMAGES] for x in next(iter(problem.test_batches())))
    for epoch in (0, training.settings.epochs):
        for _ in range(epoch):
            training.train_epoch()
        model = deepcopy(problem.model).double().eval()
        for row in dependencies(model, images.double(), targets, DAMPINGS):
            rows.append({"seed": problem.seeds[0], "epoch": epoch} | row)
    return rows


if __name__ == "__main__":
    launch(main, check_measurement)
