"""Names, types and ranges of every setting, so that a wrong one is refused before any training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import joblib
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments.recipes import register_recipes
from experiments.study.arms import TRAININGS, Arm
from experiments.training.trainer import TrainingSettings
from kfac2.curvature import CoarseSpace

COARSE = signature(CoarseSpace).parameters
NOT_SETTINGS = ("name",)  # of a problem or an optimizer: it says whose record it is


@dataclass
class DeepLinearMLPConfig:
    """The settings of ``experiments.problems.DeepLinearMLP``; sizes are numbers of layers, units and samples."""

    _target_: str = "experiments.problems.DeepLinearMLP"
    name: str = "deep_linear_mlp"
    depth: int = MISSING
    width: int = MISSING
    batch_norm: bool = MISSING
    layer_norm: bool = False
    activation: str = MISSING
    train_samples: int = MISSING
    test_samples: int = MISSING


@dataclass
class Cifar10Config:
    """Where the images come from, as ``experiments.problems.Cifar10`` says."""

    _target_: str = "experiments.problems.Cifar10"
    path: str | None = None
    root: str = "data"


@dataclass
class CifarResNetConfig:
    """The settings of ``experiments.problems.CifarResNet``; no number of samples is all of the split."""

    _target_: str = "experiments.problems.CifarResNet"
    name: str = MISSING
    depth: int = MISSING
    train_samples: int | None = MISSING
    test_samples: int | None = MISSING
    label: str | None = None
    data: Cifar10Config = field(default_factory=Cifar10Config)


@dataclass
class CifarViTConfig:
    """The settings of ``experiments.problems.CifarViT``; no number of samples is all of the split."""

    _target_: str = "experiments.problems.CifarViT"
    name: str = MISSING
    residual: bool = MISSING
    layer_norm: bool = MISSING
    attention: bool = MISSING
    train_samples: int | None = MISSING
    test_samples: int | None = MISSING
    label: str | None = None
    data: Cifar10Config = field(default_factory=Cifar10Config)


@dataclass
class FirstOrderConfig:
    """What every optimizer has: η, μ and the weight decay."""

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
    """``momentum`` is Adam's beta_1."""

    _target_: str = "kfac2.optim.first_order.Adam"
    name: str = "adam"


@dataclass
class KFACConfig(FirstOrderConfig):
    """The arguments of ``kfac2.KFAC``; intervals are numbers of iterations."""

    _target_: str = "kfac2.KFAC"
    name: str = "kfac"
    damping: float = MISSING
    adaptive_damping: bool = False
    kl_clip: float | None = MISSING
    inverse: str = MISSING
    factor_interval: int = MISSING
    inverse_interval: int = MISSING
    factor_decay: float = 0.95


@dataclass
class FOOFConfig(KFACConfig):
    """The study's: K-FAC with G = I."""

    _target_: str = "experiments.study.one_level.FOOF"
    name: str = "foof"


@dataclass
class EmpiricalKFACConfig(KFACConfig):
    """The study's: the data's labels, for the MLP."""

    _target_: str = "experiments.study.one_level.EmpiricalKFAC"
    name: str = "empirical_kfac"


@dataclass
class TwoLevelKFACConfig(KFACConfig):
    """The arguments of ``kfac2.TwoLevelKFAC``."""

    _target_: str = "kfac2.TwoLevelKFAC"
    name: str = "two_level_kfac"
    coarse_fisher: str = COARSE["fisher"].default
    coarse_grid: str = COARSE["grid"].default
    resample: str = COARSE["resample"].default
    coarse_weight: float = COARSE["weight"].default
    coarse_damping: str = COARSE["damping"].default
    coarse_max_ratio: float | None = COARSE["max_ratio"].default


@dataclass
class TwoLevelVariantConfig(KFACConfig):
    """The study's: ``coarse`` names one of ``experiments.study.variants.VARIANTS``."""

    _target_: str = "experiments.study.variants.two_level_variant"
    name: str = "two_level_variant"
    coarse: str = "full"
    coarse_weight: float = 1.0


@dataclass
class ExactNaturalGradientConfig(FirstOrderConfig):
    """The study's: ``lr`` is a factor on the best step of the quadratic model, ``correction`` names one of
    ``experiments.study.directions.CORRECTIONS``."""

    _target_: str = "experiments.study.exact.ExactNaturalGradient"
    name: str = "exact_natural_gradient"
    damping: float = MISSING
    correction: str = "full"
    norm_lr: float = MISSING


