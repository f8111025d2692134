"""The numbers behind Figure 1: losses beside the committed ones, times, and the verdict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.figures.curves import failures, machines, remarks, seed_counts
from experiments.figures.long_table import by_optimizer
from experiments.figures.markdown import markdown_table, mean_with_interval, number
from experiments.figures.statistics import SLOW_LOSS, seed_interval, seed_median, seed_table
from experiments.figures.style import optimizer_styles
from experiments.figures.verdict import RULE, Check, check_rule, verdict


class Summary(NamedTuple):
    """``losses`` and ``ends``, the rule's ``checks`` and ``verdict``, and all as ``markdown``."""

    losses: pd.DataFrame
    ends: pd.DataFrame
    checks: list[Check]
    verdict: str
    markdown: str


def summarize(
    frame: pd.DataFrame,
    reference: pd.DataFrame | None = None,
    epochs: Sequence[int] = (5, 20, 100),
    is_reference: bool = False,
) -> Summary:
    """Compare the records of the deep linear MLP in ``frame`` with the committed ``reference``.

    ``is_reference``: they are the committed ones themselves, and only the part of the rule that
    compares optimizers with each other applies.
    """
    losses = loss_table(frame, reference, epochs)
    ends = end_table(frame, reference)
    checks = check_rule(frame, reference)
    if is_reference:
        checks = [check for check in checks if "committed" not in check.question]
    answer = verdict(checks)
    return Summary(losses, ends, checks, answer, _markdown(frame, losses, ends, checks, answer, is_reference))


def loss_table(
    frame: pd.DataFrame,
    reference: pd.DataFrame | None = None,
    epochs: Sequence[int] = (5, 20, 100),
) -> pd.DataFrame:
    """Training loss over seeds, one row per (optimizer, epoch).

    ``median`` counts a diverged seed as +inf; the arithmetic ``mean`` and its 95% Student-t
    interval (``low``, ``high``) leave it out. ``diverged`` and ``slow`` (loss above ``SLOW_LOSS``)
    count seeds. ``committed`` is the reference's median. What is not there is NaN.
    """
    committed = _losses(reference)
    rows = []
    for name, table in _losses(frame).items():
        columns = seed_interval(table).assign(median=seed_median(table), slow=(table > SLOW_LOSS).sum(axis=1))
        if name in committed:
            columns["committed"] = seed_median(committed[name])
        rows.append(columns.reindex(epochs).assign(optimizer=name))
    order = ["optimizer", "epoch", "median", "mean", "low", "high", "diverged", "slow", "committed"]
    table = pd.concat(rows).rename_axis("epoch").reset_index()
    return table.rename(columns={"excluded": "diverged"}).reindex(columns=order)


def end_table(frame: pd.DataFrame, reference: pd.DataFrame | None = None) -> pd.DataFrame:
    """The end of each run: number of ``epochs``, wall-clock ``seconds``, ``median`` training loss.

    ``committed`` is the reference's median at the same epoch, NaN where it has none.
    """
    committed = _losses(reference)
    records = by_optimizer(frame)
    rows = []
    for name, table in _losses(frame).items():
        last = table.index[-1]
        known = name in committed and last in committed[name].index
        rows.append(
            {
                "optimizer": name,
                "epochs": last,
                "seconds": max(records[name]["seconds"]),
                "median": seed_median(table)[last],
                "committed": seed_median(committed[name])[last] if known else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _losses(frame: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """Training losses, epochs by seeds, of each optimizer in the order of the legend."""
    records = {} if frame is None else by_optimizer(frame)
    return {name: seed_table(records[name], "train_loss") for name in optimizer_styles(records)}


def _markdown(
    frame: pd.DataFrame,
    losses: pd.DataFrame,
    ends: pd.DataFrame,
    checks: list[Check],
    answer: str,
    is_reference: bool,
) -> str:
    labels = {name: style.label for name, style in optimizer_styles(frame["optimizer"]).items()}
    loss_rows = [
        (
            labels[row["optimizer"]],
            str(row["epoch"]),
            number(row["median"]),
            mean_with_interval(row["mean"], row["low"], row["high"]),
            number(row["diverged"], "{:.0f}"),
            number(row["slow"], "{:.0f}"),
            number(row["committed"]),
        )
        for row in losses.to_dict("records")
    ]
    end_rows = [
        (
            labels[row["optimizer"]],
            str(row["epochs"]),
            number(row["seconds"], "{:.1f}"),
            number(row["median"]),
            number(row["committed"]),
        )
        for row in ends.to_dict("records")
    ]
    header = ("optimizer", "epoch", "median", "mean [95% interval]", "diverged", "slow", "committed median")
    end_header = ("optimizer", "epochs", "seconds", "median loss at the end", "committed median")
    if is_reference:
        header, end_header = header[:-1], end_header[:-1]
        loss_rows, end_rows = ([row[:-1] for row in rows] for rows in (loss_rows, end_rows))
    paragraphs = [
        f"Training loss over {seed_counts(frame)}. The mean and its interval leave diverged seeds "
        f"out; slow: seeds with a loss above {SLOW_LOSS}.",
        remarks(frame),
        markdown_table(header, loss_rows),
        failures(frame),
        f"Wall-clock time of a run, all its seeds side by side ({machines(frame)}).",
        markdown_table(end_header, end_rows),
        RULE,
        markdown_table(("part of the rule", "answer", "numbers"), checks),
        f"**Verdict: {answer}.**" if not is_reference else "These are the committed records themselves.",
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"
