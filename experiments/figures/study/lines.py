"""One and two levels along a line of settings: learning rates, depths, weights of the correction."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.curves import Runs
from experiments.figures.markdown import (
    LOST,
    RANGE,
    Cell,
    Columns,
    column,
    interval,
    lost,
    markdown_table,
    setting,
)
from experiments.figures.statistics import final_summary, paired_ratio
from experiments.records import Run

NEAR_BEST = 1.1  # a setting is good where the median is at most this times the line's lowest
GOALS = (0.05, 0.04)  # training losses that a line's best setting is timed to


def line_table(line: Mapping[Any, Run], x: str) -> pd.DataFrame:
    """``final_summary`` along a line, trainings by the value of ``x``."""
    return pd.DataFrame([{x: value} | final_summary(run.final_losses()) for value, run in line.items()])


def good_region(table: pd.DataFrame, x: str, best: float | None = None) -> list[float]:
    """The values of ``x`` whose median is at most ``NEAR_BEST`` times ``best``, the line's own lowest by default."""
    limit = NEAR_BEST * (min(table["median"]) if best is None else best)
    return table.loc[(table["median"] <= limit) & np.isfinite(table["median"]), x].tolist()


def best_of(line: Mapping[Any, Run], seeds: range) -> Any:
    """Where on the line the median final loss over these seeds is lowest.

    Raises:
        ValueError: it is infinite everywhere.
    """
    losses = {value: run.final_losses().reindex(seeds) for value, run in line.items()}
    medians = {value: final_summary(own)["median"] for value, own in losses.items()}
    best = min(medians, key=lambda value: medians[value])
    if np.isinf(medians[best]):
        raise ValueError("most seeds diverged in every training of the line")
    return best


def goal_table(arms: Runs) -> pd.DataFrame:
    """Medians over seeds of the first epoch whose training loss is at most a goal, and of the seconds to its end;
    infinite unless more than half of the seeds reach it."""
    rows = []
    for name, run in arms.items():
        loss, seconds = run.table("train_loss"), run.table("seconds")
        row: dict[str, Any] = {"arm": name, "seconds": seconds.iloc[-1].median()}
        for goal in GOALS:
            reached = loss <= goal
            first = reached.idxmax().where(reached.any())
            times = pd.Series({seed: seconds[seed].get(epoch, np.inf) for seed, epoch in first.items()})
            row |= {
                f"epoch_{goal}": first.fillna(np.inf).median(),
                f"seconds_{goal}": times.fillna(np.inf).median(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def goal_markdown(table: pd.DataFrame) -> str:
    columns = [
        ("arm", column("arm")),
        ("seconds of the run, its seeds side by side", column("seconds", "{:.0f}")),
    ]
    columns += [
        (f"{names} to {goal}, median", column(f"{key}_{goal}", "{:.0f}"))
        for goal in GOALS
        for key, names in (("epoch", "epochs"), ("seconds", "seconds"))
    ]
    return markdown_table(table.to_dict("records"), columns)


def ratio_row(first: Run, second: Run) -> dict[str, Any]:
    """``paired_ratio`` of the final losses of two trainings, both medians (``first_median``, ``second_median``) and
    both numbers of lost seeds (``first_diverged``, ``first_slow`` …)."""
    losses = {"first": first.final_losses(), "second": second.final_losses()}
    row: dict[str, Any] = paired_ratio(**losses)
    for name, own in losses.items():
        row |= {f"{name}_{key}": final_summary(own)[key] for key in ("median", "diverged", "slow")}
    return row


def ratio_markdown(table: pd.DataFrame, settings: Mapping[str, str], names: tuple[str, str]) -> str:
    """``ratio_row``s as text after the columns ``settings`` (by their heading)."""
    first, second = names
    columns: Columns = [
        *((heading, setting(name)) for name, heading in settings.items()),
        (f"{second}, median", column("second_median", "{:.4f}")),
        (f"{first}, median", column("first_median", "{:.4f}")),
        (f"{LOST}: {second}, {first}", lambda row: f"{lost('second_')(row)}, {lost('first_')(row)}"),
        (f"{first} / {second} [95% interval]", interval("ratio", "{:.3f}", prefix="")),
        ("seeds below", lambda row: f"{row['below']} of {row['seeds']}"),
    ]
    return markdown_table(table.to_dict("records"), columns)


def line_markdown(tables: Mapping[str, pd.DataFrame], x: str, heading: str) -> str:
    """Lines of one ``x`` beside each other: median, range and lost seeds of each."""
    rows: dict[Any, dict[str, Any]] = {}
    for name, table in tables.items():
        for row in table.to_dict("records"):
            rows.setdefault(row[x], {x: row[x]})[name] = row
    columns: Columns = [
        (heading, setting(x)),
        *(
            (f"{name}: {what}", _part(name, cell))
            for name in tables
            for what, cell in (("median", column("median", "{:.4f}")), *RANGE)
        ),
    ]
    return markdown_table([rows[value] for value in sorted(rows)], columns)


def _part(name: str, cell: Cell) -> Cell:
    """Of a row of rows."""
    return lambda row: cell(row[name]) if name in row else "-"
