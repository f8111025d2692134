"""What several of the study's figures draw with."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from experiments.figures.curves import plain_log
from experiments.figures.markdown import plain
from experiments.figures.statistics import paired_ratio
from experiments.figures.style import Style

OVER_SEEDS = "median and range over 10 seeds"
NORMAL, WIDE = (1, 1.05), (1.4, 1.05)  # panels of the study, relative to the paper's


def draw_line(axes: Axes, x: Any, middle: Any, low: Any, high: Any, style: Style) -> None:
    """Points with bars from ``low`` to ``high``. What is not there (NaN) is left out; an infinite point is a filled
    triangle at the upper edge, an infinite end of a bar a hollow one."""
    x, middle, low, high = (np.asarray(each, dtype=float) for each in (x, middle, low, high))
    finite = np.isfinite(middle)
    ends = [np.abs(np.where(np.isfinite(end), end, middle)[finite] - middle[finite]) for end in (low, high)]
    look: dict[str, Any] = {"color": style.color, "linestyle": style.linestyle, "label": style.label}
    axes.errorbar(
        x[finite], middle[finite], ends, **look, marker="o", markersize=3, capsize=2, elinewidth=0.7
    )
    lost = ((np.isinf(middle), style.color, "most"), (finite & np.isinf(high), "none", "some"))
    for some, face, how_many in lost:
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        marks: dict[str, Any] = {"markeredgecolor": style.color, "markerfacecolor": face, "markersize": 4}
        if some.any():  # an empty line that is not clipped collapses the layout
            marks["label"] = f"{style.label}: {how_many} seeds diverged"
            axes.plot(x[some], np.ones(some.sum()), "^", **marks, **place)


def draw_table(axes: Axes, table: pd.DataFrame, x: str, style: Style) -> None:
    """``draw_line`` of ``final_summary``'s against the column ``x``."""
    draw_line(axes, table[x], table["median"], table["lowest"], table["highest"], style)


def draw_ratios(
    axes: Axes, pairs: Mapping[str, tuple[pd.Series, pd.Series]], colors: Iterable[str], of: str, **ticks: Any
) -> None:
    """A line per pair: a dot for each seed's ratio first / second, their geometric mean and its 95% interval. A name
    says how many pairs there are where a seed is lost; ``of``: what is divided by what; ``ticks``: of the names."""
    names = []
    for place, ((name, (first, second)), color) in enumerate(zip(pairs.items(), colors, strict=True)):
        pair, count = paired_ratio(first, second), len(first)
        mean, low, high = (pair[key] for key in ("ratio", "low", "high"))
        axes.plot(first / second, np.full(count, place - 0.15), ".", color=color, alpha=0.4, markersize=4)
        axes.errorbar(
            mean, place + 0.1, xerr=[[mean - low], [high - mean]], fmt="o", color=color, markersize=3.5
        )
        names.append(name if pair["seeds"] == count else f"{name} ({pair['seeds']} of {count} pairs)")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, **ticks)
    axes.invert_yaxis()
    plain_log(axes, "x")
    axes.set_xlabel(f"{of}\n(geometric mean and 95% interval; dots: seeds)", fontsize=7)


def only_these(axes: Axes, values: list[float]) -> None:
    """Of a logarithmic x axis only these ticks."""
    axes.set_xticks(values, [plain(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
