"""Weights & Biases, the only module that imports it: the record's numbers once more, never a blocker.

One W&B run per seed, grouped by configuration. Whatever fails in W&B is a warning, and the training
goes on without it.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from kfac2.training.records import Row


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
    """Args: ``mode`` ``"offline"`` or ``"online"``; ``project``; ``directory`` for the offline runs."""

    def __init__(self, mode: str = "offline", project: str = "kfac2", directory: str = "runs"):
        if mode not in ("offline", "online"):
            raise ValueError(f"unknown tracking.mode {mode!r}: choose from offline, online")
        self.mode, self.project, self.directory = mode, project, directory
        self._runs: dict[int, Any] = {}
        self._failed = False

    def start(self, config: dict[str, Any], first_epoch: int) -> None:
        self._guard(lambda: self._start(config, first_epoch))

    def log(self, rows: list[Row]) -> None:
        self._guard(lambda: [self._runs[int(row["seed"])].log(row, step=row["epoch"]) for row in rows])

    def finish(self, rows: list[Row]) -> None:
        self._guard(lambda: [run.finish() for run in self._runs.values()])

    def _start(self, config: dict[str, Any], first_epoch: int) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = self.mode
        if mode == "online" and not wandb.login(prompt=False):
            warnings.warn("tracking.mode=online, but no W&B login is stored: tracking offline", stacklevel=2)
            mode = "offline"
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        group, run = _digest(config | {"seeds": None}), _digest(config)
        tags = [config["problem"]["name"], config["optimizer"]["name"]]
        for seed in config["seeds"]:
            self._runs[seed] = wandb.init(
                project=self.project,
                dir=self.directory,
                mode=mode,  # pyright: ignore[reportArgumentType]
                group=group,
                name=f"{'-'.join(tags)}-seed{seed}-{group}",
                id=f"{run}-{seed}",
                resume="allow",
                tags=[*tags, f"seed{seed}"],
                config=config | {"seed": seed, "first_epoch": first_epoch},
                reinit="create_new",
                settings=wandb.Settings(init_timeout=30, x_disable_stats=True, console="off"),
            )

    def _guard(self, call: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            logging.getLogger(__name__).debug("W&B failed", exc_info=True)
            warnings.warn(f"W&B tracking stopped, the training goes on: {error}", stacklevel=2)


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
