"""A grid search's records as one table, each optimizer's winner by a stated rule, and text."""

import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.figures.curves import Runs
from experiments.figures.markdown import (
    Columns,
    Row,
    column,
    interval,
    markdown_table,
    paragraphs,
    plain,
    setting,
)
from experiments.figures.statistics import (
    final_summary,
    paired_difference,
    seed_interval,
)
from experiments.figures.style import optimizer_styles
from experiments.records import FINAL_EPOCHS, NoRecordsError, RecordError, Run, load_runs
from experiments.records.files import (
    FAILURE,
    PROVENANCE,
    check_numbers,
    read_failure,
    read_provenance,
    read_table,
)

COMPLETE = "complete"
NUMBERS = ("diverged", "median", "mean", "low", "high", "lowest", "highest")
RULE = (
    f"Final loss: the mean training loss of a seed over its last {FINAL_EPOCHS} epochs. The winner of an optimizer is "
    "the configuration with the lowest median over all seeds, in which a diverged seed counts as infinite, so that "
    "no configuration gains by a seed that fails; of equal medians the one with fewer diverged seeds, then the "
    "first of the grid. The mean and its 95% Student-t interval leave diverged seeds out, and decide nothing. Winners "
    "are chosen and compared on the same seeds, which flatters them, the more the larger their grid."
)


LOSSES: Columns = [
    ("median", column("median", "{:.4f}")),
    ("mean [95% interval]", interval("mean", prefix="")),
    ("diverged", lambda row: column("diverged", f"{{:.0f}} of {row.get('seeds')}")(row)),
]


class Point(NamedTuple):
    """One configuration of a grid: where its records are, which ``seeds`` it trains, the swept ``settings``
    by their name (``{"lr": 0.01, "momentum": 0.9}``), and the ``config`` that its records must have."""

    optimizer: str
    variant: str
    seeds: list[int]
    settings: dict[str, Any]
    config: dict[str, Any] = {}


def grid_table(root: str | Path, problem: str, points: Sequence[Point]) -> pd.DataFrame:
    """One row per point, sorted by optimizer (in the order of the legend) and ``median``.

    Columns: ``optimizer``, the swept settings (NaN where an optimizer has no such setting, ``"none"`` where it
    is None), number of
    ``seeds``, of these ``diverged``, ``median``, ``mean``, ``low``, ``high``, ``lowest``, ``highest`` of the final
    loss over seeds (see ``RULE``), ``status``: complete, incomplete, missing or failed with its reason,
    ``variant`` and the records' ``label``. Numbers are NaN unless the status is complete.

    Raises:
        RecordError: a record is damaged, see ``load_runs``, or has other settings than the point.
    """
    rows = [_row(Path(root), problem, point) for point in points]
    table = pd.DataFrame(rows).reset_index(names="place")
    order = list(optimizer_styles(table["optimizer"]))
    table["rank"] = table["optimizer"].map(order.index)
    settings = list(dict.fromkeys(name for point in points for name in point.settings))
    columns = ["optimizer", *settings, "seeds", *NUMBERS, "status", "variant", "label"]
    table = table.sort_values(["rank", "median", "diverged", "place"], ignore_index=True)
    return table.loc[:, columns]


def read_grid_table(path: str | Path) -> pd.DataFrame:
    """``grid_table`` as ``experiments.select`` writes it.

    Raises:
        NoRecordsError: there is none.
        RecordError: it is damaged.
    """
    path = Path(path)
    command = (
        f"python -m experiments.select sweep={path.stem} problem={path.parent.name} runs={path.parents[1]}"
    )
    remedy = f"make it with: {command}"
    table = read_table(path, remedy)
    check_numbers(path, table, ("seeds", *NUMBERS), remedy)
    if missing := {"optimizer", "status", "variant", "label"} - set(table.columns):
        raise RecordError(f"{path} lacks the columns {', '.join(sorted(missing))}; {remedy}")
    if table.empty:
        raise RecordError(f"{path} has no rows; {remedy}")
    return table.astype({"label": object}).fillna({"label": ""})


def winners(table: pd.DataFrame) -> dict[str, Row]:
    """Each optimizer's winner so far by ``RULE``, its row; none where every configuration's median is infinite."""
    finite = table.loc[np.isfinite(table["median"].astype(float))]
    return {row["optimizer"]: row for row in finite.drop_duplicates("optimizer").to_dict("records")}


def is_decided(table: pd.DataFrame, optimizer: str) -> bool:
    """Whether every configuration of the optimizer has been trained, or has failed."""
    statuses = table.loc[table["optimizer"] == optimizer, "status"]
    return all(status == COMPLETE or status.startswith("failed") for status in statuses)


def winning_runs(root: str | Path, problem: str, table: pd.DataFrame) -> dict[str, Run]:
    """The winners' runs by optimizer.

    Raises:
        NoRecordsError: there is no winner.
    """
    best = winners(table)
    if not best:
        raise NoRecordsError(f"no configuration of the grid has a finite loss in {Path(root) / problem}")
    runs: dict[str, Run] = {}
    for name, winner in best.items():
        runs |= load_runs(root, problem, optimizer=name, variant=winner["variant"])
    return runs


