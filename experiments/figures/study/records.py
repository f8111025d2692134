"""The study's records: its arms' curves, and tables of measurements."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd

from experiments.figures.long_table import load_records
from experiments.figures.records import (
    DAMAGED,
    PROVENANCE,
    SEED_PREFIX,
    NoRecordsError,
    RecordError,
    read_provenance,
    table_file,
    unpacked,
)
from experiments.study.arms import Arm

K = TypeVar("K")


class Study:
    """The records of the study below ``root``; each training is read once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._curves: dict[Arm, pd.DataFrame] = {}

    def curves(self, arm: Arm) -> pd.DataFrame:
        """An arm's record, as ``load_records`` returns it.

        Raises:
            NoRecordsError: it is not there, or not finished.
            RecordError: it is damaged, see ``load_records``.
        """
        if arm not in self._curves:
            try:
                self._curves[arm] = load_records(
                    self.root, arm.problem, optimizer=arm.optimizer, variant=arm.variant
                )
            except NoRecordsError:
                where = self.root / arm.problem / arm.optimizer / arm.variant
                message = f"no finished training of the study in {where}; make it with: make study"
                raise NoRecordsError(message) from None
        return self._curves[arm]

    def arms(self, arms: Mapping[K, Arm]) -> dict[K, pd.DataFrame]:
        """The records of several arms, by the same names."""
        return {name: self.curves(arm) for name, arm in arms.items()}

    def measurement(self, kind: str, group: str, table: str) -> pd.DataFrame:
        """See ``load_measurement``."""
        return load_measurement(self.root, kind, group, table)


def load_measurement(root: str | Path, kind: str, group: str, table: str) -> pd.DataFrame:
    """A table of all seeds' finished measurements, ``<root>/<kind>/<group>/seed=<s>/<table>.csv`` (or ``.csv.gz``),
    with the provenance's ``label``; ``group`` is ``<problem>/<optimizer>/<variant>``.

    Raises:
        NoRecordsError: there are none.
        RecordError: one is damaged.
    """
    home = Path(root) / kind / group
    frames = []
    for path in sorted(home.glob(f"{SEED_PREFIX}*/{PROVENANCE}")):
        provenance = read_provenance(path)
        if provenance["complete"]:
            label = provenance.get("label") or ""
            frames.append(read_table(path.parent, table).assign(label=label))
    if not frames:
        raise NoRecordsError(f"no finished measurements in {home}; make them with: make study")
    return pd.concat(frames, ignore_index=True)


def read_table(directory: Path, name: str) -> pd.DataFrame:
    """``<name>.csv``, plain rather than packed (``.csv.gz``)."""
    path = table_file(directory, f"{name}.csv")
    try:
        return pd.read_csv(io.BytesIO(unpacked(path)))
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist, although the record is marked complete") from None
    except DAMAGED as error:
        raise RecordError(f"{path} is damaged ({error}); measure again") from error
