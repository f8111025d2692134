"""The figure of equal tuning: what each level reaches at each λ, and the chosen ones seed by seed."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.curves import add_legend, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.statistics import final_summary, paired_ratio
from experiments.figures.study.decision import ONE, OUTCOMES, SELECTED_BY, SELECTION, TWO, chosen
from experiments.figures.study.drawing import WIDE, draw_line
from experiments.figures.study.records import Study
from experiments.figures.style import OPTIMIZERS, Style
from experiments.study.decision import DAMPINGS, GRID, MOMENTA, TEST, arm

LOOKS = {ONE: OPTIMIZERS["kfac"], TWO: OPTIMIZERS["two_level_kfac"]}
DASHES = {0.0: ":", 0.9: "-"}


def decision_figure(study: Study) -> Figure:
    """Left the outcome against λ, each point at its best η; right the ratios of the chosen settings."""
    with panels(1, 2, WIDE) as (figure, ((by_damping, ratios),)):
        for level in GRID:
            for momentum in MOMENTA:
                look = Style(f"{level}, μ {momentum:g}", LOOKS[level].color, DASHES[momentum])
                table = best_by_damping(study, level, momentum)
                ends = table["lowest"], table["highest"]
                draw_line(by_damping, table["λ"], table["median"], *ends, look)
        plain_log(by_damping, "xy")
        by_damping.set_xlabel("damping λ")
        by_damping.set_ylabel(SELECTED_BY[0])
        add_legend(by_damping, "median and range over seeds 0 to 4, best η of four", columns=2)
        set_title(by_damping, "64-layer linear MLP, 100 epochs")
        set_title(ratios, "each level at its best, seeds 5 to 19")
        _draw_ratios(ratios, study)
    return figure


def best_by_damping(study: Study, level: str, momentum: float) -> pd.DataFrame:
    """``median``, ``lowest`` and ``highest`` of the primary outcome at each ``λ``, at the η of the lowest median."""
    runs = study.arms(GRID[level])
    rows = []
    for damping in DAMPINGS:
        losses = [
            final_summary(OUTCOMES[SELECTED_BY[0]](run).reindex(SELECTION))
            for (own, _, other), run in runs.items()
            if (own, other) == (damping, momentum)
        ]
        rows.append({"λ": damping} | min(losses, key=lambda summary: summary["median"]))
    return pd.DataFrame(rows)


def _draw_ratios(axes: Axes, study: Study) -> None:
    names = []
    for selected_by in SELECTED_BY:
        runs = {level: study.run(arm(level, chosen(study, level, selected_by), TEST)) for level in (ONE, TWO)}
        for outcome, losses in OUTCOMES.items():
            first, second = losses(runs[TWO]), losses(runs[ONE])
            pair, place = paired_ratio(first, second), len(names)
            axes.plot(
                first / second, np.full(len(first), place - 0.15), ".", color="black", alpha=0.4, markersize=4
            )
            bars = [[pair["ratio"] - pair["low"]], [pair["high"] - pair["ratio"]]]
            axes.errorbar(pair["ratio"], place + 0.1, xerr=bars, fmt="o", color="black", markersize=3.5)
            names.append(f"{outcome}\n(chosen by {selected_by})")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    plain_log(axes, "x")
    axes.set_xlabel("two levels / one level\n(geometric mean and 95% interval; dots: seeds)", fontsize=7)
