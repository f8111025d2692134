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

MODES = ("offline", "online", "disabled")
OLD_MODES = {"dryrun": "offline", "run": "online"}


class Tracker(Protocol):
    def start(self, config: dict[str, Any], first_epoch: int, identifier: str) -> None:
        """Begin, or go on from ``first_epoch``; ``identifier`` is that of the training from its first epoch on."""
        ...

    def log(self, rows: list[Row]) -> None: ...
    def finish(self, rows: list[Row]) -> None: ...


class NoTracker:
    """For tests and benchmarks."""

    def start(self, config: dict[str, Any], first_epoch: int, identifier: str) -> None: ...
    def log(self, rows: list[Row]) -> None: ...
    def finish(self, rows: list[Row]) -> None: ...


class WandbTracker:
    """Args: ``mode`` ``"offline"``, ``"online"`` or ``"disabled"``, by default as W&B's environment variables say,
    else offline; ``project``; ``directory`` for the offline runs; ``recipe`` and ``sweep``, the names of those chosen,
    to find the run by."""

    def __init__(
        self,
        mode: str | None = None,
        project: str = "kfac2",
        directory: str = "runs",
        recipe: str | None = None,
        sweep: str | None = None,
    ):
        if mode is not None and mode not in MODES:
            raise ValueError(f"unknown tracking.mode {mode!r}: choose from {', '.join(MODES)}")
        self.mode = mode or environment_mode()
        self.project, self.directory = project, directory
        self.recipe, self.sweep = recipe, sweep
        self._runs: dict[int, Any] = {}
        self._failed = False

    def start(self, config: dict[str, Any], first_epoch: int, identifier: str) -> None:
        self._guard(lambda: self._start(config, first_epoch, identifier))

    def log(self, rows: list[Row]) -> None:
        self._guard(lambda: [self._runs[int(row["seed"])].log(row, step=row["epoch"]) for row in rows])

    def finish(self, rows: list[Row]) -> None:
        self._guard(lambda: self._finish(rows))

    def _start(self, config: dict[str, Any], first_epoch: int, identifier: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = self.mode
        if mode == "online" and not wandb.login(prompt=False):
            warnings.warn("W&B is to be online, but no login is stored: tracking offline", stacklevel=2)
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
                id=f"{run}-{identifier}-{seed}",
                resume="allow",
                tags=[*tags, f"seed{seed}"],
                config=config | origin | {"seed": seed, "first_epoch": first_epoch},
                reinit="create_new",
                settings=wandb.Settings(init_timeout=30, x_disable_stats=True, console="off"),
            )

    def _finish(self, rows: list[Row]) -> None:
        for seed, run in self._runs.items():
            if own := [row for row in rows if row["seed"] == seed]:
                run.summary.update(summary(own))
            run.finish()

    def _guard(self, call: Callable[[], Any]) -> None:
        if self._failed or self.mode == "disabled":
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            logging.getLogger(__name__).debug("W&B failed", exc_info=True)
            warnings.warn(f"W&B tracking stopped, the training goes on: {error}", stacklevel=2)


def environment_mode() -> str:
    """What ``WANDB_DISABLED`` and ``WANDB_MODE`` ask for; offline where they say nothing.

    Raises:
        ValueError: a mode that W&B has not.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    given = os.environ.get("WANDB_MODE") or "offline"
    mode = OLD_MODES.get(given, given)
    if mode not in MODES:
        raise ValueError(f"unknown WANDB_MODE {given!r}: choose from {', '.join(MODES)}")
    return mode


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
