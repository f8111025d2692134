"""The microscope's record of a tiny training: complete, resumable seed by seed, and consistent in itself."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments import microscope
from experiments.measurement import measured_directory
from experiments.train import CONFIGS, build_training

TINY = ["problem.depth=3", "problem.width=4", "problem.train_samples=64", "problem.test_samples=4"]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, pd.DataFrame]:
    monkeypatch.setattr(microscope, "EPOCHS", (0, 2))
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*TINY, "optimizer=kfac", "training.batch_size=32"])
        rows = microscope.measure_training(build_training(config, [3]), 3, 0.1)
    return {name: pd.DataFrame(own) for name, own in rows.items()}


def test_the_tables(tables: dict[str, pd.DataFrame]) -> None:
    directions = tables["directions"]
    assert set(directions["epoch"]) == {0, 2}
    assert set(directions["statistics"]) == {"batch", "frozen"}
    assert len(directions) == 2 * 2 * 8
    assert all(directions["scaled_error"] <= directions["error"] + 1e-12)
    assert all(directions["scaled_error"] <= 1 + 1e-12)
    by_name = directions.set_index(["epoch", "statistics", "direction"])["error"].unstack()
    assert all(by_name["galerkin"] <= by_name["one_level"] + 1e-12)  # the best of a space that holds it
    assert all(by_name["galerkin"] <= by_name["two_level"] + 1e-12)
    unsymmetric = directions["direction"] == "galerkin"
    assert all(directions.loc[unsymmetric, "pcg_iterations"].isna())
    assert all(directions.loc[~unsymmetric, "pcg_iterations"].between(1, 1000))
    true = tables["coarse"].query("matrix == 'true'")
    assert all(true["distance"] == 0)
    spectrum = tables["spectrum"].query("matrix == 'true'")
    assert all(spectrum.groupby(["epoch", "statistics"]).size().eq(4))  # three hidden layers and the logit


def test_the_exact_coarse_fisher_is_the_true_one_of_frozen_statistics(
    tables: dict[str, pd.DataFrame],
) -> None:
    distance = tables["coarse"].set_index(["epoch", "statistics", "matrix"])["distance"].unstack()
    frozen = distance.xs("frozen", level="statistics")
    assert all(frozen["exact"] < 0.5)  # up to the noise of twenty label draws
    assert all(frozen["exact"] < distance.xs("batch", level="statistics")["exact"])


def test_a_measured_seed_is_not_measured_again(tmp_path: Path) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*TINY, "optimizer=kfac", f"runs={tmp_path}"])
        directory = measured_directory(config, "microscope", 3, **microscope.OWN)
    assert directory.path.relative_to(tmp_path).parts[:3] == ("microscope", "deep_linear_mlp", "kfac")
    with directory.locked():
        directory.write_provenance(complete=False, device="cpu")
    assert not directory.is_complete()
    directory.finish("cpu")
    assert directory.is_complete()
    assert json.loads(directory.provenance.read_text())["config"]["draws"] == microscope.DRAWS
