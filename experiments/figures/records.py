"""Reading one record that training leaves behind.

A record is a directory ``<root>/<problem>/<optimizer>/<variant>/``, or ``seed=<s>/`` in it where every
seed is trained alone, with two files: ``curves.csv``, one row per (seed, epoch), or ``curves.csv.gz``,
the same packed; and ``provenance.json``, the resolved configuration and where the numbers come from.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CURVES = ("curves.csv", "curves.csv.gz")
PACKED = ".gz"
PROVENANCE = "provenance.json"
SEED_PREFIX = "seed="
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
ALWAYS_FINITE = (
    "learning_rate",
    "seconds",
)  # everything else may be NaN or inf for a diverged seed

DAMAGED = (
    pd.errors.EmptyDataError,
    pd.errors.ParserError,
    UnicodeDecodeError,
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
)


class RecordError(ValueError):
    """A record that cannot be read, or contradicts itself."""


class NoRecordsError(RecordError):
    """There is nothing to read where records were expected."""


@dataclass(frozen=True)
class Record:
    """One run: ``curves``, one row per (seed, epoch), and the ``provenance`` of these numbers."""

    path: Path
    curves: pd.DataFrame
    provenance: dict[str, Any]

    @property
    def problem(self) -> str:
        return config_value(self.provenance, self.path, "problem", "name")

    @property
    def optimizer(self) -> str:
        return config_value(self.provenance, self.path, "optimizer", "name")

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
    def label(self) -> str | None:
        """What a figure must say about these numbers on its face, such as ``preview``."""
        return self.provenance.get("label")


def load_record(path: str | Path) -> Record:
    """Read one record directory and check that it is whole.

    Raises:
        NoRecordsError: there is no record at ``path``, or one before its first finished epoch.
        RecordError: a file is damaged, a column or a row is missing or there twice, or the record
            is marked complete but lacks seeds or epochs of its own configuration.
    """
    path = Path(path)
    record = Record(path, _read_curves(curves_file(path)), read_provenance(path / PROVENANCE))
    if record.complete:
        _check_complete(record)
    return record


def curves_file(path: Path) -> Path:
    """The record's curves, plain rather than packed."""
    return table_file(path, CURVES[0])


def table_file(path: Path, name: str) -> Path:
    """A table of a record, plain rather than packed."""
    plain, packed = path / name, path / f"{name}{PACKED}"
    return packed if packed.exists() and not plain.exists() else plain


def unpacked(path: Path) -> bytes:
    """The text of a table, packed or not."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == PACKED else content


def read_provenance(path: Path) -> dict[str, Any]:
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoRecordsError(f"{path} does not exist: not a record, or an unfinished copy") from None
    except ValueError as error:
        raise RecordError(f"{path} is not valid JSON ({error}); run the training again") from error
    if not isinstance(provenance, dict) or not isinstance(provenance.get("complete"), bool):
        raise RecordError(f"{path} lacks 'complete: true' or 'complete: false'")
    return provenance


def _read_curves(path: Path) -> pd.DataFrame:
    try:
        text = unpacked(path)
        curves = pd.read_csv(io.BytesIO(text))
    except FileNotFoundError:
        raise NoRecordsError(f"{path} does not exist: no epoch has finished yet") from None
    except DAMAGED as error:
        raise RecordError(f"{path} is damaged ({error}); run the training again") from error
    missing = [column for column in REQUIRED_COLUMNS if column not in curves]
    if missing:
        raise RecordError(f"{path} lacks the columns {', '.join(missing)}")
    if curves.empty:
        raise NoRecordsError(f"{path} has no rows: no epoch has finished yet")
    _check_values(path, curves, cut_off=not text.endswith(b"\n"))
    _check_rows(path, curves)
    return curves


def _check_values(path: Path, curves: pd.DataFrame, *, cut_off: bool) -> None:
    damaged = [c for c in curves if not pd.api.types.is_numeric_dtype(curves[c])]
    damaged += [c for c in ("seed", "epoch") if not pd.api.types.is_integer_dtype(curves[c])]
    damaged += [c for c in ALWAYS_FINITE if c not in damaged and not np.isfinite(curves[c]).all()]
    if damaged:
        raise RecordError(
            f"{path} is damaged: not a number in every row of {', '.join(map(str, damaged))}; "
            "run the training again"
        )
    if cut_off:
        raise RecordError(f"{path} is damaged: its last line is cut off; run the training again")


def _check_rows(path: Path, curves: pd.DataFrame) -> None:
    counts = Counter(zip(curves["seed"], curves["epoch"], strict=True))
    (seed, epoch), rows = counts.most_common(1)[0]
    if rows > 1:
        raise RecordError(f"{path} has {rows} rows for seed {seed}, epoch {epoch}")
    expected = set(range(1, max(curves["epoch"]) + 1))
    for seed, of_seed in curves.groupby("seed"):
        if wrong := sorted(expected ^ set(of_seed["epoch"])):
            raise RecordError(
                f"{path}: seed {seed} should have the epochs 1 to {max(expected)} like the other "
                f"seeds; missing or too many: {', '.join(map(str, wrong))}"
            )


def _check_complete(record: Record) -> None:
    planned = config_value(record.provenance, record.path, "training", "epochs")
    found = max(record.curves["epoch"])
    if found != planned:
        raise RecordError(f"{record.path} is marked complete but has {found} of {planned} epochs")
    seeds = sorted(set(config_value(record.provenance, record.path, "seeds")))
    if seeds != record.seeds:
        raise RecordError(
            f"{record.path} is marked complete but its seeds are {record.seeds} instead of {seeds}"
        )


def config_value(provenance: dict[str, Any], path: Path, *keys: str) -> Any:
    try:
        return reduce(lambda node, key: node[key], keys, provenance["config"])
    except (KeyError, TypeError):
        name = ".".join(("config", *keys))
        raise RecordError(f"{path / PROVENANCE} lacks '{name}'") from None