def grid_markdown(title: str, table: pd.DataFrame, best: Runs | None) -> str:
    """The table as text, an optimizer at a time, the winners, and these paired with each other.

    ``best``: the winners' runs (``winning_runs``), None if there are none.
    """
    labels = {name: style.label for name, style in optimizer_styles(table["optimizer"]).items()}
    return paragraphs(
        f"## {title}",
        *(f"**{label}**" for label in labels_of(table)),
        RULE,
        _winner_text(table, labels),
        _pairs_text(best or {}, labels),
        *(
            text
            for name, label in labels.items()
            for text in (f"### {label}", _optimizer_text(table.loc[table["optimizer"] == name]))
        ),
    )


def labels_of(table: pd.DataFrame) -> list[str]:
    """What must be said of the rows' records wherever they are shown."""
    return sorted(set(table["label"]) - {""})


def _row(root: Path, problem: str, point: Point) -> dict[str, Any]:
    settings = {name: "none" if value is None else value for name, value in point.settings.items()}
    row = {"optimizer": point.optimizer, **settings, "seeds": len(point.seeds), "variant": point.variant}
    home = root / problem / point.optimizer / point.variant
    _check_settings(home, point)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unfinished records: the status says so
            runs = load_runs(root, problem, optimizer=point.optimizer, variant=point.variant)
    except NoRecordsError:
        return row | _no_numbers(_what_is_there(home, "missing"))
    run = runs[point.optimizer].of_seeds(point.seeds)
    if len(run.seeds) < len(point.seeds):
        return row | _no_numbers(_what_is_there(home, "incomplete"))
    return row | _numbers(run.final_losses()) | {"status": COMPLETE, "label": " / ".join(run.labels)}


def _check_settings(home: Path, point: Point) -> None:
    """A directory's name says only what differed from the recipe of its day."""
    for path in sorted(home.rglob(PROVENANCE)):
        found = read_provenance(path.parent).get("config", {})
        for part, asked in point.config.items():
            there = found.get(part, {})
            wrong = [
                f"{part}.{key}={there[key]}"
                for key in asked.keys() & there.keys()
                if there[key] != asked[key]
            ]
            if wrong:
                raise RecordError(f"{path.parent} was trained with {', '.join(sorted(wrong))}: move it away")


def _numbers(losses: pd.Series) -> dict[str, Any]:
    interval = seed_interval(losses.to_frame().T).iloc[0]
    return final_summary(losses) | {name: interval[name] for name in ("mean", "low", "high")}


def _no_numbers(status: str) -> dict[str, Any]:
    return dict.fromkeys(NUMBERS, np.nan) | {"status": status, "label": ""}


def _what_is_there(home: Path, otherwise: str) -> str:
    for failure in sorted(home.rglob(FAILURE)):
        return f"failed: {read_failure(failure)}"
    return "incomplete" if list(home.rglob(PROVENANCE)) else otherwise


def _winner_text(table: pd.DataFrame, labels: dict[str, str]) -> str:
    best = winners(table)
    rows = []
    for name, label in labels.items():
        statuses = list(table.loc[table["optimizer"] == name, "status"])
        row = {"label": label, "progress": f"{statuses.count(COMPLETE)} of {len(statuses)}", "winner": "none"}
        if name in best:
            so_far = "" if is_decided(table, name) else " (so far)"
            row = {**best[name], **row, "winner": _settings_text(best[name], table) + so_far}
        rows.append(row)
    columns = [("optimizer", column("label")), ("winner", column("winner")), *LOSSES]
    return markdown_table(rows, [*columns, ("configurations trained", column("progress"))])


def _pairs_text(best: Runs, labels: dict[str, str]) -> str:
    """The winners' final losses against each other."""
    losses = {name: best[name].final_losses() for name in labels if name in best}
    rows = [
        {"pair": f"{labels[first]} - {labels[second]}"} | paired_difference(losses[first], losses[second])
        for second, first in combinations(losses, 2)
    ]
    difference = "mean difference of the final losses, paired by seed [95% interval]"
    columns = [
        ("winners", column("pair")),
        (difference, interval("difference", prefix="")),
        ("shared seeds", column("seeds")),
    ]
    return markdown_table(rows, columns) if rows else ""


def _optimizer_text(own: pd.DataFrame) -> str:
    settings = [name for name in setting_names(own) if not all(own[name].isna())]
    columns = [*((name, setting(name)) for name in settings), *LOSSES]
    status = ("status", lambda row: row["status"].replace("|", "\\|"))
    return markdown_table(own.to_dict("records"), [*columns, status])


def setting_names(table: pd.DataFrame) -> list[str]:
    """The swept settings' columns."""
    columns = list(table.columns)
    return columns[1 : columns.index("seeds")]


def _settings_text(row: Row, table: pd.DataFrame) -> str:
    return ", ".join(f"{name} {plain(row[name])}" for name in setting_names(table) if pd.notna(row[name]))
