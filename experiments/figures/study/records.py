"""The study's records: its arms' curves, and tables of measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd

from experiments.figures.long_table import load_records
from experiments.records import NoRecordsError, load_measurement
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
