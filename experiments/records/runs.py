"""The trainings of one configuration, from one record or from one per seed."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.files import (
    PAPER,
    PARTS,
    SEED_PREFIX,
    NoRecordsError,
    RecordError,
    has_curves,
    is_record,
    read_provenance,
)
from experiments.records.record import Record, load_record, shared_settings

FINAL_EPOCHS = 5
"""The final loss is the mean over these last epochs."""
FULL_BATCH_LOSS = "full_batch_loss"
"""Column of the loss over all training samples as one batch; NaN in most epochs."""
FAILURES = {
    "rejected_samples": "curvature samples that were not finite",
    "failed_inverses": "inverses that could not be computed",
}
"""Columns of curves that count from the first step on, and what they count."""


@dataclass(frozen=True, eq=False)
class Run:
    """The trainings of one configuration, all seeds together.

    Args:
        records: in the order of their seeds, which do not overlap.
    """

    records: Sequence[Record]

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row per (seed, epoch), up to the last epoch that all seeds have."""
        shared = min(max(record.curves["epoch"]) for record in self.records)
        merged = pd.concat([record.curves for record in self.records], ignore_index=True)
        return merged.loc[merged["epoch"] <= shared]

    @property
    def optimizer(self) -> str:
        """Its name, as in the records' path."""
        return self.records[0].optimizer

    @property
    def variant(self) -> str:
        """``paper``, or what differs from the paper's settings."""
        return self.records[0].variant

    @property
    def seeds(self) -> list[int]:
        """All seeds of all records, in order."""
        return sorted(seed for record in self.records for seed in record.seeds)

    @property
    def epochs(self) -> int:
        """The last epoch that all seeds have."""
        return int(max(self.curves["epoch"]))

    @property
    def replicas(self) -> list[int]:
        """How many seeds were trained side by side, record by record."""
        return [len(record.seeds) for record in self.records]

    @property
    def labels(self) -> list[str]:
        """What must be said of these numbers wherever they are shown, such as that they are a preview."""
        return sorted({record.label for record in self.records} - {""})

    @property
    def remarks(self) -> str:
        """The labels, settings other than the paper's, and that it is unfinished."""
        return _listed(record.remark for record in self.records)

    @property
    def machines(self) -> str:
        """What the seconds were measured on."""
        return _listed(record.machine for record in self.records)

    @property
    def failures(self) -> str:
        """How many curvature samples were rejected and inverses failed, over all seeds; empty if none."""
        counts = {what: np.nansum(self._pivot(name).max()) for name, what in FAILURES.items()}
        return " and ".join(f"{count:.0f} {what}" for what, count in counts.items() if count > 0)

    def of_seeds(self, seeds: Iterable[int]) -> "Run":
        """The run without its other seeds."""
        wanted = list(seeds)
        kept = [replace(r, curves=r.curves.loc[r.curves["seed"].isin(wanted)]) for r in self.records]
        return Run([record for record in kept if len(record.curves)])

    def table(self, metric: str) -> pd.DataFrame:
        """``metric`` as a table, epochs by seeds, with NaN from a seed's divergence on, and where there is none.

        A seed has diverged from the first epoch on at which ``metric`` or its training loss is not
        finite, and stays diverged even if later values are finite: an accuracy computed from NaN
        outputs is a number, but means nothing.
        """
        values = self._pivot(metric)
        return values.where(finite_so_far(self._pivot("train_loss")) & finite_so_far(values))

    def final_losses(self) -> pd.Series:
        """The mean training loss over the last ``FINAL_EPOCHS`` epochs by seed; NaN for a diverged seed."""
        return self.table("train_loss").tail(FINAL_EPOCHS).mean(skipna=False)

    def final_test_losses(self, epoch: int | None = None) -> pd.Series:
        """The median test loss over the last ``FINAL_EPOCHS`` epochs by seed, which single spikes leave alone, up to an
        epoch (None: the last one)."""
        return self.table("test_loss").loc[:epoch].tail(FINAL_EPOCHS).median(skipna=False)

    def full_batch_losses(self, epoch: int | None = None) -> pd.Series:
        """The loss over all training samples as one batch, by seed, after an epoch (None: the last one); NaN for a
        diverged seed.

        Raises:
            RecordError: it was not recorded then.
        """
        epoch = self.epochs if epoch is None else epoch
        values = self._pivot(FULL_BATCH_LOSS).reindex([epoch]).loc[epoch]
        alive = finite_so_far(self._pivot("train_loss")).reindex([epoch], fill_value=True).loc[epoch]
        if bool(values.isna().all() and alive.any()):
            raise RecordError(f"{self.records[0].path} has no {FULL_BATCH_LOSS} of epoch {epoch}")
        return values.where(alive & np.isfinite(values))

    def _pivot(self, metric: str) -> pd.DataFrame:
        curves = self.curves if metric in self.curves else self.curves.assign(**{metric: np.nan})
        return curves.pivot(index="epoch", columns="seed", values=metric).sort_index()


