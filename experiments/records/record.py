"""One training's record, read and checked to be whole."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.files import (
    CURVES,
    MAKE_AGAIN,
    PAPER,
    PARTS,
    SEED_PREFIX,
    NoRecordsError,
    RecordError,
    check_numbers,
    config_value,
    read_provenance,
    read_table,
    table_path,
)

REQUIRED_COLUMNS = (
    "seed",
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "seconds",
)
ALWAYS_FINITE = ("learning_rate", "seconds")  # everything else may be NaN or inf for a diverged seed
OF_THE_MACHINE = ("autocast",)  # settings of a training that say what is fast where it runs


@dataclass(frozen=True, eq=False)
class Record:
    """``curves``, one row per (seed, epoch), and the ``provenance`` of these numbers."""

    path: Path
    curves: pd.DataFrame
    provenance: dict[str, Any]

    @property
    def problem(self) -> str:
        return self.config("problem", "name")

    @property
    def optimizer(self) -> str:
        return self.config("optimizer", "name")

    @property
    def variant(self) -> str:
        """``paper`` for the paper's settings, otherwise the overrides, such as ``lr=0.01``."""
        return self.path.parent.name if self.is_one_seed else self.path.name

    @property
    def is_one_seed(self) -> bool:
        """Whether it lies in a directory ``seed=<s>`` of its variant."""
        return self.path.name.startswith(SEED_PREFIX)

    @property
    def seeds(self) -> list[int]:
        return sorted(set(self.curves["seed"]))

    @property
    def complete(self) -> bool:
        return self.provenance["complete"]

    @property
    def label(self) -> str:
        """What a figure must say about these numbers on its face, such as ``preview``; empty if nothing."""
        return self.provenance.get("label") or ""

    @property
    def remark(self) -> str:
        """All that must be said of it: its label, settings other than the paper's, unfinished."""
        variant = "" if self.variant == PAPER else self.variant.replace(",", ", ")
        return ", ".join(filter(None, (self.label, variant, "" if self.complete else "incomplete")))

    @property
    def machine(self) -> str:
        """What its seconds were measured on: ``cpu, 1 thread``."""
        threads = self.provenance.get("threads")
        counted = "" if threads is None else f"{threads} thread" + ("s" if threads != 1 else "")
        return ", ".join(filter(None, (self.provenance.get("device"), counted)))

    def config(self, *keys: str) -> Any:
        """An entry of its configuration; raises ``RecordError`` if it is not there."""
        return config_value(self.provenance, self.path, *keys)


def shared_settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a configuration what all seeds of a variant have in common, on whatever machine."""
    shared = {part: dict(config[part]) for part in PARTS}
    shared["training"] = {k: v for k, v in shared["training"].items() if k not in OF_THE_MACHINE}
    return shared


def load_record(path: str | Path) -> Record:
    """Read one record directory and check that it is whole.

    Raises:
        NoRecordsError: there is no record at ``path``, or one before its first finished epoch.
        RecordError: a file is damaged, a column or a row is missing or there twice, or the record
            is marked complete but lacks seeds or epochs of its own configuration.
    """
    path = Path(path)
    provenance = read_provenance(path)
    file = table_path(path, CURVES)
    if provenance["complete"] and not file.exists():
        raise RecordError(f"{file} does not exist, although the record is marked complete; {MAKE_AGAIN}")
    record = Record(path, _read_curves(file), provenance)
    if record.complete:
        _check_complete(record)
    return record


def _read_curves(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise NoRecordsError(f"{path} does not exist: no epoch has finished yet")
    curves = read_table(path)
    check_numbers(path, curves, REQUIRED_COLUMNS)
    if curves.empty:
        raise NoRecordsError(f"{path} has no rows: no epoch has finished yet")
    check_numbers(path, curves, curves.columns)
    odd = [name for name in ("seed", "epoch") if not pd.api.types.is_integer_dtype(curves[name])]
    odd += [name for name in ALWAYS_FINITE if not np.isfinite(curves[name]).all()]
    if odd:
        raise RecordError(f"{path} is damaged: not a number in every row of {', '.join(odd)}; {MAKE_AGAIN}")
    _check_rows(path, curves)
    return curves


def _check_rows(path: Path, curves: pd.DataFrame) -> None:
    counts = Counter(zip(curves["seed"], curves["epoch"], strict=True))
    (seed, epoch), rows = counts.most_common(1)[0]
    if rows > 1:
        raise RecordError(f"{path} has {rows} rows for seed {seed}, epoch {epoch}; {MAKE_AGAIN}")
    expected = set(range(1, max(curves["epoch"]) + 1))
    for seed, of_seed in curves.groupby("seed"):
        if wrong := sorted(expected ^ set(of_seed["epoch"])):
            raise RecordError(
                f"{path}: seed {seed} should have the epochs 1 to {max(expected)} like the other "
                f"seeds; missing or too many: {', '.join(map(str, wrong))}"
            )


def _check_complete(record: Record) -> None:
    planned, found = record.config("training", "epochs"), max(record.curves["epoch"])
    if type(planned) is not int:
        raise RecordError(
            f"{record.path}: config.training.epochs is {planned!r}, not a whole number; {MAKE_AGAIN}"
        )
    if found != planned:
        raise RecordError(
            f"{record.path} is marked complete but has {found} of {planned} epochs; {MAKE_AGAIN}"
        )
    seeds = sorted(set(record.config("seeds")))
    if seeds != record.seeds:
        raise RecordError(
            f"{record.path} is marked complete but its seeds are {record.seeds} instead of {seeds}; {MAKE_AGAIN}"
        )
