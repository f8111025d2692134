"""Arms of one experiment beside each other: final losses paired by seed, ν and the correction's length."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.curves import Runs, loss_against_epochs, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.markdown import RANGE, Cell, Columns, column, interval, markdown_table
from experiments.figures.statistics import final_summary, paired_difference, paired_ratio, seed_median
from experiments.figures.study.drawing import draw_ratios
from experiments.figures.style import OPTIMIZERS, Style
from experiments.records import FINAL_EPOCHS, Run
from experiments.study.arms import FULL, ONE_LEVEL

TRACES = {"nu": "ν", "coarse_ratio": "correction / one-level step"}
COLORS = ("#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
LINES = ("-.", ":", "-", "--")
WHENS = {"1": "epoch 1", "20": "epoch 20", "last": "last epoch"}  # at which it shows these traces
RULE = (
    f"Final loss: a seed's mean training loss over the last {FINAL_EPOCHS} epochs. Medians are over all seeds, a "
    "diverged one counting as infinite; differences and ratios (geometric means) are paired by seed over the seeds "
    "that have diverged in neither training, with 95% Student-t intervals, not corrected for their number."
)
DIAGNOSTICS = (
    "ν and the length of the correction relative to the one-level step are means over the steps of an epoch, medians "
    "over the seeds that have not diverged."
)
COLUMNS, SMALL = 4, (1.0, 1.0)  # of a figure of arms, and its panels relative to the paper's
EPOCHS = (5, 20)  # the losses that a table shows besides the final one


def styles(names: Sequence[str]) -> dict[str, Style]:
    """One level and the full correction look as they do in every figure."""
    known = {ONE_LEVEL: OPTIMIZERS["kfac"], FULL: OPTIMIZERS["two_level_kfac"]}
    others = [name for name in names if name not in known]
    new = {name: Style(name, COLORS[i % len(COLORS)], LINES[i % len(LINES)]) for i, name in enumerate(others)}
    return {name: known[name]._replace(label=name) if name in known else new[name] for name in names}


def arm_table(arms: Runs, baselines: Sequence[str]) -> pd.DataFrame:
    """One row per arm.

    ``seeds``, of these ``diverged``; median training loss at ``EPOCHS`` (``epoch_5`` …) and of the final loss
    (``median``, a diverged seed counting as infinite) with its range over seeds (``lowest``, ``highest``). For each
    baseline ``b`` the mean of the final losses minus the baseline's, paired by seed, with its 95% interval
    (``minus_b``, ``minus_b_low``, ``minus_b_high``), the geometric mean of their ratio (``over_b``, …), and in how
    many (``below_b``) of the pairs (``pairs_b``) the arm ends lower. Medians over seeds of ν and of the length of the
    correction relative to the one-level step, means over the epochs ``WHENS`` (``nu_1``, ``coarse_ratio_1`` …).
    """
    losses = {name: run.final_losses() for name, run in arms.items()}
    return pd.DataFrame([_row(name, arms[name], losses, baselines) for name in arms])


def arm_markdown(table: pd.DataFrame, baselines: Sequence[str]) -> str:
    """The table as text in three parts: losses, comparisons, ν and the correction's length."""
    rows = table.to_dict("records")
    losses: Columns = [
        ("arm", column("arm")),
        *((f"median, epoch {epoch}", column(f"epoch_{epoch}", "{:.4f}")) for epoch in EPOCHS),
        ("final loss, median", column("median", "{:.4f}")),
        *RANGE,
    ]
    comparisons: Columns = [
        ("final loss, paired by seed [95% interval]", column("arm")),
        *(each for baseline in baselines for each in _comparisons(baseline)),
    ]
    compared = [row for row in rows if any(_is_compared(row, baseline) for baseline in baselines)]
    diagnostics: Columns = [
        ("arm", column("arm")),
        *(
            (f"{name}, {when}", column(f"{trace}_{key}", "{:.3f}"))
            for trace, name in TRACES.items()
            for key, when in WHENS.items()
        ),
    ]
    tables = ((rows, losses), (compared, comparisons), (rows, diagnostics))
    losses_text, comparisons_text, diagnostics_text = (markdown_table(*table) for table in tables)
    return "\n\n".join([losses_text, comparisons_text, DIAGNOSTICS, diagnostics_text])


