"""How much the final loss depends on the learning rate: loss against η, one line per optimizer."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.curves import add_legend, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.grid import labels_of, setting_names
from experiments.figures.style import Style, optimizer_styles
from experiments.records import PAPER

SIDE_STEP = 1.04  # so that the bars of two optimizers at one learning rate do not hide each other


def best_of_each_rate(table: pd.DataFrame) -> pd.DataFrame:
    """Of ``grid_table``'s rows, for each (optimizer, lr), the one with the lowest median over the other settings."""
    known = table.dropna(subset="median")
    ordered = known.sort_values("median", kind="stable").drop_duplicates(["optimizer", "lr"])
    return ordered.sort_values(["optimizer", "lr"], ignore_index=True)


def at_paper_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Of ``grid_table``'s rows those whose settings other than the learning rate are the paper's."""
    others = [name for name in setting_names(table) if name != "lr"]
    known = table.astype(object).fillna("none")  # an optimizer may lack a setting
    settings = pd.Series(list(known[["optimizer", *others]].itertuples(index=False, name=None)), table.index)
    rows = table.loc[settings.isin(settings[table["variant"] == PAPER])].dropna(subset="median")
    return rows.sort_values(["optimizer", "lr"], ignore_index=True)


def sensitivity_figure(table: pd.DataFrame, title: str) -> Figure:
    """Median final loss against the learning rate, two panels: the other settings the best of the grid at
    each rate, and the paper's, if it is in the grid. Bars span the seeds; a median that is infinite sits at
    the upper edge.

    Args:
        table: as ``grid_table`` returns it, with a column ``lr``.

    Raises:
        ValueError: no row has a finite median.
    """
    if not np.isfinite(table["median"].astype(float)).any():
        raise ValueError("no configuration has a finite median to draw")
    shown = {
        "other settings: best of the grid": best_of_each_rate(table),
        "other settings: the paper's": at_paper_settings(table),
    }
    shown = {name: rows for name, rows in shown.items() if not rows.empty}
    styles = optimizer_styles(table["optimizer"])
    absent = sum(map(np.isnan, table["median"]))
    untrained = f"{absent} of {len(table)} configurations not trained" if absent else ""
    with panels(1, len(shown), sharey=True) as (figure, (row,)):
        for axes, (name, rows) in zip(row, shown.items(), strict=True):
            _draw(axes, rows, styles)
            set_title(axes, title, name, *labels_of(rows), untrained)
        row[0].set_ylabel("final training loss")
        row[-1].tick_params(labelleft=True)
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, styles: dict[str, Style]) -> None:
    finite = rows[["lowest", "highest"]].to_numpy(dtype=float)
    top = 1.5 * finite[np.isfinite(finite)].max(initial=1e-3)
    for place, (name, style) in enumerate(styles.items()):
        own = rows.loc[rows["optimizer"] == name]
        if own.empty:
            continue
        x = own["lr"].to_numpy(dtype=float) * SIDE_STEP ** (place - (len(styles) - 1) / 2)
        median, low, high = (
            np.minimum(own[column].to_numpy(dtype=float), top) for column in ("median", "lowest", "highest")
        )
        diverged = int(own["diverged"].sum())
        label = f"{style.label} ({diverged} seeds diverged)" if diverged else style.label
        look: dict[str, Any] = {
            "color": style.color,
            "linestyle": style.linestyle,
            "marker": "o",
            "markersize": 3,
        }
        axes.errorbar(
            x, median, [median - low, high - median], label=label, capsize=2, elinewidth=0.7, **look
        )
    axes.set_xscale("log")
    plain_log(axes, "y")
    axes.set_xlabel("learning rate η")
    seeds = " or ".join(str(count) for count in sorted(set(rows["seeds"])))
    columns = 2 if set(rows["diverged"]) <= {0} else 1
    add_legend(axes, f"median and range over {seeds} seeds", columns=columns)