def in_common(texts: Mapping[str, str]) -> str:
    """What is said of several things: once if all agree, else ``name: text; ...``."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)


def finite_so_far(table: pd.DataFrame) -> pd.DataFrame:
    """Of values, epochs by seeds, whether the seed's were finite up to here."""
    finite = np.logical_and.accumulate(np.isfinite(table.to_numpy(dtype=float)), axis=0)
    return pd.DataFrame(finite, index=table.index, columns=table.columns)


def load_runs(
    root: str | Path,
    problem: str,
    *,
    variant: str = PAPER,
    optimizer: str | None = None,
    allow_incomplete: bool = False,
) -> dict[str, Run]:
    """The runs of one problem and variant, by optimizer; see ``find_runs``."""
    found = find_runs(root, problem, variant=variant, optimizer=optimizer, allow_incomplete=allow_incomplete)
    return {run.optimizer: run for run in found}


def find_runs(
    root: str | Path,
    problem: str,
    *,
    variant: str | None = None,
    optimizer: str | None = None,
    allow_incomplete: bool = False,
) -> list[Run]:
    """Read the records of one problem, in the order of optimizers and variants.

    Args:
        root: directory that holds ``<problem>/<optimizer>/<variant>/``, each a record or one record
            per seed in ``seed=<s>/``.
        problem: name of the problem.
        variant: name of the variant; None reads them all.
        optimizer: name of the optimizer; None reads them all.
        allow_incomplete: read unfinished records too instead of skipping them with a warning. Seeds
            with a record each are then cut to the epochs that all of them have.

    Raises:
        NoRecordsError: nothing to read; the message says which command makes the records.
        RecordError: a record is damaged, see ``load_record``, or lies in the wrong directory, or the
            seeds of one variant overlap or are of different settings.
    """
    home = Path(root) / problem
    records = defaultdict(list)
    unfinished = []
    for path in _record_directories(home, variant, optimizer):
        complete = read_provenance(path)["complete"]
        if not complete and not (allow_incomplete and has_curves(path)):
            unfinished.append(str(path))
            continue
        record = load_record(path)
        _check_place(record, home)
        records[record.optimizer, record.variant].append(record)
    if unfinished:
        warnings.warn(f"skipped unfinished records: {', '.join(unfinished)}", stacklevel=2)
    if not records:
        raise NoRecordsError(_nothing_found(home, variant, unfinished))
    return [_merge(of_variant) for of_variant in records.values()]


def _record_directories(home: Path, variant: str | None, optimizer: str | None = None) -> list[Path]:
    """In the order of optimizers and variants, and of the seeds as numbers."""
    wanted = "/".join("*" if name is None else escape(name) for name in (optimizer, variant))
    paths = filter(is_record, [*home.glob(wanted), *home.glob(f"{wanted}/{SEED_PREFIX}*")])
    return sorted(paths, key=lambda path: (path.relative_to(home).parts[:2], len(path.name), path.name))


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


def _merge(records: Sequence[Record]) -> Run:
    """The records of one variant, which must be of other seeds and the same settings."""
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
    return Run(records)


def _settings(record: Record) -> dict[str, dict[str, Any]]:
    return shared_settings({part: record.config(part) for part in PARTS})


def _nothing_found(home: Path, variant: str | None, unfinished: Sequence[str]) -> str:
    command = f"python -m experiments.train -m problem={home.name} optimizer=sgd,adam,kfac,two_level_kfac"
    where = home / "<optimizer>" / (variant or "<variant>")
    if unfinished:
        return f"no finished records in {where}; the same training command resumes them: {command}"
    others = sorted({path.relative_to(home).parts[1] for path in _record_directories(home, None)})
    there = f" (there is: {'; '.join(others)})" if others else ""
    return f"no records in {where}{there}; make them with: {command}"


def _listed(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(filter(None, texts)))
