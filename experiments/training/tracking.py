"""Weights & Biases, the only module that imports it: the record's numbers once more, never a blocker.

One W&B run per seed. The runs of a sweep are one group, and its configurations are told apart by the
config's ``configuration``; outside a sweep the seeds of a configuration are one. Whatever fails in W&B
is a warning, and the training goes on without it.
"""

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from experiments.records import FINAL_EPOCHS, Row


class Tracker(Protocol):
    def start(self, config: dict[str, Any], first_epoch: int) -> None: ...
    def log(self, rows: list[Row]) -> None: ...
    def finish(self, rows: list[Row]) -> None: ...


class NoTracker:
    """For tests and benchmarks."""

    def start(self, config: dict[str, Any], first_epoch: int) -> None: ...
    def log(self, rows: list[Row]) -> None: ...
    def finish(self, rows: list[Row]) -> None: ...


class WandbTracker:
    """Args: ``mode`` ``"offline"`` or ``"online"``; ``project``; ``directory`` for the offline runs;
    ``recipe`` and ``sweep``, the names of those chosen, to find the run by."""

    def __init__(
        self,
        mode: str = "offline",
        project: str = "kfac2",
        directory: str = "runs",
        recipe: str | None = None,
        sweep: str | None = None,
    ):
        if mode not in ("offline", "online"):
            raise ValueError(f"unknown tracking.mode {mode!r}: choose from offline, online")
        self.mode, self.project, self.directory = mode, project, directory
        self.recipe, self.sweep = recipe, sweep
        self._runs: dict[int, Any] = {}
        self._failed = False

    def start(self, config: dict[str, Any], first_epoch: int) -> None:
        self._guard(lambda: self._start(config, first_epoch))

    def log(self, rows: list[Row]) -> None:
        self._guard(lambda: [self._runs[int(row["seed"])].log(row, step=row["epoch"]) for row in rows])

    def finish(self, rows: list[Row]) -> None:
        self._guard(lambda: self._finish(rows))

    def _start(self, config: dict[str, Any], first_epoch: int) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = self.mode
        if mode == "online" and not wandb.login(prompt=False):
            warnings.warn("tracking.mode=online, but no W&B login is stored: tracking offline", stacklevel=2)
            mode = "offline"
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        configuration, run = _digest(config | {"seeds": None}), _digest(config)
        problem, optimizer = config["problem"]["name"], config["optimizer"]["name"]
        origin = {"configuration": configuration, "recipe": self.recipe, "sweep": self.sweep}
        tags = [tag for tag in (problem, optimizer, self.recipe, self.sweep) if tag]
        for seed in config["seeds"]:
            self._runs[seed] = wandb.init(
                project=self.project,
                dir=self.directory,
                mode=mode,  # pyright: ignore[reportArgumentType]
                group=f"{problem}-{self.sweep or configuration}",
                job_type=optimizer,
                name=f"{problem}-{optimizer}-seed{seed}-{configuration}",
                id=f"{run}-{seed}",
                resume="allow",
                tags=[*tags, f"seed{seed}"],
                config=config | origin | {"seed": seed, "first_epoch": first_epoch},
                reinit="create_new",
                settings=wandb.Settings(init_timeout=30, x_disable_stats=True, console="off"),
            )

    def _finish(self, rows: list[Row]) -> None:
        for seed, run in self._runs.items():
            run.summary.update(summary([row for row in rows if row["seed"] == seed]))
            run.finish()

    def _guard(self, call: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            logging.getLogger(__name__).debug("W&B failed", exc_info=True)
            warnings.warn(f"W&B tracking stopped, the training goes on: {error}", stacklevel=2)


def summary(rows: list[Row]) -> dict[str, float | bool]:
    """What one filters and sorts one seed's runs by; ``final``: the mean over the last 5 epochs."""
    final = {
        f"final_{name}": math.fsum(row[name] for row in rows[-FINAL_EPOCHS:]) / len(rows[-FINAL_EPOCHS:])
        for name in ("train_loss", "test_loss", "test_accuracy")
    }
    accuracies = [row["test_accuracy"] for row in rows]
    return final | {
        "best_test_accuracy": max(filter(math.isfinite, accuracies), default=math.nan),
        "diverged": not all(math.isfinite(row["train_loss"]) for row in rows),
        "epochs": len(rows),
        "seconds": rows[-1]["seconds"],
    }


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
