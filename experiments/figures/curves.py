"""Curves of several runs on one Axes: the mean over seeds, and a band for its 95% interval.

Every function takes runs by the keys of their styles, the optimizers' names by default.
The axes span the values of the single seeds; the band of a few seeds far apart may run out of them.
"""

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from experiments.figures.statistics import seed_interval
from experiments.figures.style import Style, optimizer_styles
from experiments.records import Run
from experiments.records.runs import in_common

METRIC_LABELS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
}
Runs = Mapping[str, Run]
Styles = Mapping[str, Style]


class PlainLogFormatter(LogFormatter):
    """Matplotlib's choice of labels on a logarithmic axis, as plain numbers: 0.4 for 4 × 10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plain_log(axes: Axes, which: str) -> None:
    """Logarithmic axes (``x``, ``y`` or ``xy``) with plain numbers."""
    for name in which:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_formatter(PlainLogFormatter())
        axis.set_minor_formatter(PlainLogFormatter())


def loss_against_epochs(
    axes: Axes, runs: Runs, metric: str = "train_loss", styles: Styles | None = None
) -> None:
    """A loss on a logarithmic axis; line and band are computed on the logarithm of the loss."""
    _draw(axes, runs, metric, "epoch", styles, log=True)
    _label_epochs(axes)


def loss_against_seconds(
    axes: Axes, runs: Runs, metric: str = "train_loss", styles: Styles | None = None
) -> None:
    """A loss on a logarithmic axis against training time: of the run with all its seeds side by side,
    or of one seed (the mean over seeds) where each is trained alone."""
    _draw(axes, runs, metric, "seconds", styles, log=True)
    replicas = {count for run in runs.values() for count in run.replicas}
    trained = "one seed's training" if replicas == {1} else f"{_range_of_seeds(replicas)} side by side"
    axes.set_xlabel(f"wall-clock time of {trained} [s]")


def accuracy_against_epochs(axes: Axes, runs: Runs, metric: str, styles: Styles | None = None) -> None:
    """An accuracy in percent on a linear axis."""
    _draw(axes, runs, metric, "epoch", styles, log=False)
    _label_epochs(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def seed_counts(runs: Runs) -> str:
    """The number of seeds per run in words: ``5 seeds``, or ``2 to 5 seeds``."""
    return _range_of_seeds([len(run.seeds) for run in runs.values()])


def remarks(runs: Runs) -> str:
    """What a figure must say of these optimizers' records: label, settings other than the paper's, unfinished."""
    return in_common({style.label: runs[name].remarks for name, style in optimizer_styles(runs).items()})


def machines(runs: Runs) -> str:
    """What these optimizers' seconds were measured on: ``cpu, 1 thread``."""
    return in_common({style.label: runs[name].machines for name, style in optimizer_styles(runs).items()})


def failures(runs: Runs) -> str:
    """A sentence on the runs, by their labels, with rejected curvature samples or failed inverses; empty if none."""
    texts = [f"{label}: {run.failures}" for label, run in runs.items() if run.failures]
    return f"Over all seeds, {'; '.join(texts)}." if texts else ""


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


def _draw(axes: Axes, runs: Runs, metric: str, x: str, styles: Styles | None, *, log: bool) -> None:
    looks = styles or optimizer_styles(runs)
    differing = len({len(run.seeds) for run in runs.values()}) > 1
    tables, bands = [], []
    noted = False
    for name, style in looks.items():
        if name not in runs:
            continue
        table = runs[name].table(metric)
        interval = seed_interval(table, log=log)
        position = runs[name].table(x).mean(axis=1)
        count = _plural(table.shape[1], "seed") if differing else ""
        note = _diverged(interval) or count
        noted = noted or bool(note)
        label = f"{style.label} ({note})" if note else style.label
        axes.plot(position, interval["mean"], style.linestyle, color=style.color, label=label)
        band = (interval["low"], interval["high"])
        axes.fill_between(position, *band, color=style.color, alpha=0.2, linewidth=0)
        tables.append(table)
        bands.append(interval[["low", "high"]])
    if log:
        plain_log(axes, "y")
    axes.margins(x=0)
    axes.set_xlim(left=0)
    limits = _limits(tables, log=log)
    axes.set_ylim(limits)
    axes.set_ylabel(METRIC_LABELS.get(metric, metric))
    mean = "geometric mean" if log else "mean"
    said = f"{mean} and 95% interval, {seed_counts(runs)}{_cut(bands, limits)}"
    add_legend(axes, said, columns=1 if noted else 2)


def _range_of_seeds(counts: Collection[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} to {high} seeds" if low < high else _plural(high, "seed")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _label_epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _limits(tables: list[pd.DataFrame], *, log: bool) -> tuple[float, float]:
    """Limits of the y axis: all values of the seeds that it can show, and a margin; 0.1 to 1 if there is none."""
    values = np.concatenate([table.to_numpy().ravel() for table in tables])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if values.size == 0:
        return 0.1, 1.0
    low, high = values.min(), values.max()
    if log:
        return low / 1.3, high * 1.3
    margin = 0.03 * (high - low) or 0.01
    return low - margin, high + margin


def _cut(bands: list[pd.DataFrame], limits: tuple[float, float]) -> str:
    """Intervals reach beyond the seeds that they are of, and the axis shows the seeds."""
    low, high = limits
    outside = any(bool(((band < low) | (band > high)).any(axis=None)) for band in bands)
    return "\n(some intervals go beyond the axis)" if outside else ""


def _diverged(interval: pd.DataFrame) -> str:
    excluded = interval["excluded"].iloc[-1]
    total = excluded + interval["seeds"].iloc[-1]
    return f"{excluded} of {total} seeds diverged" if excluded else ""
