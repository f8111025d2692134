"""The end of training an image classifier: losses, accuracies, costs, and the optimizers' order."""

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.curves import failures, machines, seed_counts
from experiments.figures.figures import Panel
from experiments.figures.long_table import by_optimizer
from experiments.figures.markdown import markdown_table, mean_with_interval, number
from experiments.figures.statistics import paired_difference, seed_interval, seed_median, seed_table
from experiments.figures.style import optimizer_styles

METRICS = ("train_loss", "train_accuracy", "test_accuracy")
PERCENT = "{:.1%}"


def final_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The last epoch, one row per (optimizer, variant), over the seeds that have not diverged.

    Columns: ``optimizer``, ``variant``, number of ``seeds``, of these ``diverged``, ``epochs``; mean and
    95% Student-t interval ``<metric>_mean``, ``_low``, ``_high`` of each of ``METRICS``;
    ``train_loss_median``, in which a diverged seed counts as +inf; means over seeds of the
    ``best_test_accuracy`` over epochs, of the ``seconds`` of a training, of ``nu`` and ``coarse_indefinite``
    over the run and of ``coarse_ratio`` at the end. What is not there is NaN.
    """
    records = by_optimizer(frame)
    rows = []
    for name in optimizer_styles(records):
        by_variant = dict(list(records[name].groupby("variant")))
        for variant in sorted(by_variant, key=lambda each: (each != "paper", each)):
            rows.append({"optimizer": name, "variant": variant} | _final_row(by_variant[variant]))
    return pd.DataFrame(rows)


def order_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The optimizers in the order of their mean training loss at the last epoch, each with the next.

    One row per neighbouring pair: ``lower`` and ``higher`` loss, whether their 95% intervals
    ``overlap`` (None where one seed has none), and the mean ``difference`` with its 95% interval
    (``low``, ``high``) over the ``seeds`` that both have, paired by seed. An optimizer whose seeds have
    all diverged has no place.
    """
    ends = _ends(frame)
    ordered = _ordered_intervals(ends).dropna(subset="mean").to_dict("index")
    rows = []
    for lower, higher in pairwise(ordered):
        bounds = ordered[lower]["high"], ordered[higher]["low"]
        overlap = None if np.isnan(bounds).any() else bounds[0] >= bounds[1]
        row = {"lower": lower, "higher": higher, "overlap": overlap}
        rows.append(row | paired_difference(ends[higher], ends[lower]))
    columns = ["lower", "higher", "overlap", "difference", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def final_markdown(panel: Panel, controls: pd.DataFrame | None = None) -> str:
    """``final_table`` and ``order_table`` of a panel's records as text.

    ``controls``: records with other settings, which get rows in the table and no place in the order.
    """
    frame = panel.frame if controls is None else pd.concat([panel.frame, controls])
    labels = {name: style.label for name, style in optimizer_styles(frame["optimizer"]).items()}
    finals = final_table(frame).to_dict("records")
    for row in finals:
        row["name"] = labels[row["optimizer"]] + ("" if row["variant"] == "paper" else f", {row['variant']}")
    result_header = (
        "optimizer",
        "seeds",
        "diverged",
        "epochs",
        "training loss, median",
        "mean [95% interval]",
    )
    result_header += ("training accuracy", "test accuracy", "best test accuracy")
    cost_header = ("optimizer", "seconds per training", "ν, mean of the run", "coarse ratio at the end")
    cost_header += ("steps with an indefinite coarse matrix",)
    paragraphs = [
        f"## {panel.title}",
        f"**{panel.remarks}**" if panel.remarks else "",
        f"The last epoch over {seed_counts(panel.frame)}. Means and their 95% intervals leave diverged seeds "
        "out, the median counts them as infinite. Training loss and accuracy are averages over the epoch, on "
        "augmented images; the best test accuracy is that of each seed's best epoch.",
        markdown_table(result_header, [_result_cells(row) for row in finals]),
        failures(frame),
        _order_text(panel.frame, labels),
        f"Training passes alone ({machines(frame)}), mean over seeds.",
        markdown_table(cost_header, [_cost_cells(row) for row in finals]),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _ends(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Each optimizer's training losses at its last epoch, by seed; NaN for a diverged one."""
    return {name: seed_table(curves, "train_loss").iloc[-1] for name, curves in by_optimizer(frame).items()}


def _ordered_intervals(ends: dict[str, pd.Series]) -> pd.DataFrame:
    """``seed_interval`` of each optimizer, lowest mean first."""
    intervals = {name: seed_interval(end.to_frame().T).iloc[0] for name, end in ends.items()}
    return pd.DataFrame(intervals).T.sort_values("mean")


def _final_row(curves: pd.DataFrame) -> dict[str, Any]:
    losses = seed_table(curves, "train_loss")
    alive = losses.columns[losses.iloc[-1].notna()]
    row: dict[str, Any] = {"seeds": losses.shape[1], "diverged": losses.shape[1] - len(alive)}
    row["epochs"] = losses.index[-1]
    row["train_loss_median"] = seed_median(losses).iloc[-1]
    for metric in METRICS:
        end = seed_interval(seed_table(curves, metric)).iloc[-1]
        row |= {f"{metric}_{column}": end[column] for column in ("mean", "low", "high")}
    means = {"best_test_accuracy": seed_table(curves, "test_accuracy")[alive].max().mean()}
    means["seconds"] = seed_table(curves, "seconds")[alive].iloc[-1].mean()
    for name, first in (("nu", 0), ("coarse_ratio", -1), ("coarse_indefinite", 0)):
        known = name in curves and len(alive) > 0
        means[name] = seed_table(curves, name)[alive].iloc[first:].mean().mean() if known else np.nan
    return row | means


def _result_cells(row: dict[str, Any]) -> tuple[str, ...]:
    def interval(metric: str, form: str) -> str:
        return mean_with_interval(row[f"{metric}_mean"], row[f"{metric}_low"], row[f"{metric}_high"], form)

    counts = (str(row[name]) for name in ("seeds", "diverged", "epochs"))
    loss = number(row["train_loss_median"]), interval("train_loss", "{:.4f}")
    accuracies = (interval(metric, PERCENT) for metric in ("train_accuracy", "test_accuracy"))
    return row["name"], *counts, *loss, *accuracies, number(row["best_test_accuracy"], PERCENT)


def _cost_cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        number(row["seconds"], "{:.1f}"),
        number(row["nu"], "{:.3f}"),
        number(row["coarse_ratio"], "{:.3f}"),
        number(row["coarse_indefinite"], "{:.0%}"),
    )


def _order_text(frame: pd.DataFrame, labels: dict[str, str]) -> str:
    means = ", ".join(
        f"{labels[name]} {number(row['mean'])}{_diverged(row)}"
        for name, row in _ordered_intervals(_ends(frame)).to_dict("index").items()
    )
    sentence = f"Order of the mean training loss at the last epoch, lowest first: {means}."
    pairs = order_table(frame).to_dict("records")
    if not pairs:
        return sentence
    overlapping = [
        f"{labels[pair['lower']]} and {labels[pair['higher']]}" for pair in pairs if pair["overlap"]
    ]
    if any(pair["overlap"] is None for pair in pairs):
        sentence += " One seed has no interval."
    if overlapping:
        sentence += f" Neighbours whose 95% intervals overlap: {'; '.join(overlapping)}."
    elif all(pair["overlap"] is False for pair in pairs):
        sentence += " No neighbours' 95% intervals overlap."
    answers = {None: "-", False: "no", True: "yes"}
    rows = [
        (
            f"{labels[pair['higher']]} - {labels[pair['lower']]}",
            answers[pair["overlap"]],
            mean_with_interval(pair["difference"], pair["low"], pair["high"]),
            str(pair["seeds"]),
        )
        for pair in pairs
    ]
    header = ("neighbours", "intervals overlap", "difference paired by seed [95% interval]", "shared seeds")
    return f"{sentence}\n\n{markdown_table(header, rows)}"


def _diverged(interval: dict[Any, float]) -> str:
    excluded, total = int(interval["excluded"]), int(interval["excluded"] + interval["seeds"])
    return f" ({excluded} of {total} seeds diverged)" if excluded else ""
