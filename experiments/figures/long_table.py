"""The records of one problem as one long table."""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.figures.records import (
    CURVES,
    PROVENANCE,
    SEED_PREFIX,
    NoRecordsError,
    Record,
    RecordError,
    config_value,
    curves_file,
    load_record,
    read_provenance,
)


def load_records(
    root: str | Path,
    problem: str,
    *,
    variant: str | None = "paper",
    optimizer: str | None = None,
    allow_incomplete: bool = False,
) -> pd.DataFrame:
    """Read the records of one problem into one long table.

    Args:
        root: directory that holds ``<problem>/<optimizer>/<variant>/``, each a record or one record
            per seed in ``seed=<s>/``.
        problem: name of the problem.
        variant: name of the variant; None reads them all.
        optimizer: name of the optimizer; None reads them all.
        allow_incomplete: read unfinished records too instead of skipping them with a warning. Seeds
            with a record each are then cut to the epochs that all of them have.

    Returns:
        One row per (optimizer, variant, seed, epoch): the columns of ``curves.csv``, preceded by
        ``problem``, ``optimizer``, ``variant``, the number of ``replicas`` trained side by side and,
        from the provenance, ``complete``, ``label`` (empty if there is none), ``device`` and
        ``threads``.

    Raises:
        NoRecordsError: nothing to read; the message says which command makes the records.
        RecordError: a record is damaged, see ``load_record``, or lies in the wrong directory, or the
            seeds of one variant overlap or are of different settings.
    """
    home = Path(root) / problem
    records = defaultdict(list)
    unfinished = []
    for path in _record_directories(home, variant, optimizer):
        complete = read_provenance(path / PROVENANCE)["complete"]
        if not complete and not (allow_incomplete and curves_file(path).exists()):
            unfinished.append(str(path))
            continue
        record = load_record(path)
        _check_place(record, home)
        records[record.optimizer, record.variant].append(record)
    if unfinished:
        warnings.warn(f"skipped unfinished records: {', '.join(unfinished)}", stacklevel=2)
    if not records:
        raise NoRecordsError(_nothing_found(home, variant, unfinished))
    return pd.concat([_merge(of_variant) for of_variant in records.values()], ignore_index=True)


def record_labels(frame: pd.DataFrame) -> list[str]:
    """What must be said of these records wherever they are shown, such as that they are a preview."""
    return sorted(set(frame["label"]) - {""})


def by_optimizer(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The long table of ``load_records`` split into one table per optimizer."""
    return {str(name): curves for name, curves in frame.groupby("optimizer", sort=False)}


def _record_directories(home: Path, variant: str | None, optimizer: str | None = None) -> list[Path]:
    """In the order of optimizers and variants, and of the seeds as numbers."""
    paths = [*home.glob("*/*"), *home.glob(f"*/*/{SEED_PREFIX}*")]
    variants = {path: path.relative_to(home).parts[:2] for path in paths}
    found = [
        path
        for path in paths
        if optimizer in (None, variants[path][0])
        and variant in (None, variants[path][1])
        and any((path / name).exists() for name in (*CURVES, PROVENANCE))
    ]
    return sorted(found, key=lambda path: (variants[path], len(path.name), path.name))


def _check_place(record: Record, home: Path) -> None:
    optimizer = record.path.relative_to(home).parts[0]
    if (record.problem, record.optimizer) != (home.name, optimizer):
        raise RecordError(
            f"{record.path}: the record inside is of problem {record.problem!r} and optimizer "
            f"{record.optimizer!r}; move it to the directory of that name"
        )
    if record.is_one_seed and [record.path.name] != [f"{SEED_PREFIX}{seed}" for seed in record.seeds]:
        raise RecordError(
            f"{record.path}: the record inside has the seeds {record.seeds}; "
            "move it to the directory of that name"
        )


def _merge(records: Sequence[Record]) -> pd.DataFrame:
    """The records of one variant, each of other seeds, as one table."""
    origins: dict[int, Path] = {}
    for record in records:
        for seed in record.seeds:
            if seed in origins:
                raise RecordError(f"seed {seed} is in both {origins[seed]} and {record.path}; move one away")
            origins[seed] = record.path
        if _settings(record) != _settings(records[0]):
            raise RecordError(
                f"{records[0].path} and {record.path} were trained with different settings; "
                "move away the one that is out of date"
            )
    shared_epochs = min(max(record.curves["epoch"]) for record in records)
    merged = pd.concat([_long_format(record) for record in records])
    return merged.loc[merged["epoch"] <= shared_epochs]


def _settings(record: Record) -> list[Any]:
    """What all seeds of a variant have in common; whether bfloat16 is fast depends on the machine."""
    problem, optimizer, training = (
        config_value(record.provenance, record.path, key) for key in ("problem", "optimizer", "training")
    )
    return [problem, optimizer, {key: value for key, value in training.items() if key != "autocast"}]


def _nothing_found(home: Path, variant: str | None, unfinished: Sequence[str]) -> str:
    command = f"python -m experiments.train -m problem={home.name} optimizer=sgd,adam,kfac,two_level_kfac"
    where = home / "<optimizer>" / (variant or "<variant>")
    if unfinished:
        return f"no finished records in {where}; the same training command resumes them: {command}"
    others = sorted({path.relative_to(home).parts[1] for path in _record_directories(home, None)})
    there = f" (there is: {'; '.join(others)})" if others else ""
    return f"no records in {where}{there}; make them with: {command}"


def _long_format(record: Record) -> pd.DataFrame:
    origin = {
        "problem": record.problem,
        "optimizer": record.optimizer,
        "variant": record.variant,
        "replicas": len(record.seeds),
        "complete": record.complete,
        "label": record.label or "",
        "device": str(record.provenance.get("device", "")),
        "threads": record.provenance.get("threads"),
    }
    columns = pd.DataFrame(origin, index=record.curves.index)
    return pd.concat([columns, record.curves], axis=1)
