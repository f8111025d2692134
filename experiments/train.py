"""Train one optimizer on one problem, and leave a record.

python -m experiments.train problem=deep_linear_mlp optimizer=two_level_kfac
python -m experiments.train -m optimizer=sgd,adam optimizer.lr=1e-2,1e-3
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.identity import identity, run_path
from experiments.overrides import check_overrides
from experiments.problems import DataError
from experiments.records import seed_directory
from experiments.schema import register
from experiments.training.records import RunDirectory
from experiments.training.trainer import Training, TrainingSettings, prefer_deterministic_kernels

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")
NOT_ARGUMENTS = ("name", "one_record_per_seed")
register()


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    own = HydraConfig.get()
    if own.mode is RunMode.MULTIRUN:
        # The launchers let the others go on, and raise the first failure at the end.
        train(config, position=own.job.num, attempt=RunDirectory.failure_recorded)
    else:
        train(config)


def train(
    config: DictConfig,
    position: int = 0,
    attempt: Callable[[RunDirectory], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Train what is missing, one record after another, each in the context ``attempt`` of its directory.

    ``position`` is the progress bar's.

    Raises:
        SystemExit: the problem's data cannot be had.
        ValueError: a setting that is not possible, before anything is trained.
    """
    check_machine(config.device, config.threads)
    torch.set_num_threads(config.threads)
    prefer_deterministic_kernels()
    for directory in run_directories(config):
        if not config.rerun and directory.is_complete():
            label = f" ({directory.label})" if directory.label else ""
            print(f"{directory.path}{label}: complete, not trained again (rerun=true does)")
            continue
        with attempt(directory):
            train_record(config, directory, position)
        print(f"{directory.path}: complete")


def train_record(config: DictConfig, directory: RunDirectory, position: int) -> None:
    try:
        training = build_training(config, directory.config["seeds"])
    except InstantiationException as error:
        if isinstance(error.__cause__, DataError):
            raise SystemExit(str(error.__cause__)) from None
        raise
    tracker = instantiate(config.tracking)
    training.run(directory, tracker, str(directory.path), position, rerun=config.rerun)


def run_directories(config: DictConfig) -> list[RunDirectory]:
    """Where the records go: one for all seeds side by side, or one per seed."""
    seeds, path, own = list(config.seeds), run_path(config), identity(config)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and not empty, got {seeds}")
    if not config.problem.one_record_per_seed:
        return [RunDirectory(path, own)]
    return [RunDirectory(seed_directory(path, seed), own | {"seeds": [seed]}) for seed in seeds]


def build_training(config: DictConfig, seeds: Sequence[int]) -> Training:
    """The configured problem, optimizer and trainer."""
    problem = instantiate(_arguments(config.problem), seeds=list(seeds), device=config.device)
    settings = OmegaConf.to_container(config.training, resolve=True)
    return Training(problem, instantiate(_arguments(config.optimizer)), TrainingSettings(**settings))  # pyright: ignore


def check_machine(device: str, threads: int) -> None:
    """Refuse a device that is not there before anything is built."""
    if threads < 1:
        raise ValueError(f"threads must be positive, got {threads}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but torch finds no GPU here: use device=cpu")


def _arguments(node: DictConfig) -> dict[str, Any]:
    """A config node without what is not its target's."""
    arguments = OmegaConf.to_container(node, resolve=True)
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items() if key not in NOT_ARGUMENTS}


if __name__ == "__main__":
    check_overrides(sys.argv[1:], CONFIGS)
    main()
