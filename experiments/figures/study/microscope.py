"""How close directions come to the exact natural gradient: tables and figure of the microscope's records."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.curves import add_legend, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.markdown import Columns, column, interval, markdown_table
from experiments.figures.statistics import seed_interval
from experiments.figures.study.drawing import NORMAL, draw_line
from experiments.figures.style import OPTIMIZERS, Style
from experiments.records import PCG_LIMIT

DIRECTIONS = {
    "none": Style("SGD (the gradient)", OPTIMIZERS["sgd"].color, ":"),
    "one_level": Style("one level", OPTIMIZERS["kfac"].color, "--"),
    "two_level": Style("two levels", OPTIMIZERS["two_level_kfac"].color, "-"),
    "block_diagonal": Style("exact block diagonal", "#000000", "-."),
    "true_coarse": Style("two levels, true Z F Zᵀ + λI", "#E69F00", "-"),
    "consistent_coarse": Style("two levels, true Z F_λ Zᵀ", "#7F7F7F", "-"),
    "galerkin": Style("one level + Galerkin", "#CC79A7", "-"),
    "deflated": Style("deflated", "#009E73", "--"),
}
MATRICES = {
    "true": Style("true Z F Zᵀ", "#000000", "-"),
    "kronecker": Style("Kronecker", OPTIMIZERS["two_level_kfac"].color, "--"),
    "exact": Style('"exact"', "#009E73", ":"),
}
STATISTICS = {"batch": "through batch statistics", "frozen": "with statistics as constants"}
MEANS, MEDIANS = ("scaled_error", "cosine"), ("error", "pcg_iterations")
EPOCH_GAP = 0.4  # on the axis of the epochs, on which 0 must have a place


def over_seeds(table: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """For each combination of ``keys``, the index, the mean of ``value`` over seeds with its 95% Student-t interval,
    in columns called ``value``, ``<value>_low`` and ``<value>_high``."""
    wide = table.pivot(index=keys, columns="seed", values=value)
    rows = [seed_interval(row.to_frame().T).iloc[0] for _, row in wide.iterrows()]
    intervals = pd.DataFrame(rows, columns=["mean", "low", "high"]).set_axis(wide.index)
    return intervals.set_axis([value, f"{value}_low", f"{value}_high"], axis=1)


def spread(table: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """The same with the median and the range."""
    values = table.groupby(keys)[value]
    return pd.DataFrame({value: values.median(), f"{value}_low": values.min(), f"{value}_high": values.max()})


def direction_table(directions: pd.DataFrame) -> pd.DataFrame:
    """Per (statistics, epoch, direction) the mean of ``scaled_error`` and ``cosine`` with its interval (``_low``,
    ``_high``), and the median of ``error`` and ``pcg_iterations`` with its range over seeds. These are infinite where
    conjugate gradients were stopped."""
    keys = ["statistics", "epoch", "direction"]
    counted = directions.assign(pcg_iterations=_counts(directions, np.inf))
    means = [over_seeds(counted, keys, value) for value in MEANS]
    medians = [spread(counted, keys, value) for value in MEDIANS]
    return pd.concat([*means, *medians], axis=1).reset_index()


def paired_change(directions: pd.DataFrame, value: str) -> pd.DataFrame:
    """Two levels minus one level of ``value``, paired by seed, ``over_seeds`` per (statistics, epoch); of PCG
    iterations over the seeds with which both converge."""
    if value == "pcg_iterations":
        directions = directions.assign(pcg_iterations=_counts(directions, np.nan))
    wide = directions.pivot(index=["statistics", "epoch", "seed"], columns="direction", values=value)
    change = wide.assign(**{value: wide["two_level"] - wide["one_level"]})[value].reset_index()
    return over_seeds(change, ["statistics", "epoch"], value)


def _counts(directions: pd.DataFrame, otherwise: float) -> np.ndarray:
    """PCG iterations, ``otherwise`` where they did not suffice."""
    counts = directions["pcg_iterations"].to_numpy(dtype=float)
    return np.where(counts >= PCG_LIMIT, otherwise, counts)


def direction_markdown(table: pd.DataFrame, statistics: str) -> str:
    own = table.loc[table["statistics"] == statistics]
    rows = [
        own.loc[(own["epoch"] == epoch) & (own["direction"] == name)].iloc[0].to_dict()
        | {"label": style.label}
        for epoch in sorted(set(own["epoch"]))
        for name, style in DIRECTIONS.items()
    ]
    iterations = interval("pcg_iterations", "{:.0f}")
    columns: Columns = [
        ("epoch", column("epoch")),
        ("direction", column("label")),
        ("error", column("error", "{:.3g}")),
        ("error at the best length [95% interval]", interval("scaled_error")),
        ("cosine", column("cosine", "{:.3f}")),
        ("PCG iterations", lambda row: "-" if np.isnan(row["pcg_iterations"]) else iterations(row)),
    ]
    return markdown_table(rows, columns)


def change_markdown(directions: pd.DataFrame) -> str:
    """What the correction does to the direction of one level, seed by seed."""
    values = ("scaled_error", "cosine", "pcg_iterations")
    changes = pd.concat([paired_change(directions, value) for value in values], axis=1)
    columns: Columns = [
        ("Fisher", lambda row: STATISTICS[row["statistics"]]),
        ("epoch", column("epoch")),
        ("error at the best length", interval("scaled_error")),
        ("cosine", interval("cosine")),
        ("PCG iterations, where both converge", interval("pcg_iterations", "{:.1f}")),
    ]
    return markdown_table(changes.reset_index().to_dict("records"), columns)


def coarse_markdown(coarse: pd.DataFrame, groups: list[str], names: dict[str, str]) -> str:
    """Medians and ranges over seeds of a coarse matrix's numbers, for each combination of ``groups`` and matrix."""
    keys = [*groups, "matrix"]
    spreads = pd.concat([spread(coarse, keys, value) for value in names], axis=1)
    columns: Columns = [
        *((key, column(key)) for key in keys),
        *((f"{name} [range]", interval(value, "{:.3g}")) for value, name in names.items()),
    ]
    return markdown_table(spreads.reset_index().to_dict("records"), columns)


