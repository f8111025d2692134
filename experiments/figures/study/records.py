"""The study's records: trainings with their settings in columns, and tables of measurements."""

import io
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.long_table import load_records
from experiments.figures.records import (
    DAMAGED,
    PROVENANCE,
    SEED_PREFIX,
    NoRecordsError,
    RecordError,
    config_value,
    read_provenance,
    table_file,
    unpacked,
)

PROBLEM = "deep_linear_mlp"
SETTINGS = {
    "coarse": "optimizer",
    "coarse_weight": "optimizer",
    "lr": "optimizer",
    "momentum": "optimizer",
    "weight_decay": "optimizer",
    "damping": "optimizer",
    "kl_clip": "optimizer",
    "inverse": "optimizer",
    "factor_interval": "optimizer",
    "inverse_interval": "optimizer",
    "depth": "problem",
    "width": "problem",
    "batch_norm": "problem",
    "activation": "problem",
    "train_samples": "problem",
    "epochs": "training",
    "batch_size": "training",
}


class Study:
    """The records of the study below ``root``; the trainings are read once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @cached_property
    def trainings(self) -> pd.DataFrame:
        """See ``load_trainings``."""
        return load_trainings(self.root)

    def measurement(self, kind: str, group: str, table: str) -> pd.DataFrame:
        """See ``load_measurement``."""
        return load_measurement(self.root, kind, group, table)


def load_trainings(root: str | Path) -> pd.DataFrame:
    """All finished K-FAC trainings of the deep linear MLP below ``root``, as ``load_records`` returns them, with
    a column for each of ``SETTINGS``, and ``seeds`` as text, ``0-1-2``.

    ``coarse`` is ``"none"`` with one level and ``"full"`` with the optimizer's own coarse space; a ``kl_clip``
    that is off is infinite.

    Raises:
        NoRecordsError: there are none.
        RecordError: a record is damaged, see ``load_records``.
    """
    home = Path(root) / PROBLEM
    frames = []
    for path in sorted(home.glob("*/*")):
        if not (path / PROVENANCE).exists():
            continue
        provenance = read_provenance(path / PROVENANCE)
        settings = _settings(provenance, path)
        if provenance["complete"] and "kl_clip" in settings:
            frame = load_records(root, PROBLEM, optimizer=path.parent.name, variant=path.name)
            seeds = "-".join(map(str, config_value(provenance, path, "seeds")))
            frames.append(frame.assign(**settings, seeds=seeds))
    if not frames:
        raise NoRecordsError(f"no finished trainings of the study in {home}; make them with: make study")
    return pd.concat(frames, ignore_index=True)


def choose(trainings: pd.DataFrame, **settings: Any) -> pd.DataFrame:
    """The one training with these settings (columns of ``load_trainings``).

    Raises:
        NoRecordsError: there is none.
        RecordError: there are several.
    """
    fits = np.logical_and.reduce([trainings[name] == value for name, value in settings.items()])
    found = trainings.loc[fits]
    names = found[["optimizer", "variant"]].drop_duplicates()
    asked = ", ".join(f"{name}={value}" for name, value in settings.items())
    if found.empty:
        raise NoRecordsError(f"no finished training with {asked}; make it with: make study")
    if len(names) > 1:
        listed = "; ".join("/".join(row) for row in names.to_numpy())
        raise RecordError(f"several trainings with {asked}: {listed}")
    return found


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


def _settings(provenance: dict[str, Any], path: Path) -> dict[str, Any]:
    parts = {name: config_value(provenance, path, name) for name in set(SETTINGS.values())}
    settings = {name: parts[part][name] for name, part in SETTINGS.items() if name in parts[part]}
    two_levels = "coarse_weight" in settings
    settings = {"coarse": "full" if two_levels else "none", "coarse_weight": 0.0} | settings
    if settings.get("kl_clip", 0) is None:
        settings["kl_clip"] = np.inf
    return settings


def read_table(directory: Path, name: str) -> pd.DataFrame:
    """``<name>.csv``, plain rather than packed (``.csv.gz``)."""
    path = table_file(directory, f"{name}.csv")
    try:
        return pd.read_csv(io.BytesIO(unpacked(path)))
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist, although the record is marked complete") from None
    except DAMAGED as error:
        raise RecordError(f"{path} is damaged ({error}); measure again") from error
