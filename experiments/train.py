"""Train one optimizer on one problem, and leave a record.

python -m experiments.train problem=deep_linear_mlp optimizer=two_level_kfac
python -m experiments.train -m optimizer=sgd,adam optimizer.lr=1e-2,1e-3
torchrun --nproc-per-node=2 -m experiments.train problem=resnet20_cifar10_preview
"""

import math
import os
import time
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

from experiments.command_line import CONFIGS, launch, user_errors
from experiments.identity import identity, one_record_per_seed, run_path
from experiments.problems import DataError
from experiments.records import seed_directory
from experiments.schema import NOT_SETTINGS, check_settings, register
from experiments.training import processes
from experiments.training.progress import Report, command_began
from experiments.training.records import RunDirectory
from experiments.training.trainer import Training, TrainingSettings, prefer_deterministic_kernels

register()


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    with user_errors(), processes.joined(config.device):
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            # The launchers let the others go on, and raise the first failure at the end.
            train(config, attempt=RunDirectory.failure_recorded)
        else:
            train(config)


def train(
    config: DictConfig, attempt: Callable[[RunDirectory], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Train what is missing, one record after another, each in the context ``attempt`` of its directory.

    With ``hours``, counted from the command's begin, it ends with the last epoch that fits; the same command goes on.

    Raises:
        SystemExit: the problem's data cannot be had.
        ValueError: a setting that is not possible, before anything is trained.
    """
    check(config)
    torch.set_num_threads(config.threads)
    prefer_deterministic_kernels()
    deadline = math.inf if config.hours is None else command_began() + 3600 * config.hours
    for directory in run_directories(config):
        with Report(str(directory.path)) as report:
            if processes.agreed(not config.rerun and directory.is_complete()):
                label = f" ({directory.label})" if directory.label else ""
                _say(f"{directory.path}{label}: complete, not trained again (rerun=true does)")
                continue
            if processes.agreed(time.time() >= deadline):
                report(0, config.training.epochs)
                _say(f"{directory.path}: not trained, hours={config.hours} are over")
                continue
            with attempt(directory):
                train_record(config, directory, report, deadline)
        outcome = "complete" if directory.is_complete() else "goes on with the same command"
        _say(f"{directory.path}: {outcome}{report.note and f', {report.note}'}")


def _say(line: str) -> None:
    if processes.is_first():
        print(line, flush=True)


def train_record(config: DictConfig, directory: RunDirectory, report: Report, deadline: float) -> None:
    try:
        training = build_training(config, directory.config["seeds"])
    except DataError as error:
        raise SystemExit(str(error)) from None
    if not processes.is_first():
        training.follow()
        return
    tracker = _made(config.tracking)
    training.run(directory, tracker, report, rerun=config.rerun, deadline=deadline)


def check(config: DictConfig) -> int:
    """How many trainings these are.

    Raises:
        ValueError: the optimizer, the machine or a directory's record is not as the settings say, or these cannot be
            meant.
        OSError: records cannot be written there.
    """
    check_settings(config)
    if config.training.compile and not one_record_per_seed(config):
        raise ValueError(
            "training.compile=true is not for seeds that train side by side: torch cannot trace their batch "
            "normalisation. Leave it false"
        )
    if processes.started_by_torchrun():
        check_processes(config)
    check_machine(config.device)
    _made(config.tracking)
    build_optimizer = instantiate(_arguments(config.optimizer))
    build_optimizer(torch.nn.Linear(1, 1), likelihood="gaussian", generator=torch.Generator())
    check_writable(Path(config.runs))
    return len(run_directories(config))


def run_directories(config: DictConfig) -> list[RunDirectory]:
    """Where the records go: one for all seeds side by side, or one per seed."""
    path, own = run_path(config), identity(config)
    if not one_record_per_seed(config):
        return [RunDirectory(path, own)]
    return [RunDirectory(seed_directory(path, seed), own | {"seeds": [seed]}) for seed in config.seeds]


def build_training(config: DictConfig, seeds: Sequence[int]) -> Training:
    """The configured problem, optimizer and trainer; raises what their classes raise."""
    problem = _made(_arguments(config.problem), seeds=list(seeds), device=config.device)
    settings = OmegaConf.to_container(config.training, resolve=True)
    return Training(problem, instantiate(_arguments(config.optimizer)), TrainingSettings(**settings))  # pyright: ignore


def check_machine(device: str) -> None:
    """Refuse a device that is not there before anything is built."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but torch finds no GPU here: use device=cpu")
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={device} cannot be used here ({reason}): use device=cpu") from None


def check_processes(config: DictConfig) -> None:
    """Refuse several processes where each would not train one seed's share of a batch."""
    if not one_record_per_seed(config):
        raise ValueError("torchrun is for the ResNets: here the seeds train side by side, in one process")
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ValueError(
            "torchrun is for single trainings: leave out -m, whose launcher starts processes itself"
        )


def check_writable(runs: Path) -> None:
    """Raises ``OSError`` where no record can be written below ``runs``, which need not exist yet."""
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"runs={runs}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"runs={runs}: {there} cannot be written")


def _made(node: Any, **arguments: Any) -> Any:
    """As ``instantiate``; raises what the target raises."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def _arguments(node: DictConfig) -> dict[str, Any]:
    """A config node without what is not its target's."""
    arguments = OmegaConf.to_container(node, resolve=True)
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items() if key not in NOT_SETTINGS}


if __name__ == "__main__":
    launch(main, check)
