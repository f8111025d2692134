"""The figures of single questions, from their tables."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.curves import Runs, add_legend, loss_against_epochs, loss_against_seconds, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.scales import MLP
from experiments.figures.study.arms import draw_final_ratios, draw_trace, styles
from experiments.figures.study.drawing import NORMAL, OVER_SEEDS, WIDE, draw_line, draw_table, only_these
from experiments.figures.style import OPTIMIZERS, Style


def damping_figure(
    weights: Mapping[str, pd.DataFrame], lambdas: Mapping[str, pd.DataFrame], shown: Runs
) -> Figure:
    """Four panels: final loss against the correction's weight and against λ, ν and the correction's length.

    Args:
        weights: ``line_table``s by ``weight``.
        lambdas: ``line_table``s by ``damping`` of one level and of two levels.
        shown: the trainings whose diagnostics are drawn, by the names of ``weights``.
    """
    looks = styles(list(weights))
    with panels(2, 2, NORMAL) as (figure, ((by_weight, by_lambda), (nu, length))):
        for name, table in weights.items():
            draw_table(by_weight, table, "weight", looks[name])
        for (name, table), key in zip(lambdas.items(), ("kfac", "two_level_kfac"), strict=True):
            draw_table(by_lambda, table, "damping", OPTIMIZERS[key]._replace(label=name))
        plain_log(by_weight, "y")
        plain_log(by_lambda, "y")
        by_lambda.set_xscale("log")
        by_weight.set_xlabel("weight of the correction (0: one level)")
        by_lambda.set_xlabel("damping λ of both")
        for axes in (by_weight, by_lambda):
            axes.set_ylabel("final training loss")
            add_legend(axes, OVER_SEEDS, columns=1)
        set_title(by_weight, f"{MLP.title}, the paper's settings")
        set_title(nu, "weight 1")
        draw_trace(nu, shown, looks, "nu")
        draw_trace(length, shown, looks, "coarse_ratio")
    return figure


def tuning_figure(tables: Mapping[str, pd.DataFrame], arms: Runs, variants: Runs) -> Figure:
    """Four panels: final loss against η, the variants' final losses, each line's best against epochs and seconds.

    Args:
        tables: three ``line_table``s by ``lr``: one level, two levels, two levels at one level's settings.
        arms: each line's best, in their order.
        variants: trainings that differ in the coarse space, one level among them.
    """
    colors = (OPTIMIZERS["kfac"], OPTIMIZERS["two_level_kfac"], Style("", "#009E73", "-."))
    looks = {name: style._replace(label=name) for name, style in zip(tables, colors, strict=True)}
    of_arms = {arm: looks[name]._replace(label=arm) for arm, name in zip(arms, tables, strict=True)}
    with panels(2, 2, WIDE) as (figure, ((line, ratios), (epochs, seconds))):
        for name, table in tables.items():
            draw_table(line, table, "lr", looks[name])
        plain_log(line, "xy")
        line.set_ylim(top=1)  # what explodes leaves the panel
        line.set_xlabel("learning rate η")
        line.set_ylabel("final training loss")
        add_legend(line, OVER_SEEDS, columns=1)
        set_title(line, MLP.title, "other settings: winners of the grid")
        draw_final_ratios(ratios, variants, styles(list(variants)))
        set_title(ratios, "variants at the settings that", "won the grid for one level")
        loss_against_epochs(epochs, arms, styles=of_arms)
        loss_against_seconds(seconds, arms, styles=of_arms)
    return figure


def depth_figure(table: pd.DataFrame) -> Figure:
    """Two panels: ratio of the final losses against depth, where all seeds of both levels train, and the medians.
    ``table``: a ``ratio_row`` per ``net`` and ``depth``."""
    looks = styles(list(dict.fromkeys(table["net"])))
    lost = table[["first_diverged", "first_slow", "second_diverged", "second_slow"]].sum(axis=1)
    with panels(1, 2, WIDE) as (figure, ((ratio, loss),)):
        for name, style in looks.items():
            own = table.loc[table["net"] == name]
            trained = own.loc[lost == 0]
            draw_line(ratio, trained["depth"], trained["ratio"], trained["low"], trained["high"], style)
            loss.plot(own["depth"], own["second_median"], "--", color=style.color, marker="o", markersize=3)
            loss.plot(own["depth"], own["first_median"], "-", color=style.color, marker="s", markersize=3)
        ratio.axhline(1, color="black", linewidth=0.8)
        for axes in (ratio, loss):
            plain_log(axes, "xy")
            only_these(axes, sorted(set(table["depth"])))
            axes.set_xlabel("depth")
        ratio.set_ylabel("final loss, two levels / one level")
        loss.set_ylim(top=2)  # what explodes leaves the panel
        loss.set_ylabel("final training loss, median")
        add_legend(ratio, "geometric mean and 95% interval, 5 seeds, where all seeds train", columns=2)
        set_title(ratio, "the paper's settings, 40 epochs")
        set_title(loss, "dashed: one level, solid: two levels")
    return figure


def convolutions_figure(coarse: pd.DataFrame, numbers: Mapping[str, str], remarks: Sequence[str]) -> Figure:
    """Three of the ``numbers`` (headings by column) of the Kronecker and the exact coarse Fisher against epochs."""
    looks = {
        "kronecker": Style("Kronecker", OPTIMIZERS["two_level_kfac"].color, "--"),
        "exact": Style("exact", "#009E73", "-"),
    }
    with panels(1, 3, NORMAL) as (figure, (row,)):
        for axes, value in zip(
            row, ("normalised_off_diagonal", "distance", "negative_eigenvalues"), strict=True
        ):
            for name, style in looks.items():
                wide = coarse.loc[coarse["matrix"] == name].pivot(index="epoch", columns="seed", values=value)
                axes.plot(wide, style.linestyle, color=style.color, alpha=0.25, linewidth=0.8)
                axes.plot(wide.median(axis=1), style.linestyle, color=style.color, label=style.label)
            axes.set_xlabel("epoch")
            axes.set_ylabel(numbers[value])
            axes.set_ylim(bottom=0)
        add_legend(row[0], "median, and the single seeds", columns=2)
        set_title(row[0], "ResNet20 on CIFAR10", *remarks)
    return figure
