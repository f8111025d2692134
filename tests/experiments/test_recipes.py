"""One file per experiment: which sections are whose, and what a new optimizer or a new problem costs."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from experiments import recipes, schema
from experiments.figures.style import OPTIMIZERS as STYLES
from experiments.paper import OPTIMIZERS
from experiments.schema import FirstOrderConfig, KFACConfig, TwoLevelVariantConfig, lineage, register
from experiments.train import CONFIGS


@dataclass
class Lion(FirstOrderConfig):
    _target_: str = "somewhere.Lion"
    name: str = "lion"


@dataclass
class Shampoo(KFACConfig):
    _target_: str = "somewhere.Shampoo"
    name: str = "shampoo"


@pytest.fixture
def new_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the configurations that ``register`` reads, with two optimizers more; both are forgotten again."""
    monkeypatch.setattr(schema, "OPTIMIZERS", (*schema.OPTIMIZERS, Lion, Shampoo))
    stored = ConfigStore.instance().repo
    for group in ("arm", "optimizer", "problem", "recipe", "sweep"):
        monkeypatch.setitem(stored, group, deepcopy(stored[group]))
    monkeypatch.setattr(recipes, "CONFIGS", copytree(CONFIGS, tmp_path / "configs"))
    return tmp_path / "configs"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("train", list(overrides))


def test_a_section_is_for_what_extends_its_optimizer() -> None:
    assert lineage(Lion) == ["lion"]
    assert lineage(TwoLevelVariantConfig) == ["kfac", "two_level_variant"]


@pytest.mark.usefixtures("new_options")
def test_an_optimizer_without_values_of_its_own_needs_no_recipe() -> None:
    register()
    config = composed("problem=resnet110_cifar10", "optimizer=lion")
    assert config.optimizer == {"_target_": "somewhere.Lion", "_partial_": True, "name": "lion"} | {
        "lr": 1e-2,
        "momentum": 0.9,
        "weight_decay": 1e-3,
    }
    assert config.training.batch_size == 64
    shampoo = composed("problem=resnet110_cifar10_reduced", "optimizer=shampoo")
    assert (shampoo.optimizer.damping, shampoo.optimizer.inverse_interval) == (1e-3, 30)
    assert composed("optimizer=lion", "recipe=deep_linear_mlp/paper").optimizer.lr == 1e-3


def test_a_new_problem_is_one_file_beside_its_class(new_options: Path) -> None:
    text = """
problem: {_target_: somewhere.Autoencoder, name: autoencoder, width: 30}
recipe:
  all:
    optimizer: {lr: 0.1, momentum: 0.9, weight_decay: 0}
    training: {epochs: 3, batch_size: 8}
  shampoo:
    optimizer: {damping: 7}
"""
    (new_options / "experiment" / "autoencoder.yaml").write_text(text)
    register()
    config = composed("problem=autoencoder", "optimizer=shampoo", "problem.width=40", "optimizer.lr=1")
    assert (config.problem.width, config.optimizer.lr, config.optimizer.damping) == (40, 1, 7)
    assert (config.training.epochs, config.seeds) == (3, [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "experiment/own.yaml",
            "{problem: {}, recipes: {}, recipe: {}}",
            "unknown 'recipes'; there is: base",
        ),
        (
            "experiment/own.yaml",
            "{problem: {}, recipe: {kfca: {}}}",
            "unknown 'kfca'; there is: all, sgd, adam",
        ),
        ("grid/own.yaml", "{every: {}}", "configs/grid/own.yaml: unknown 'every'"),
    ],
)
def test_a_section_that_nothing_reads_is_refused(
    new_options: Path, file: str, text: str, message: str
) -> None:
    (new_options / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        register()


def test_the_paper_s_optimizers_have_a_look_of_their_own() -> None:
    assert set(OPTIMIZERS) <= set(STYLES)
