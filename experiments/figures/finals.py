"""The end of training an image classifier: losses, accuracies, costs, and the optimizers' order."""

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.curves import Runs, failures, machines, seed_counts
from experiments.figures.figures import Panel
from experiments.figures.markdown import Columns, column, interval, markdown_table, number, paragraphs
from experiments.figures.statistics import paired_difference, seed_interval, seed_median
from experiments.figures.style import optimizer_styles
from experiments.records import Run

METRICS = ("train_loss", "train_accuracy", "test_accuracy")
PERCENT = "{:.1%}"
RESULTS: Columns = [
    ("optimizer", column("name")),
    ("seeds", column("seeds")),
    ("diverged", column("diverged")),
    ("epochs", column("epochs")),
    ("training loss, median", column("train_loss_median", "{:.4f}")),
    ("mean [95% interval]", interval("train_loss_mean", prefix="train_loss_")),
    ("training accuracy", interval("train_accuracy_mean", PERCENT, prefix="train_accuracy_")),
    ("test accuracy", interval("test_accuracy_mean", PERCENT, prefix="test_accuracy_")),
    ("best test accuracy", column("best_test_accuracy", PERCENT)),
]
COSTS: Columns = [
    ("optimizer", column("name")),
    ("seconds per training", column("seconds", "{:.1f}")),
    ("ν, mean of the run", column("nu", "{:.3f}")),
    ("coarse ratio at the end", column("coarse_ratio", "{:.3f}")),
    ("steps with an indefinite coarse matrix", column("coarse_indefinite", "{:.0%}")),
]
PAIRS: Columns = [
    ("neighbours", lambda row: "{higher} - {lower}".format_map(row)),
    ("intervals overlap", lambda row: {None: "-", False: "no", True: "yes"}[row["overlap"]]),
    ("difference paired by seed [95% interval]", interval("difference", prefix="")),
    ("shared seeds", column("seeds")),
]


def final_table(runs: Runs) -> pd.DataFrame:
    """The last epoch, one row per run, over the seeds that have not diverged.

    Columns: ``name``, number of ``seeds``, of these ``diverged``, ``epochs``; mean and
    95% Student-t interval ``<metric>_mean``, ``_low``, ``_high`` of each of ``METRICS``;
    ``train_loss_median``, in which a diverged seed counts as +inf; means over seeds of the
    ``best_test_accuracy`` over epochs, of the ``seconds`` of a training, of ``nu`` and ``coarse_indefinite``
    over the run and of ``coarse_ratio`` at the end. What is not there is NaN.
    """
    return pd.DataFrame([{"name": name} | _final_row(run) for name, run in runs.items()])


def order_table(runs: Runs) -> pd.DataFrame:
    """The runs in the order of their mean training loss at the last epoch, each with the next.

    One row per neighbouring pair: ``lower`` and ``higher`` loss, whether their 95% intervals
    ``overlap`` (None where one seed has none), and the mean ``difference`` with its 95% interval
    (``low``, ``high``) over the ``seeds`` that both have, paired by seed. A run whose seeds have
    all diverged has no place.
    """
    ends = _ends(runs)
    ordered = _ordered_intervals(ends).dropna(subset="mean").to_dict("index")
    rows = []
    for lower, higher in pairwise(ordered):
        bounds = ordered[lower]["high"], ordered[higher]["low"]
        overlap = None if np.isnan(bounds).any() else bounds[0] >= bounds[1]
        row = {"lower": lower, "higher": higher, "overlap": overlap}
        rows.append(row | paired_difference(ends[higher], ends[lower]))
    columns = ["lower", "higher", "overlap", "difference", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def final_markdown(panel: Panel, controls: Runs | None = None) -> str:
    """``final_table`` and ``order_table`` of a panel's runs as text.

    ``controls``: runs with other settings, which get rows in the table and no place in the order.
    """
    controls = controls or {}
    named, shown = {}, {}
    for name, style in optimizer_styles([*panel.runs, *controls]).items():
        if name in panel.runs:
            named[style.label] = shown[style.label] = panel.runs[name]
        if name in controls:
            shown[f"{style.label}, {controls[name].variant}"] = controls[name]
    finals = final_table(shown).to_dict("records")
    return paragraphs(
        f"## {panel.title}",
        f"**{panel.remarks}**" if panel.remarks else "",
        f"The last epoch over {seed_counts(panel.runs)}. Means and their 95% intervals leave diverged seeds "
        "out, the median counts them as infinite. Training loss and accuracy are averages over the epoch, on "
        "augmented images; the best test accuracy is that of each seed's best epoch.",
        markdown_table(finals, RESULTS),
        failures(shown),
        _order_text(named),
        f"Training passes alone ({machines(panel.runs)}), mean over seeds.",
        markdown_table(finals, COSTS),
    )


def _ends(runs: Runs) -> dict[str, pd.Series]:
    """Each run's training losses at its last epoch, by seed; NaN for a diverged one."""
    return {name: run.table("train_loss").iloc[-1] for name, run in runs.items()}


def _ordered_intervals(ends: dict[str, pd.Series]) -> pd.DataFrame:
    """``seed_interval`` of each run, lowest mean first."""
    intervals = {name: seed_interval(end.to_frame().T).iloc[0] for name, end in ends.items()}
    return pd.DataFrame(intervals).T.sort_values("mean")


def _final_row(run: Run) -> dict[str, Any]:
    losses = run.table("train_loss")
    alive = losses.columns[losses.iloc[-1].notna()]
    row: dict[str, Any] = {"seeds": losses.shape[1], "diverged": losses.shape[1] - len(alive)}
    row["epochs"] = losses.index[-1]
    row["train_loss_median"] = seed_median(losses).iloc[-1]
    for metric in METRICS:
        end = seed_interval(run.table(metric)).iloc[-1]
        row |= {f"{metric}_{name}": end[name] for name in ("mean", "low", "high")}
    row["best_test_accuracy"] = run.table("test_accuracy")[alive].max().mean()
    row["seconds"] = run.table("seconds")[alive].iloc[-1].mean()
    for name, first in (("nu", 0), ("coarse_ratio", -1), ("coarse_indefinite", 0)):
        row[name] = run.table(name)[alive].iloc[first:].mean().mean()
    return row


def _order_text(runs: Runs) -> str:
    means = ", ".join(
        f"{name} {number(row['mean'])}{_diverged(row)}"
        for name, row in _ordered_intervals(_ends(runs)).to_dict("index").items()
    )
    sentence = f"Order of the mean training loss at the last epoch, lowest first: {means}."
    pairs = order_table(runs).to_dict("records")
    if not pairs:
        return sentence
    overlapping = [f"{pair['lower']} and {pair['higher']}" for pair in pairs if pair["overlap"]]
    if any(pair["overlap"] is None for pair in pairs):
        sentence += " One seed has no interval."
    if overlapping:
        sentence += f" Neighbours whose 95% intervals overlap: {'; '.join(overlapping)}."
    elif all(pair["overlap"] is False for pair in pairs):
        sentence += " No neighbours' 95% intervals overlap."
    return f"{sentence}\n\n{markdown_table(pairs, PAIRS)}"


def _diverged(interval: dict[Any, float]) -> str:
    excluded, total = int(interval["excluded"]), int(interval["excluded"] + interval["seeds"])
    return f" ({excluded} of {total} seeds diverged)" if excluded else ""
