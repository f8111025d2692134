"""The study's records: its arms' runs, and tables of measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd

from experiments.records import NoRecordsError, Run, load_measurement, load_runs
from experiments.study.arms import Arm

K = TypeVar("K")


class Study:
    """The records of the study below ``root``; each training is read once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._runs: dict[Arm, Run] = {}

    def run(self, arm: Arm) -> Run:
        """An arm's record.

        Raises:
            NoRecordsError: it is not there, or not finished.
            RecordError: it is damaged, see ``load_runs``.
        """
        if arm not in self._runs:
            try:
                found = load_runs(self.root, arm.problem, optimizer=arm.optimizer, variant=arm.variant)
                self._runs[arm] = found[arm.optimizer]
            except NoRecordsError:
                where = self.root / arm.problem / arm.optimizer / arm.variant
                message = f"no finished training of the study in {where}; make it with: make study"
                raise NoRecordsError(message) from None
        return self._runs[arm]

    def arms(self, arms: Mapping[K, Arm]) -> dict[K, Run]:
        """The records of several arms, by the same names."""
        return {name: self.run(arm) for name, arm in arms.items()}

    def measurement(self, kind: str, group: str, table: str) -> pd.DataFrame:
        """See ``load_measurement``."""
        return load_measurement(self.root, kind, group, table)
