"""The study's questions, each answered from the records: a text of tables and a figure."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.curves import Runs
from experiments.figures.grid import labels_of
from experiments.figures.markdown import mean_with_interval, plain
from experiments.figures.scales import MLP
from experiments.figures.statistics import paired_difference
from experiments.figures.study.arms import RULE, arm_markdown, arm_table, arms_figure
from experiments.figures.study.lines import (
    NEAR_BEST,
    best_of,
    goal_markdown,
    goal_table,
    good_region,
    line_markdown,
    line_table,
    ratio_markdown,
    ratio_row,
)
from experiments.figures.study.microscope import (
    STATISTICS,
    change_markdown,
    coarse_markdown,
    direction_markdown,
    direction_table,
    microscope_figure,
    spectrum_markdown,
)
from experiments.figures.study.question_figures import (
    convolutions_figure,
    damping_figure,
    depth_figure,
    tuning_figure,
)
from experiments.figures.study.records import Study
from experiments.records import PCG_LIMIT, Run
from experiments.study.arms import (
    BELOW_THE_GRID,
    CONVOLUTIONS,
    DEPTHS,
    FULL,
    INITIAL_KICK,
    LAMBDAS,
    MICROSCOPE,
    OFF_DIAGONAL,
    ONE_LEVEL,
    ONES_VECTOR,
    PAPER,
    RATES,
    TUNED_VARIANTS,
    WEAK_LAMBDA,
    WEAKLY_DAMPED,
    WEIGHTS,
    Arm,
)

LAMBDA = PAPER["optimizer.damping"]


class Answer(NamedTuple):
    """What the records say to one question: Markdown and the figure."""

    text: str
    figure: Figure


def controls(study: Study, declared: Mapping[str, Arm]) -> Answer:
    arms, baselines = study.arms(declared), [ONE_LEVEL, FULL]
    text = f"{RULE}\n\n{arm_markdown(arm_table(arms, baselines), baselines)}"
    return Answer(text, arms_figure(arms, f"{MLP.title}, the paper's settings"))


def damping(study: Study) -> Answer:
    parts, weights, shown = [RULE], {}, {}
    for clipping, lines in WEIGHTS.items():
        arms = {}
        for name, line in lines.items():
            own = study.arms(line)
            weights[f"{name}, {clipping}"] = line_table(own, "weight")
            arms |= {f"{name}, weight {w:g}" if w else ONE_LEVEL: curves for w, curves in own.items()}
            shown[f"{name}, {clipping}"] = own[1.0]
        parts += [f"**KL clipping: {clipping}**", arm_markdown(arm_table(arms, [ONE_LEVEL]), [ONE_LEVEL])]
    levels = {name: study.arms(line) for name, line in LAMBDAS.items()}
    lambdas = {name: line_table(line, "damping") for name, line in levels.items()}
    one, two = levels.values()
    same = pd.DataFrame([{"λ": value} | ratio_row(two[value], one[value]) for value in one])
    arms = {f"{name}, λ {value:g}": curves for name, line in levels.items() for value, curves in line.items()}
    baseline = [f"two levels, λ {LAMBDA:g}"]
    parts += ["**Another λ, for the blocks and the coarse space alike**"]
    parts += [ratio_markdown(same, {"λ": "λ of both"}, ("two levels", "one level"))]
    parts += [arm_markdown(arm_table(arms, baseline), baseline), goal_markdown(goal_table(arms))]
    return Answer("\n\n".join(parts), damping_figure(weights, lambdas, shown))


def equal_tuning(study: Study) -> Answer:
    lines = {name: study.arms(line) for name, line in RATES.items()}
    tables = {name: line_table(line, "lr") for name, line in lines.items()}
    best = {name: best_of(line, range(5)) for name, line in lines.items()}
    arms = {f"{name}, η {best[name]:g}": lines[name][best[name]] for name in lines}
    variants = study.arms(TUNED_VARIANTS)
    baselines = [ONE_LEVEL, FULL]
    parts = [
        f"{RULE} λ 1e-3 and κ 1e-2, the grid's winners for both; μ 0.9 is its winner for one level, μ 0 for two.",
        line_markdown(tables, "lr", "η"),
        _regions(tables),
        "Best against best: η chosen by the median of seeds 0 to 4, and compared on all seeds and on the seeds 5 to 9, "
        "which had no part in any choice.",
        _best_pairs(arms),
        goal_markdown(goal_table(arms)),
        *_best_of_everything(study, lines),
        "The variants of questions 1, 2 and 4 at the settings that won the grid for one level, η 1e-2 and μ 0.9:",
        arm_markdown(arm_table(variants, baselines), baselines),
    ]
    return Answer("\n\n".join(parts), tuning_figure(tables, arms, variants))


def depth(study: Study) -> Answer:
    rows = [
        {"net": net, "depth": deep} | ratio_row(study.run(two), study.run(one))
        for net, depths in DEPTHS.items()
        for deep, (one, two) in depths.items()
    ]
    net = next(iter(DEPTHS))
    for deep, weak in WEAKLY_DAMPED.items():
        _, two = DEPTHS[net][deep]
        row = ratio_row(study.run(two), study.run(weak))
        rows.append({"net": f"{net}; one level at λ {WEAK_LAMBDA:g}", "depth": deep} | row)
    table = pd.DataFrame(rows)
    text = ratio_markdown(table, {"net": "net", "depth": "depth"}, ("two levels", "one level"))
    return Answer(f"{RULE} 40 epochs, 5 seeds.\n\n{text}", depth_figure(table))


def microscope(study: Study) -> Answer:
    parts = [
        "Error: ‖v - x‖ / ‖x‖ in the F_λ norm, x = F_λ⁻¹ g; at the best length: of the best multiple of v. PCG "
        f"iterations: on F_λ x = g to a residual of 1e-6, infinite if {PCG_LIMIT} do not suffice. Errors and "
        "iterations are medians over seeds, the others means with 95% Student-t intervals."
    ]
    names = ("directions", "coarse", "spectrum")
    tables = {
        trained: {name: study.measurement("microscope", arm.group, name) for name in names}
        for trained, arm in MICROSCOPE.items()
    }
    for trained, own in tables.items():
        parts += _microscope_parts(own, trained)
    shown = tables["one level"]
    title = f"{MLP.title}, trained by one level"
    figure = microscope_figure(direction_table(shown["directions"]), shown["spectrum"], title, 5, LAMBDA)
    return Answer("\n\n".join(parts), figure)


def convolutions(study: Study) -> Answer:
    coarse = study.measurement("coarse_matrix", CONVOLUTIONS.group, "coarse")
    numbers = {
        "normalised_off_diagonal": "off-diagonal share, normalised",
        "off_diagonal": "off-diagonal share",
        "distance": "distance to exact",
        "size": "norm relative to exact",
        "cosine": "cosine with exact",
        "negative_eigenvalues": "negative eigenvalues",
    }
    remarks = labels_of(coarse)
    parts = [f"**{remark}**" for remark in remarks]
    parts.append(f"Medians over {coarse['seed'].nunique()} seeds, and ranges.")
    parts.append(coarse_markdown(coarse, ["epoch"], numbers))
    return Answer("\n\n".join(parts), convolutions_figure(coarse, numbers, remarks))


class Question(NamedTuple):
    """``name`` is the figure's file name."""

    name: str
    title: str
    answer: Callable[[Study], Answer]