def spectrum_markdown(spectrum: pd.DataFrame, damping: float) -> str:
    """Of each coarse matrix how many eigenvalues are below the damping, and the largest: medians over seeds."""
    keys = ["statistics", "epoch", "matrix"]
    eigenvalues = spectrum.assign(below=spectrum["eigenvalue"] < damping).groupby([*keys, "seed"])
    by_seed = eigenvalues.agg(count=("below", "size"), below=("below", "sum"), largest=("eigenvalue", "max"))
    columns: Columns = [
        *((key, column(key)) for key in keys),
        (f"eigenvalues below λ = {damping:g}", lambda row: f"{row['below']:.0f} of {row['count']:.0f}"),
        ("largest", column("largest", "{:.3g}")),
    ]
    return markdown_table(by_seed.groupby(keys).median().reset_index().to_dict("records"), columns)


def microscope_figure(
    table: pd.DataFrame, spectrum: pd.DataFrame, title: str, epoch: int, damping: float
) -> Figure:
    """Six panels, by row the Fisher with and without the coupling through batch statistics: the error at the best
    length, PCG iterations, and the spectra of the coarse matrices at ``epoch`` beside the damping. ``table``: a
    ``direction_table``."""
    with panels(2, 3, NORMAL) as (figure, rows):
        for statistics, (error, pcg, values) in zip(STATISTICS, rows, strict=True):
            own = table.loc[table["statistics"] == statistics]
            _draw_over_epochs(error, own, "scaled_error")
            _draw_over_epochs(pcg, own, "pcg_iterations")
            if np.isfinite(own["pcg_iterations"]).any():
                plain_log(pcg, "y")
            _draw_spectra(values, spectrum.query("statistics == @statistics and epoch == @epoch"))
            values.axhline(damping, color="grey", linewidth=0.8, label="damping λ")
            set_title(error, title, STATISTICS[statistics])
            set_title(pcg, "median and range over seeds", "(△: some do not converge)")
            set_title(values, f"coarse Fisher, epoch {epoch}")
            error.set_ylabel("error at the best length, F_λ norm")
            pcg.set_ylabel("PCG iterations")
        add_legend(rows[-1][0], "mean and 95% interval over seeds", columns=2)
        add_legend(rows[-1][-1], "median over seeds", columns=2)
    return figure


def _draw_over_epochs(axes: Axes, table: pd.DataFrame, value: str) -> None:
    epochs = sorted(set(table["epoch"]))
    place = {epoch: max(epoch, EPOCH_GAP) for epoch in epochs}
    for number_, (name, style) in enumerate(DIRECTIONS.items()):
        own = table.loc[(table["direction"] == name) & table[value].notna()].sort_values("epoch")
        if own.empty:
            continue
        x = own["epoch"].map(place) * 1.03 ** (number_ - len(DIRECTIONS) / 2)
        draw_line(axes, x, own[value], own[f"{value}_low"], own[f"{value}_high"], style)
    axes.set_xscale("log")
    axes.set_xticks(list(place.values()), [str(epoch) for epoch in epochs])
    axes.minorticks_off()
    axes.set_xlabel("epoch")


def _draw_spectra(axes: Axes, spectrum: pd.DataFrame) -> None:
    for name, style in MATRICES.items():
        own = spectrum.loc[spectrum["matrix"] == name]
        median = own.groupby("place")["eigenvalue"].median()
        axes.plot(median.where(median > 0), style.linestyle, color=style.color, label=style.label)
    axes.set_yscale("log")
    axes.set_xlabel("place of the eigenvalue")
    axes.set_ylabel("eigenvalue")
