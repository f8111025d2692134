"""Train one optimizer on one problem, and leave a record.

python -m experiments.train problem=deep_linear_mlp optimizer=two_level_kfac
python -m experiments.train -m optimizer=sgd,adam optimizer.lr=1e-2,1e-3
"""

import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.identity import identity, run_path
from experiments.overrides import check_overrides
from experiments.schema import register
from kfac2.training.records import RunDirectory
from kfac2.training.trainer import Training, TrainingSettings

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")
register()


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    check_machine(config.device, config.threads)
    torch.set_num_threads(config.threads)
    directory = RunDirectory(run_path(config), identity(config))
    if directory.is_complete() and not config.rerun:
        print(f"{directory.path}: complete, not trained again (rerun=true does)")
        return
    training = build_training(config)
    position = OmegaConf.select(HydraConfig.get(), "job.num", default=0)  # pyright: ignore
    training.run(directory, instantiate(config.tracking), str(directory.path), position, rerun=config.rerun)
    print(f"{directory.path}: complete")


def build_training(config: DictConfig) -> Training:
    """The configured problem, optimizer and trainer."""
    problem = instantiate(_arguments(config.problem), seeds=list(config.seeds), device=config.device)
    settings = OmegaConf.to_container(config.training, resolve=True)
    return Training(problem, instantiate(_arguments(config.optimizer)), TrainingSettings(**settings))  # pyright: ignore


def check_machine(device: str, threads: int) -> None:
    """Refuse a device that is not there before anything is built."""
    if threads < 1:
        raise ValueError(f"threads must be positive, got {threads}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but torch finds no GPU here: use device=cpu")


def _arguments(node: DictConfig) -> dict[str, Any]:
    """A config node without the name that it has for people."""
    arguments = OmegaConf.to_container(node, resolve=True)
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items() if key != "name"}


if __name__ == "__main__":
    check_overrides(sys.argv[1:], CONFIGS)
    main()