QUESTIONS = (
    Question("q1_off_diagonal", "Is it the off-diagonal?", partial(controls, declared=OFF_DIAGONAL)),
    Question("q2_ones_vector", "Is it the ones vector?", partial(controls, declared=ONES_VECTOR)),
    Question("q3_damping", "Damping", damping),
    Question("q4_initial_kick", "Is it an initial kick?", partial(controls, declared=INITIAL_KICK)),
    Question("q5_equal_tuning", "Equal tuning", equal_tuning),
    Question("q6_depth", "Depth and normalisation", depth),
    Question("q7_microscope", "The Fisher microscope", microscope),
    Question("q8_convolutions", "Convolutions", convolutions),
)


def _microscope_parts(tables: Mapping[str, pd.DataFrame], trained: str) -> list[str]:
    directions, coarse = tables["directions"], tables["coarse"]
    table = direction_table(directions)
    numbers = {
        "distance": "distance to Z F Zᵀ",
        "normalised_off_diagonal": "off-diagonal share, normalised",
        "off_diagonal": "off-diagonal share",
    }
    parts = [f"### Along the training by {trained}: {directions['seed'].nunique()} seeds"]
    for statistics, what in STATISTICS.items():
        parts += [f"The Fisher {what}:", direction_markdown(table, statistics)]
    parts += ["Two levels minus one level, paired by seed [95% interval]:", change_markdown(directions)]
    parts += [
        "Coarse matrices, medians over seeds:",
        coarse_markdown(coarse, ["statistics", "epoch"], numbers),
    ]
    return [*parts, spectrum_markdown(tables["spectrum"], LAMBDA)]


def _best_of_everything(study: Study, lines: Mapping[str, Mapping[float, Run]]) -> list[str]:
    """Each level's best when λ may go below the paper's grid."""
    arms = {}
    for name, own in BELOW_THE_GRID.items():
        of_grid = {line: curves for line, curves in lines.items() if line.startswith(name)}
        tried = {f"{line}, η {lr:g}, λ 0.001": arm for line in of_grid for lr, arm in of_grid[line].items()}
        tried |= {f"{name}, η {lr:g}, λ {value:g}": arm for (value, lr), arm in study.arms(own).items()}
        best = best_of(tried, range(5))
        arms[f"{best}, best of {len(tried)}"] = tried[best]
    return [
        "The best of all that was trained, λ below the paper's grid included, chosen and compared alike:",
        _best_pairs(arms),
        goal_markdown(goal_table(arms)),
    ]


def _regions(tables: Mapping[str, pd.DataFrame]) -> str:
    lowest = min(min(table["median"]) for table in tables.values())
    lines = []
    for name, table in tables.items():
        own, common = good_region(table, "lr"), good_region(table, "lr", lowest)
        lines.append(
            f"- {name}: {_span(own)} (within {NEAR_BEST - 1:.0%} of its own best median); "
            f"{_span(common)} (within {NEAR_BEST - 1:.0%} of the best of all lines)"
        )
    return "Good learning rates:\n\n" + "\n".join(lines)


def _span(values: list[float]) -> str:
    if not values:
        return "none"
    listed = ", ".join(plain(value) for value in values)
    return f"{listed} (a factor of {max(values) / min(values):.0f})"


def _best_pairs(arms: Runs) -> str:
    names = list(arms)
    losses = {name: run.final_losses() for name, run in arms.items()}
    lines = []
    for name in names[1:]:
        for which, seeds in (("all seeds", range(10)), ("seeds 5 to 9", range(5, 10))):
            pair = paired_difference(losses[name].reindex(seeds), losses[names[0]].reindex(seeds))
            interval = mean_with_interval(pair["difference"], pair["low"], pair["high"])
            lines.append(f"- {name} minus {names[0]}, {which}: {interval}, {pair['seeds']} pairs")
    return "\n".join(lines)
