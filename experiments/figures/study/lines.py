"""One and two levels along a line of settings: learning rates, depths, weights of the correction."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.markdown import (
    LOST,
    lost,
    markdown_table,
    mean_with_interval,
    number,
    plain,
    range_and_lost,
)
from experiments.figures.statistics import final_losses, final_summary, paired_ratio, seed_table

NEAR_BEST = 1.1  # a setting is good where the median is at most this times the line's lowest
GOALS = (0.05, 0.04)  # training losses that a line's best setting is timed to


def line_table(line: Mapping[Any, pd.DataFrame], x: str) -> pd.DataFrame:
    """``final_summary`` along a line, trainings by the value of ``x``."""
    return pd.DataFrame([{x: value} | final_summary(final_losses(curves)) for value, curves in line.items()])


def good_region(table: pd.DataFrame, x: str, best: float | None = None) -> list[float]:
    """The values of ``x`` whose median is at most ``NEAR_BEST`` times ``best``, the line's own lowest by default."""
    limit = NEAR_BEST * (min(table["median"]) if best is None else best)
    return table.loc[(table["median"] <= limit) & np.isfinite(table["median"]), x].tolist()


def best_of(line: Mapping[Any, pd.DataFrame], seeds: range) -> Any:
    """Where on the line the median final loss over these seeds is lowest.

    Raises:
        ValueError: it is infinite everywhere.
    """
    losses = {value: final_losses(curves).reindex(seeds) for value, curves in line.items()}
    medians = {value: final_summary(own)["median"] for value, own in losses.items()}
    best = min(medians, key=lambda value: medians[value])
    if np.isinf(medians[best]):
        raise ValueError("most seeds diverged in every training of the line")
    return best


def goal_table(arms: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Medians over seeds of the first epoch whose training loss is at most a goal, and of the seconds to its end;
    infinite unless more than half of the seeds reach it."""
    rows = []
    for name, curves in arms.items():
        loss, seconds = seed_table(curves, "train_loss"), seed_table(curves, "seconds")
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
    header = ["arm", "seconds of the run, its seeds side by side"]
    for goal in GOALS:
        header += [f"epochs to {goal}, median", f"seconds to {goal}, median"]
    rows = []
    for row in table.to_dict("records"):
        cells = [row["arm"], number(row["seconds"], "{:.0f}")]
        for goal in GOALS:
            cells += [number(row[f"{name}_{goal}"], "{:.0f}") for name in ("epoch", "seconds")]
        rows.append(cells)
    return markdown_table(header, rows)


def ratio_row(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    """``paired_ratio`` of the final losses of two trainings, both medians (``first_median``, ``second_median``) and
    both numbers of lost seeds (``first_diverged``, ``first_slow`` …)."""
    losses = {"first": final_losses(first), "second": final_losses(second)}
    row: dict[str, Any] = paired_ratio(**losses)
    for name, own in losses.items():
        row |= {f"{name}_{key}": final_summary(own)[key] for key in ("median", "diverged", "slow")}
    return row


def ratio_markdown(table: pd.DataFrame, settings: Mapping[str, str], names: tuple[str, str]) -> str:
    """``ratio_row``s as text after the columns ``settings`` (by their heading)."""
    first, second = names
    header = (
        *settings.values(),
        f"{second}, median",
        f"{first}, median",
        f"{LOST}: {second}, {first}",
        f"{first} / {second} [95% interval]",
        "seeds below",
    )
    rows = [
        (
            *(plain(row[name]) for name in settings),
            number(row["second_median"]),
            number(row["first_median"]),
            f"{lost(row, 'second_')}, {lost(row, 'first_')}",
            mean_with_interval(row["ratio"], row["low"], row["high"], "{:.3f}"),
            f"{row['below']} of {row['seeds']}",
        )
        for row in table.to_dict("records")
    ]
    return markdown_table(header, rows)


def line_markdown(tables: Mapping[str, pd.DataFrame], x: str, heading: str) -> str:
    """Lines of one ``x`` beside each other: median, range and lost seeds of each."""
    header = [heading, *(f"{name}: {what}" for name in tables for what in ("median", "range", LOST))]
    by_value = {name: table.set_index(x) for name, table in tables.items()}
    rows = []
    for value in sorted(set().union(*(table.index for table in by_value.values()))):
        cells = [plain(value)]
        for table in by_value.values():
            if value not in table.index:
                cells += ["-"] * 3
                continue
            row = table.loc[value]
            cells += [number(row["median"]), *range_and_lost(row)]
        rows.append(cells)
    return markdown_table(header, rows)
