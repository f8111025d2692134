"""What several of the study's figures draw with."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from kfac2.figures.curves import PlainLogFormatter
from kfac2.figures.markdown import plain
from kfac2.figures.style import PANEL_SIZE, Style


def panels(rows: int, columns: int) -> tuple[Figure, Any]:
    """A figure and its axes, ``(rows, columns)``."""
    width, height = PANEL_SIZE
    figure = Figure(figsize=(columns * width, 1.05 * rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_line(axes: Axes, x: Any, middle: Any, low: Any, high: Any, style: Style) -> None:
    """Points with bars from ``low`` to ``high``; what is infinite sits at the upper edge of what is finite."""
    values = [np.asarray(each, dtype=float) for each in (middle, low, high)]
    finite = np.concatenate(values)
    top = 1.5 * finite[np.isfinite(finite)].max(initial=1e-3)
    middle, low, high = (np.minimum(np.nan_to_num(each, nan=top), top) for each in values)
    axes.errorbar(
        x,
        middle,
        [np.maximum(middle - low, 0), np.maximum(high - middle, 0)],
        color=style.color,
        linestyle=style.linestyle,
        label=style.label,
        marker="o",
        markersize=3,
        capsize=2,
        elinewidth=0.7,
    )


def plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    for name in which:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_formatter(PlainLogFormatter())
        axis.set_minor_formatter(PlainLogFormatter())


def only_these(axes: Axes, values: list[float]) -> None:
    """Of a logarithmic x axis only these ticks."""
    axes.set_xticks(values, [plain(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
