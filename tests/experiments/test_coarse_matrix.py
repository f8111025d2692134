"""The coarse Fisher of a small ResNet in training."""

from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments.coarse_matrix import measure_training
from experiments.train import CONFIGS, build_training
from tests.problems.cifar_files import write_parquet


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [
        "problem=resnet20_cifar10_preview",
        f"problem.data.path={write_parquet(tmp_path / 'images', 'JPEG')}",
        "problem.depth=8",
        "problem.train_samples=24",
        "problem.test_samples=10",
        "training.epochs=2",
        "training.batch_size=8",
        "training.milestones=[]",
        "optimizer=two_level_variant",
    ]


def test_both_matrices_after_each_epoch(settings: list[str]) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*settings, "optimizer.coarse=observed"])
    frame = pd.DataFrame(measure_training(build_training(config, [3])))
    assert list(frame["epoch"]) == [1, 1, 2, 2]
    assert set(frame["seed"]) == {3}
    exact, kronecker = frame.query("matrix == 'exact'"), frame.query("matrix == 'kronecker'")
    assert all(exact["distance"] == 0)
    assert all(kronecker["distance"] > 0)
    assert all(frame["normalised_off_diagonal"].between(0, 1))


def test_another_optimizer_is_refused(settings: list[str]) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", settings)
    with pytest.raises(ValueError, match=r"optimizer\.coarse=observed"):
        measure_training(build_training(config, [0]))