def arms_figure(arms: Runs, title: str) -> Figure:
    """Training loss, a panel for each arm beside one level; below them the ratio of the final losses to one level's
    seed by seed, ν, and the correction's length."""
    looks = styles(list(arms))
    others = [name for name in arms if name != ONE_LEVEL]
    with panels(ceil(len(others) / COLUMNS) + 1, COLUMNS, SMALL) as (figure, rows):
        losses, (ratios, nu, length, last) = rows[:-1].ravel(), rows[-1]
        for axes, name in zip(losses, others, strict=False):
            loss_against_epochs(axes, {each: arms[each] for each in (ONE_LEVEL, name)}, styles=looks)
        on_one_scale(losses[: len(others)])
        set_title(losses[0], title)
        draw_final_ratios(ratios, arms, looks)
        draw_trace(nu, arms, looks, "nu")
        draw_trace(length, arms, looks, "coarse_ratio")
        for axes in (*losses[len(others) :], last):
            axes.remove()
    return figure


def on_one_scale(panels_of_losses: Sequence[Axes]) -> None:
    """All with the limits of their ys that show what each of them shows."""
    lows, highs = zip(*(axes.get_ylim() for axes in panels_of_losses), strict=True)
    for axes in panels_of_losses:
        axes.set_ylim(min(lows), max(highs))


def draw_final_ratios(axes: Axes, arms: Runs, looks: dict[str, Style]) -> None:
    """Final losses relative to one level's, a line per arm."""
    losses = {name: run.final_losses() for name, run in arms.items()}
    base = losses.pop(ONE_LEVEL)
    pairs = {name: (own, base) for name, own in losses.items()}
    draw_ratios(axes, pairs, [looks[name].color for name in pairs], f"final training loss / {ONE_LEVEL}'s")


def draw_trace(axes: Axes, arms: Runs, looks: dict[str, Style], trace: str) -> None:
    """The median over seeds of a diagnostic, against epochs; where it is 0 there is no line."""
    for name, run in arms.items():
        median = run.table(trace).median(axis=1)
        shown = median.where(median > 0)
        marker = "o" if shown.count() == 1 else ""  # a single epoch makes no line
        axes.plot(
            shown, linestyle=looks[name].linestyle, color=looks[name].color, marker=marker, markersize=3
        )
    plain_log(axes, "xy")
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{TRACES[trace]} (mean of epoch)")


def _row(name: str, run: Run, losses: Mapping[str, pd.Series], baselines: Sequence[str]) -> dict[str, Any]:
    own = losses[name]
    medians = seed_median(run.table("train_loss"))
    row: dict[str, Any] = {"arm": name} | final_summary(own)
    row |= {f"epoch_{epoch}": medians.get(epoch, np.nan) for epoch in EPOCHS}
    for baseline in (each for each in baselines if each != name):
        row |= _comparison(own, losses[baseline], baseline)
    for trace in TRACES:
        values = run.table(trace).median(axis=1)
        for when in WHENS:
            epoch = run.epochs if when == "last" else int(when)
            row[f"{trace}_{when}"] = values.get(epoch, np.nan)
    return row


def _comparison(own: pd.Series, other: pd.Series, baseline: str) -> dict[str, float]:
    difference, ratio = paired_difference(own, other), paired_ratio(own, other)
    row: dict[str, float] = {f"pairs_{baseline}": ratio["seeds"], f"below_{baseline}": ratio["below"]}
    row |= {f"minus_{baseline}": difference["difference"], f"over_{baseline}": ratio["ratio"]}
    for bound in ("low", "high"):
        row |= {f"minus_{baseline}_{bound}": difference[bound], f"over_{baseline}_{bound}": ratio[bound]}
    return row


def _comparisons(baseline: str) -> Columns:
    """Columns that compare with a baseline."""

    def where_compared(cell: Cell) -> Cell:
        return lambda row: cell(row) if _is_compared(row, baseline) else "-"

    def below(row: Mapping[Any, Any]) -> str:
        return f"{row[f'below_{baseline}']:.0f} of {row[f'pairs_{baseline}']:.0f}"

    return [
        (f"minus {baseline}", where_compared(interval(f"minus_{baseline}"))),
        (f"ratio to {baseline}", where_compared(interval(f"over_{baseline}", "{:.3f}"))),
        ("seeds below", where_compared(below)),
    ]


def _is_compared(row: Mapping[Any, Any], baseline: str) -> bool:
    return not np.isnan(row.get(f"pairs_{baseline}", np.nan))
