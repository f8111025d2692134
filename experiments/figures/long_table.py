"""The records of one problem as one long table."""

from pathlib import Path

import pandas as pd

from experiments.records import PAPER, Record, find_runs


def load_records(
    root: str | Path,
    problem: str,
    *,
    variant: str | None = PAPER,
    optimizer: str | None = None,
    allow_incomplete: bool = False,
) -> pd.DataFrame:
    """``find_runs`` as one long table.

    Returns:
        One row per (optimizer, variant, seed, epoch): the columns of ``curves.csv``, preceded by
        ``problem``, ``optimizer``, ``variant``, the number of ``replicas`` trained side by side and,
        from the provenance, ``complete``, ``label`` (empty if there is none), ``device`` and
        ``threads``.
    """
    runs = find_runs(root, problem, variant=variant, optimizer=optimizer, allow_incomplete=allow_incomplete)
    frames = []
    for run in runs:
        merged = pd.concat([_long_format(record) for record in run.records])
        frames.append(merged.loc[merged["epoch"] <= run.epochs])
    return pd.concat(frames, ignore_index=True)


def record_labels(frame: pd.DataFrame) -> list[str]:
    """What must be said of these records wherever they are shown, such as that they are a preview."""
    return sorted(set(frame["label"]) - {""})


def by_optimizer(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The long table of ``load_records`` split into one table per optimizer."""
    return {str(name): curves for name, curves in frame.groupby("optimizer", sort=False)}


def _long_format(record: Record) -> pd.DataFrame:
    origin = {
        "problem": record.problem,
        "optimizer": record.optimizer,
        "variant": record.variant,
        "replicas": len(record.seeds),
        "complete": record.complete,
        "label": record.label,
        "device": str(record.provenance.get("device", "")),
        "threads": record.provenance.get("threads"),
    }
    columns = pd.DataFrame(origin, index=record.curves.index)
    return pd.concat([columns, record.curves], axis=1)
