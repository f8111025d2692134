"""The figure of equal tuning: what each level reaches at each λ, and the chosen ones seed by seed."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.curves import add_legend, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.scales import MLP
from experiments.figures.statistics import final_summary
from experiments.figures.study.decision import ONE, OUTCOMES, SELECTED_BY, SELECTION, TWO, chosen
from experiments.figures.study.drawing import WIDE, draw_ratios, draw_table
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
                draw_table(by_damping, table, "λ", look)
        plain_log(by_damping, "xy")
        by_damping.set_xlabel("damping λ")
        by_damping.set_ylabel(SELECTED_BY[0])
        add_legend(by_damping, "median and range over seeds 0 to 4, best η of four", columns=2)
        set_title(by_damping, f"{MLP.title}, 100 epochs")
        set_title(ratios, "each level at its best, seeds 5 to 19")
        _chosen_ratios(ratios, study)
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


def _chosen_ratios(axes: Axes, study: Study) -> None:
    pairs = {}
    for selected_by in SELECTED_BY:
        runs = {level: study.run(arm(level, chosen(study, level, selected_by), TEST)) for level in (ONE, TWO)}
        for outcome, losses in OUTCOMES.items():
            pairs[f"{outcome}\n(chosen by {selected_by})"] = losses(runs[TWO]), losses(runs[ONE])
    draw_ratios(axes, pairs, ["black"] * len(pairs), "two levels / one level", fontsize=7)
