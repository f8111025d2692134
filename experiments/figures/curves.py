"""Curves of several optimizers on one Axes: the mean over seeds, and a band for its 95% interval.

Every function takes the long table of ``load_records``: one problem, one variant per optimizer.
The axes span the values of the single seeds; the band of a few seeds far apart may run out of them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from experiments.figures.long_table import by_optimizer
from experiments.figures.statistics import seed_interval, seed_table
from experiments.figures.style import Style, optimizer_styles

METRIC_LABELS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
}
Styles = Mapping[str, Style]
Row = dict[Any, Any]


class PlainLogFormatter(LogFormatter):
    """Matplotlib's choice of labels on a logarithmic axis, as plain numbers: 0.4 for 4 × 10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


FAILURES = {
    "rejected_samples": "curvature samples that were not finite",
    "failed_inverses": "inverses that could not be computed",
}
"""Columns of a record that count from the first step on, and what they count."""


def loss_against_epochs(
    axes: Axes, frame: pd.DataFrame, metric: str = "train_loss", styles: Styles | None = None
) -> None:
    """A loss on a logarithmic axis; line and band are computed on the logarithm of the loss."""
    _draw(axes, frame, metric, "epoch", styles, log=True)
    _label_epochs(axes)


def loss_against_seconds(
    axes: Axes, frame: pd.DataFrame, metric: str = "train_loss", styles: Styles | None = None
) -> None:
    """A loss on a logarithmic axis against training time: of the run with all its seeds side by side,
    or of one seed (the mean over seeds) where each is trained alone."""
    _draw(axes, frame, metric, "seconds", styles, log=True)
    replicas = sorted(set(frame["replicas"]))
    trained = "one seed's training" if replicas == [1] else f"{_range_of_seeds(replicas)} side by side"
    axes.set_xlabel(f"wall-clock time of {trained} [s]")


def accuracy_against_epochs(
    axes: Axes, frame: pd.DataFrame, metric: str, styles: Styles | None = None
) -> None:
    """An accuracy in percent on a linear axis."""
    _draw(axes, frame, metric, "epoch", styles, log=False)
    _label_epochs(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def seed_counts(frame: pd.DataFrame) -> str:
    """The number of seeds per optimizer in words: ``5 seeds``, or ``2 to 5 seeds``."""
    return _range_of_seeds(_seeds_by_optimizer(frame).values())


def remarks(frame: pd.DataFrame) -> str:
    """What a figure must say of its records: label, settings other than the paper's, unfinished."""

    def of_record(row: Row) -> str:
        variant = "" if row["variant"] == "paper" else row["variant"].replace(",", ", ")
        unfinished = "" if row["complete"] else "incomplete"
        return ", ".join(filter(None, (row["label"], variant, unfinished)))

    return _common_or_listed(frame, of_record)


def failures(frame: pd.DataFrame) -> str:
    """A sentence on the records with rejected curvature samples or failed inverses; empty where there are none, or
    none were counted."""
    styles = optimizer_styles(frame["optimizer"])
    texts = []
    for (name, variant), curves in frame.groupby(["optimizer", "variant"], sort=False):  # pyright: ignore
        latest = {column: curves.groupby("seed")[column].max() for column in FAILURES if column in frame}
        totals = {column: np.nansum(np.asarray(counts, dtype=float)) for column, counts in latest.items()}
        numbers = [f"{total:.0f} {FAILURES[column]}" for column, total in totals.items() if total > 0]
        if numbers:
            which = styles[str(name)].label + ("" if str(variant) == "paper" else f", {variant}")
            texts.append(f"{which}: {' and '.join(numbers)}")
    return f"Over all seeds, {'; '.join(texts)}." if texts else ""


def machines(frame: pd.DataFrame) -> str:
    """What the seconds were measured on: ``cpu, 1 thread``."""

    def of_record(row: Row) -> str:
        threads = "" if pd.isna(row["threads"]) else _plural(int(row["threads"]), "thread")
        return ", ".join(filter(None, (row["device"], threads)))

    return _common_or_listed(frame, of_record)


def _common_or_listed(frame: pd.DataFrame, describe: Callable[[Row], str]) -> str:
    """What ``describe`` says of the records: once if all agree, else ``optimizer: text; ...``.

    An optimizer whose seeds disagree has all its texts, ``text / text``.
    """
    records = by_optimizer(frame)
    texts = {}
    for name, style in optimizer_styles(records).items():
        one_row_per_seed = records[name].drop_duplicates("seed").to_dict("records")
        texts[style.label] = " / ".join(dict.fromkeys(filter(None, map(describe, one_row_per_seed))))
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{label}: {text}" for label, text in texts.items() if text)


def _seeds_by_optimizer(frame: pd.DataFrame) -> dict[str, int]:
    return {name: len(set(curves["seed"])) for name, curves in by_optimizer(frame).items()}


def _range_of_seeds(counts: Collection[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} to {high} seeds" if low < high else _plural(high, "seed")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _draw(axes: Axes, frame: pd.DataFrame, metric: str, x: str, styles: Styles | None, *, log: bool) -> None:
    records = by_optimizer(frame)
    seeds = _seeds_by_optimizer(frame)
    differing = len(set(seeds.values())) > 1
    tables = []
    noted = False
    for name, style in (styles or optimizer_styles(records)).items():
        if name not in records:
            continue
        _refuse_variants(name, records[name])
        table = seed_table(records[name], metric)
        interval = seed_interval(table, log=log)
        position = seed_table(records[name], x).mean(axis=1)
        count = _plural(seeds[name], "seed") if differing else ""
        note = _diverged(interval) or count
        noted = noted or bool(note)
        label = f"{style.label} ({note})" if note else style.label
        axes.plot(position, interval["mean"], style.linestyle, color=style.color, label=label)
        band = (interval["low"], interval["high"])
        axes.fill_between(position, *band, color=style.color, alpha=0.2, linewidth=0)
        tables.append(table)
    axes.set_yscale("log" if log else "linear")
    if log:
        axes.yaxis.set_major_formatter(PlainLogFormatter())
        axes.yaxis.set_minor_formatter(PlainLogFormatter())
    axes.margins(x=0)
    axes.set_xlim(left=0)
    axes.set_ylim(_limits(tables, log=log))
    axes.set_ylabel(METRIC_LABELS.get(metric, metric))
    mean = "geometric mean" if log else "mean"
    add_legend(axes, f"{mean} and 95% interval, {seed_counts(frame)}", columns=1 if noted else 2)


def add_legend(axes: Axes, title: str, columns: int) -> None:
    """Below the label of the x axis, where no curve can be."""
    below = ScaledTranslation(0, -0.38, axes.figure.dpi_scale_trans)
    axes.legend(
        title=title,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axes.transAxes + below,
        borderaxespad=0,
        ncols=columns,
    )


def _label_epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


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
    return f"{excluded} of {total} seeds diverged" if excluded else ""