OPTIMIZERS = (
    *(SGDConfig, AdamConfig, KFACConfig, TwoLevelKFACConfig, TwoLevelVariantConfig),
    *(FOOFConfig, EmpiricalKFACConfig, ExactNaturalGradientConfig),
)


@dataclass
class TrainConfig:
    """A whole configuration: ``hours`` end the command in time, and ``runs`` is where records go."""

    problem: Any = MISSING
    optimizer: Any = MISSING
    tracking: Any = MISSING
    training: TrainingSettings = MISSING
    seeds: list[int] = MISSING
    device: str = MISSING
    threads: int = MISSING
    runs: str = MISSING
    rerun: bool = MISSING
    hours: float | None = None
    sweep: Any = None


class Range(NamedTuple):
    """Which values of a setting can be meant, and how a message says so."""

    holds: Callable[[float], bool]
    meaning: str


COUNT = Range(lambda x: x >= 1, "must be positive")
POSITIVE = Range(lambda x: 0 < x < math.inf, "must be positive and finite")
NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "must be finite and not negative")
RANGES = {
    **dict.fromkeys(("optimizer.lr", "optimizer.weight_decay", "optimizer.damping"), NOT_NEGATIVE),
    "optimizer.momentum": Range(lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
    "optimizer.kl_clip": POSITIVE,
    "optimizer.coarse_weight": Range(math.isfinite, "must be finite"),
    **dict.fromkeys(("problem.depth", "problem.width", "problem.train_samples"), COUNT),
    **dict.fromkeys(("problem.test_samples", "threads"), COUNT),
    "hours": POSITIVE,
}


def check_settings(config: DictConfig) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: a value is missing, out of its range, no device, or the seeds are none or repeated.
    """
    if missing := OmegaConf.missing_keys(config):
        raise ValueError(f"without a value: {', '.join(sorted(missing))}")
    for key, expected in RANGES.items():
        value = OmegaConf.select(config, key)
        if value is not None and not expected.holds(value):
            raise ValueError(f"{key} {expected.meaning}, got {value}")
    TrainingSettings(**config.training)
    seeds = list(config.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and not empty, got {seeds}")
    try:
        torch.device(config.device)
    except RuntimeError:
        raise ValueError(f"device={config.device}: no device of torch, such as cpu, cuda or cuda:1") from None


def register() -> None:
    """Tell Hydra of all settings, recipes and arms; once, before it composes anything."""
    OmegaConf.register_new_resolver("chosen", chosen, replace=True)
    OmegaConf.register_new_resolver("fast_bfloat16", fast_bfloat16, replace=True)
    OmegaConf.register_new_resolver("processes", processes, replace=True)
    OmegaConf.register_new_resolver("thousands", "{:,}".format, replace=True)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="schema/problem", name="deep_linear_mlp", node=DeepLinearMLPConfig)
    store.store(group="schema/problem", name="cifar_resnet", node=CifarResNetConfig)
    store.store(group="schema/problem", name="cifar_vit", node=CifarViTConfig)
    store.repo |= {"arm": Shared(), "recipe": Shared()}
    for arm in TRAININGS:
        store.store(group="arm", name=arm.name, node=arm_config(arm), package="_global_")
    for config in OPTIMIZERS:
        store.store(group="optimizer", name=config.name, node=config)
    register_recipes({config.name: lineage(config) for config in OPTIMIZERS})


def lineage(config: type[FirstOrderConfig]) -> list[str]:
    """The names of the optimizers whose settings it extends, and its own, last."""
    return [base.name for base in reversed(config.__mro__) if getattr(base, "name", MISSING) != MISSING]


class Shared(dict):
    """Hydra copies all that is stored for each composition, and again what it composes of it: once is enough."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


def arm_config(arm: Arm) -> DictConfig:
    """An arm of the study as an option of the group ``arm``, which is composed last."""
    choices = [{"override /problem": arm.problem}, {"override /optimizer": arm.optimizer}, "_self_"]
    config = OmegaConf.create({"defaults": choices, "seeds": list(range(arm.seeds))})
    for key, value in arm.settings.items():
        OmegaConf.update(config, key, value)
    return config


def chosen(group: str) -> str | None:
    """The option chosen of a group of configurations; None where there is no command line."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def processes(device: str, threads: int) -> int:
    """How many trainings of ``threads`` threads each this machine carries at once; one on a GPU."""
    return 1 if device.startswith("cuda") else max(1, joblib.cpu_count() // max(1, threads))


def fast_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies in bfloat16; where it only emulates, autocast is ten times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
