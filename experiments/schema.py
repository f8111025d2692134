"""Names and types of every setting, so that Hydra refuses a wrong one before any training."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class DeepLinearMLPConfig:
    _target_: str = "kfac2.problems.DeepLinearMLP"
    name: str = "deep_linear_mlp"
    depth: int = MISSING
    width: int = MISSING
    batch_norm: bool = MISSING
    activation: str = MISSING
    train_samples: int = MISSING
    test_samples: int = MISSING


@dataclass
class FirstOrderConfig:
    _target_: str = MISSING
    _partial_: bool = True
    name: str = MISSING
    lr: float = MISSING
    momentum: float = MISSING
    weight_decay: float = MISSING


@dataclass
class SGDConfig(FirstOrderConfig):
    _target_: str = "kfac2.optim.first_order.SGD"
    name: str = "sgd"


@dataclass
class AdamConfig(FirstOrderConfig):
    _target_: str = "kfac2.optim.first_order.Adam"
    name: str = "adam"


@dataclass
class KFACConfig(FirstOrderConfig):
    _target_: str = "kfac2.KFAC"
    name: str = "kfac"
    damping: float = MISSING
    kl_clip: float | None = MISSING
    inverse: str = MISSING
    factor_interval: int = MISSING
    inverse_interval: int = MISSING
    factor_decay: float = 0.95


@dataclass
class TwoLevelKFACConfig(KFACConfig):
    _target_: str = "kfac2.TwoLevelKFAC"
    name: str = "two_level_kfac"
    coarse_fisher: str = "kronecker"
    coarse_grid: str = "pairwise"
    resample: str = "nearest"
    coarse_weight: float = 1.0


@dataclass
class TrainingConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    milestones: list[float] = field(default_factory=list)
    lr_decay: float = 0.1


@dataclass
class TrainConfig:
    problem: Any = MISSING
    optimizer: Any = MISSING
    tracking: Any = MISSING
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seeds: list[int] = MISSING
    device: str = MISSING
    threads: int = MISSING
    runs: str = MISSING
    rerun: bool = MISSING


def register() -> None:
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="schema/problem", name="deep_linear_mlp", node=DeepLinearMLPConfig)
    for config in (SGDConfig, AdamConfig, KFACConfig, TwoLevelKFACConfig):
        store.store(group="schema/optimizer", name=config.name, node=config)
