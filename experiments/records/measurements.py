"""What the study measures along a training: tables in the record of each seed."""

from pathlib import Path

import pandas as pd

from experiments.records.files import (
    MAKE_AGAIN,
    PROVENANCE,
    SEED_PREFIX,
    NoRecordsError,
    RecordError,
    check_numbers,
    read_provenance,
    read_table,
    table_path,
)

WORDS = ("statistics", "direction", "matrix")  # the columns that are not numbers
PCG_LIMIT = 5000
"""Iterations after which conjugate gradients are stopped."""


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
        provenance = read_provenance(path.parent)
        if provenance["complete"]:
            label = provenance.get("label") or ""
            frames.append(read_measured(path.parent, table).assign(label=label))
    if not frames:
        raise NoRecordsError(f"no finished measurements in {home}; make them with: make study")
    return pd.concat(frames, ignore_index=True)


def read_measured(directory: Path, name: str) -> pd.DataFrame:
    """One table of a finished measurement; raises ``RecordError`` if it is missing or damaged."""
    path = table_path(directory, name)
    if not path.exists():
        raise RecordError(f"{path} does not exist, although the record is marked complete; {MAKE_AGAIN}")
    table = read_table(path)
    check_numbers(path, table, [column for column in table if column not in WORDS])
    return table
