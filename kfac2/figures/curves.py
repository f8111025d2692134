"""Curves of several optimizers on one Axes: the mean over seeds, and a band for its 95% interval.

Every function takes the long table of ``load_records``: one problem, one record per optimizer.
The axes span the values of the single seeds; the band of a few seeds far apart may run out of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from kfac2.figures.records import by_optimizer
from kfac2.figures.statistics import seed_interval, seed_table
from kfac2.figures.style import Style, optimizer_styles

METRIC_LABELS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
}
Styles = Mapping[str, Style]


def loss_against_epochs(
    axes: Axes, frame: pd.DataFrame, metric: str = "train_loss", styles: Styles | None = None
) -> None:
    """A loss on a logarithmic axis; line and band are computed on the logarithm of the loss."""
    _draw(axes, frame, metric, "epoch", styles, log=True)
    axes.set_xlabel("epoch")


def loss_against_seconds(
    axes: Axes, frame: pd.DataFrame, metric: str = "train_loss", styles: Styles | None = None
) -> None:
    """A loss on a logarithmic axis against the training time of the run with all its seeds."""
    _draw(axes, frame, metric, "seconds", styles, log=True)
    axes.set_xlabel(f"wall-clock time of {seed_counts(frame)} side by side [s]")


def accuracy_against_epochs(
    axes: Axes, frame: pd.DataFrame, metric: str, styles: Styles | None = None
) -> None:
    """An accuracy in percent on a linear axis."""
    _draw(axes, frame, metric, "epoch", styles, log=False)
    axes.set_xlabel("epoch")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def seed_counts(frame: pd.DataFrame) -> str:
    """The number of seeds per optimizer in words: ``5 seeds``, or ``2 to 5 seeds``."""
    counts = {len(set(curves["seed"])) for curves in by_optimizer(frame).values()}
    if len(counts) > 1:
        return f"{min(counts)} to {max(counts)} seeds"
    return _plural(counts.pop(), "seed")


def remarks(frame: pd.DataFrame) -> str:
    """What a figure must say of its records: label, settings other than the paper's, unfinished."""

    def of_record(row: dict[str, Any]) -> str:
        variant = "" if row["variant"] == "paper" else row["variant"]
        unfinished = "" if row["complete"] else "incomplete"
        return ", ".join(filter(None, (row["label"], variant, unfinished)))

    return _common_or_listed(frame, of_record)


def machines(frame: pd.DataFrame) -> str:
    """What the seconds were measured on: ``cpu, 1 thread``."""

    def of_record(row: dict[str, Any]) -> str:
        threads = "" if pd.isna(row["threads"]) else _plural(int(row["threads"]), "thread")
        return ", ".join(filter(None, (row["device"], threads)))

    return _common_or_listed(frame, of_record)


def _common_or_listed(frame: pd.DataFrame, describe: Callable[[dict[str, Any]], str]) -> str:
    """What ``describe`` says of each record: once if they agree, else ``optimizer: text; ...``."""
    records = by_optimizer(frame)
    texts = {
        style.label: describe(records[name].iloc[:1].to_dict("records")[0])
        for name, style in optimizer_styles(records).items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{label}: {text}" for label, text in texts.items() if text)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _draw(axes: Axes, frame: pd.DataFrame, metric: str, x: str, styles: Styles | None, *, log: bool) -> None:
    records = by_optimizer(frame)
    tables = []
    for name, style in (styles or optimizer_styles(records)).items():
        if name not in records:
            continue
        _refuse_variants(name, records[name])
        table = seed_table(records[name], metric)
        interval = seed_interval(table, log=log)
        position = seed_table(records[name], x).mean(axis=1)
        label = style.label + _diverged(interval)
        axes.plot(position, interval["mean"], style.linestyle, color=style.color, label=label)
        band = (interval["low"], interval["high"])
        axes.fill_between(position, *band, color=style.color, alpha=0.2, linewidth=0)
        tables.append(table)
    axes.set_yscale("log" if log else "linear")
    axes.set_xlim(0, max(frame[x]))
    axes.set_ylim(_limits(tables, log=log))
    axes.set_ylabel(METRIC_LABELS.get(metric, metric))
    mean = "geometric mean" if log else "mean"
    axes.legend(title=f"{mean} and 95% interval, {seed_counts(frame)}", alignment="left")


def _refuse_variants(name: str, curves: pd.DataFrame) -> None:
    variants = sorted(set(curves["variant"]))
    if len(variants) > 1:
        raise ValueError(f"{name} has the variants {', '.join(variants)}; draw one at a time")


def _limits(tables: list[pd.DataFrame], *, log: bool) -> tuple[float, float]:
    """Limits of the y axis: all values of the seeds and a margin; 0.1 to 1 if none is finite."""
    values = np.concatenate([table.to_numpy().ravel() for table in tables])
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.1, 1.0
    low, high = values.min(), values.max()
    if log:
        return low / 1.3, high * 1.3
    margin = 0.03 * (high - low) or 0.01
    return low - margin, high + margin


def _diverged(interval: pd.DataFrame) -> str:
    excluded = interval["excluded"].iloc[-1]
    total = excluded + interval["seeds"].iloc[-1]
    return f" ({excluded} of {total} seeds diverged)" if excluded else ""
