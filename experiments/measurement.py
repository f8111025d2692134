"""What the study's measurements share: one seed after another, each a record of tables, none measured twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.identity import identity, run_path
from experiments.records import Row, seed_directory
from experiments.schema import check_settings
from experiments.train import build_training, check_machine, check_writable
from experiments.training.records import RunDirectory
from experiments.training.trainer import Training

Rows = list[Row]


def measured_directory(config: DictConfig, kind: str, seed: int, **own: Any) -> RunDirectory:
    """``<runs>/<kind>/<problem>/<optimizer>/<variant>/seed=<s>``; ``own``: what else its identity consists of."""
    path = Path(config.runs) / kind / run_path(config, seeds_apart=True).relative_to(config.runs)
    return RunDirectory(seed_directory(path, seed), identity(config) | own | {"seeds": [seed]})


def check_measurement(config: DictConfig) -> int:
    """``experiments.train``'s checks; 0, since a measurement is no training whose progress is shown."""
    check_settings(config)
    check_machine(config.device)
    check_writable(Path(config.runs))
    return 0


def measure_missing(
    config: DictConfig, kind: str, measure: Callable[[Training], dict[str, Rows]], **own: Any
) -> None:
    """Leave ``<name>.csv`` for each table of ``measure`` in each seed's ``measured_directory`` that has none yet."""
    check_measurement(config)
    torch.set_num_threads(config.threads)
    for seed in config.seeds:
        directory = measured_directory(config, kind, seed, **own)
        if not config.rerun and directory.is_complete():
            print(f"{directory.path}: complete, not measured again (rerun=true does)")
            continue
        with directory.locked():
            training = build_training(config, [seed])
            directory.write_provenance(False, config.device, training.problem.label)
            for name, rows in measure(training).items():
                directory.write_table(name, rows)
            directory.finish(config.device, training.problem.label)
        print(f"{directory.path}: complete")
