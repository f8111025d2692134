"""The study's questions, each answered from the records: a text of tables and a figure."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kfac2.figures.markdown import mean_with_interval, plain
from kfac2.figures.statistics import final_losses, paired_difference
from kfac2.figures.study.arms import FINAL, FULL, ONE_LEVEL, Arms, arm_markdown, arm_table, arms_figure
from kfac2.figures.study.lines import (
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
from kfac2.figures.study.microscope import (
    STATISTICS,
    change_markdown,
    coarse_markdown,
    direction_markdown,
    direction_table,
    microscope_figure,
    spectrum_markdown,
)
from kfac2.figures.study.question_figures import (
    MLP,
    convolutions_figure,
    damping_figure,
    depth_figure,
    tuning_figure,
)
from kfac2.figures.study.records import choose, labels, load_measurement, load_trainings

PAPER = {
    "lr": 1e-3,
    "momentum": 0.9,
    "damping": 1e-2,
    "kl_clip": 1e-3,
    "depth": 64,
    "batch_norm": True,
    "activation": "identity",
    "epochs": 100,
    "replicas": 10,
}
ONE = {"optimizer": "kfac"}
TWO = {"optimizer": "two_level_kfac"}
VARIANT = {"optimizer": "two_level_variant", "coarse_weight": 1.0}
BEST_ONE = PAPER | {"lr": 1e-2, "damping": 1e-3, "kl_clip": 1e-2}
BEST_TWO = BEST_ONE | {"momentum": 0.0}
CONTROLS = {FULL: "full", "exact": "exact", "diagonal": "diagonal", "identity, same length": "identity"}
CONTROLS |= {"diagonal, same length": "diagonal_matched", "permuted, same length": "permuted"}
CONTROLS |= {"λI only": "damping_only"}
BASES = {FULL: "full", "random signs": "signs", "Gaussian": "gaussian"}
TIMES = {FULL: "full", "first step only": "first_step", "epoch 1 only": "first_epoch"}
TIMES |= {"after epoch 5 only": "after_epoch_5"}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LAMBDAS = (1e-5, 1e-4, 1e-3, 1e-2)
WEIGHTS = (0.25, 0.5, 1.0)
DAMPINGS = {"λI": "full", "λ diag(n)": "consistent"}
NETS = {"batch norm, linear": (True, "identity"), "batch norm, ReLU": (True, "relu")}
NETS |= {"plain, linear": (False, "identity"), "plain, ReLU": (False, "relu")}
DEPTHS = {True: (8, 16, 32, 64, 128), False: (2, 4, 8, 16)}


class Answer(NamedTuple):
    """What the records say to one question: Markdown and the figure."""

    text: str
    figure: Figure


def off_diagonal(root: Path) -> Answer:
    arms = _variants(load_trainings(root), PAPER, CONTROLS)
    return _arms_answer(arms, f"{MLP}, the paper's settings", (ONE_LEVEL, FULL))


def ones_vector(root: Path) -> Answer:
    arms = _variants(load_trainings(root), PAPER, BASES)
    return _arms_answer(arms, f"{MLP}, the paper's settings", (ONE_LEVEL, FULL))


def damping(root: Path) -> Answer:
    trainings = load_trainings(root)
    parts, lines, shown = [], {}, {}
    for clip, kl_clip in (("with clipping", 1e-3), ("without clipping", np.inf)):
        settings = PAPER | {"kl_clip": kl_clip}
        one = choose(trainings, **settings, **ONE)
        arms = {ONE_LEVEL: one}
        for name, coarse in DAMPINGS.items():
            own = {
                weight: choose(trainings, **settings, **VARIANT | {"coarse_weight": weight}, coarse=coarse)
                for weight in WEIGHTS
            }
            lines[f"{name}, {clip}"] = line_table({0.0: one} | own, "weight")
            arms |= {f"{name}, weight {weight:g}": curves for weight, curves in own.items()}
            shown[f"{name}, {clip}"] = own[1.0]
        parts += [f"**KL clipping: {clip}**", arm_markdown(arm_table(arms, [ONE_LEVEL]), [ONE_LEVEL])]
    by_lambda = {
        name: {value: choose(trainings, **PAPER | optimizer | {"damping": value}) for value in LAMBDAS}
        for name, optimizer in (("one level", ONE), ("two levels", TWO))
    }
    tables = {name: line_table(line, "damping") for name, line in by_lambda.items()}
    parts += ["**Another λ, for both levels alike**", line_markdown(tables, "damping", "λ")]
    return Answer("\n\n".join([FINAL, *parts]), damping_figure(lines, tables, shown))


def initial_kick(root: Path) -> Answer:
    arms = _variants(load_trainings(root), PAPER, TIMES)
    return _arms_answer(arms, f"{MLP}, the paper's settings", (ONE_LEVEL, FULL))


def equal_tuning(root: Path) -> Answer:
    trainings = load_trainings(root)
    lines = {
        "one level": _rates(trainings, BEST_ONE | ONE),
        "two levels": _rates(trainings, BEST_TWO | TWO),
        "two levels, one level's settings": _rates(trainings, BEST_ONE | TWO),
    }
    tables = {name: line_table(line, "lr") for name, line in lines.items()}
    best = {name: best_of(line, range(5)) for name, line in lines.items()}
    arms = {f"{name}, η {best[name]:g}": lines[name][best[name]] for name in lines}
    variants = _variants(trainings, BEST_ONE, CONTROLS | BASES)
    parts = [
        f"{FINAL} Bars and ranges span the seeds.",
        line_markdown(tables, "lr", "η"),
        _regions(tables),
        "Best against best: η chosen by the median of seeds 0 to 4, and compared on all seeds and on the seeds 5 to 9, "
        "which had no part in any choice.",
        _best_pairs(arms),
        goal_markdown(goal_table(arms)),
        "The variants of questions 1 and 2 at the settings that won the grid for one level "
        "(η 1e-2, μ 0.9, λ 1e-3, κ 1e-2):",
        arm_markdown(arm_table(variants, [ONE_LEVEL, FULL]), [ONE_LEVEL, FULL]),
    ]
    return Answer("\n\n".join(parts), tuning_figure(tables, arms, variants))


def depth(root: Path) -> Answer:
    trainings = load_trainings(root)
    rows = []
    for net, (batch_norm, activation) in NETS.items():
        for deep in DEPTHS[batch_norm]:
            settings = PAPER | {"epochs": 40, "replicas": 5, "depth": deep}
            settings |= {"batch_norm": batch_norm, "activation": activation}
            pair = (choose(trainings, **settings, **optimizer) for optimizer in (TWO, ONE))
            rows.append({"net": net, "depth": deep} | ratio_row(*pair))
    table = pd.DataFrame(rows)
    heading = {"net": "net", "depth": "depth"}
    parts = [
        f"{FINAL} 40 epochs, 5 seeds. The ratio is the geometric mean over seeds.",
        ratio_markdown(table, heading, ("two levels", "one level")),
    ]
    return Answer("\n\n".join(parts), depth_figure(table))


def microscope(root: Path) -> Answer:
    parts = [
        "Error: ‖v - x‖ / ‖x‖ in the F_λ norm, x = F_λ⁻¹ g; at the best length: of the best multiple of v. PCG "
        "iterations: on F_λ x = g to a residual of 1e-6; 5000 means not reached. Means over 10 seeds."
    ]
    parts += _microscope_parts(root, "kfac", "one level")
    parts += _microscope_parts(root, "two_level_kfac", "two levels")
    directions, spectrum = (
        load_measurement(root, "microscope", "kfac", name) for name in ("directions", "spectrum")
    )
    title = f"{MLP}, trained by one level"
    figure = microscope_figure(directions, spectrum, title, 5, PAPER["damping"])
    return Answer("\n\n".join(parts), figure)


def convolutions(root: Path) -> Answer:
    coarse = load_measurement(root, "coarse_matrix", "resnet20_cifar10_preview", "coarse")
    numbers = {
        "normalised_off_diagonal": "off-diagonal share, normalised",
        "off_diagonal": "off-diagonal share",
        "distance": "distance to exact",
        "negative_eigenvalues": "negative eigenvalues",
    }
    parts = [f"**{label}**" for label in labels([coarse])]
    parts.append(coarse_markdown(coarse, ["epoch"], numbers))
    return Answer("\n\n".join(parts), convolutions_figure(coarse, numbers))


class Question(NamedTuple):
    """``name`` is the figure's file name."""

    name: str
    title: str
    answer: Callable[[Path], Answer]


QUESTIONS = (
    Question("q1_off_diagonal", "Is it the off-diagonal?", off_diagonal),
    Question("q2_ones_vector", "Is it the ones vector?", ones_vector),
    Question("q3_damping", "Damping", damping),
    Question("q4_initial_kick", "Is it an initial kick?", initial_kick),
    Question("q5_equal_tuning", "Equal tuning", equal_tuning),
    Question("q6_depth", "Depth and normalisation", depth),
    Question("q7_microscope", "The Fisher microscope", microscope),
    Question("q8_convolutions", "Convolutions", convolutions),
)


def _microscope_parts(root: Path, group: str, trained: str) -> list[str]:
    directions, coarse, spectrum = (
        load_measurement(root, "microscope", group, name) for name in ("directions", "coarse", "spectrum")
    )
    table = direction_table(directions)
    numbers = {
        "distance": "distance to Z F Zᵀ",
        "normalised_off_diagonal": "off-diagonal share, normalised",
        "off_diagonal": "off-diagonal share",
    }
    parts = [f"### Along the training by {trained}"]
    for statistics, what in STATISTICS.items():
        parts += [f"The Fisher {what}:", direction_markdown(table, statistics)]
    parts += ["Two levels minus one level, paired by seed [95% interval]:", change_markdown(directions)]
    parts += ["Coarse matrices:", coarse_markdown(coarse, ["statistics", "epoch"], numbers)]
    return [*parts, spectrum_markdown(spectrum, PAPER["damping"])]


def _variants(trainings: pd.DataFrame, settings: Mapping[str, Any], variants: Mapping[str, str]) -> Arms:
    """One level and the named variants at the same settings."""
    own = {name: choose(trainings, **settings, **VARIANT, coarse=coarse) for name, coarse in variants.items()}
    return {ONE_LEVEL: choose(trainings, **settings, **ONE)} | own


def _rates(trainings: pd.DataFrame, settings: dict[str, Any]) -> dict[float, pd.DataFrame]:
    return {lr: choose(trainings, **settings | {"lr": lr}) for lr in RATES}


def _arms_answer(arms: Arms, title: str, baselines: tuple[str, ...]) -> Answer:
    remarks = labels(arms.values())
    parts = [
        *(f"**{remark}**" for remark in remarks),
        FINAL,
        arm_markdown(arm_table(arms, baselines), baselines),
    ]
    return Answer("\n\n".join(parts), arms_figure(arms, title, remarks))


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


def _best_pairs(arms: Arms) -> str:
    names = list(arms)
    losses = {name: final_losses(curves) for name, curves in arms.items()}
    lines = []
    for name in names[1:]:
        for which, seeds in (("all seeds", range(10)), ("seeds 5 to 9", range(5, 10))):
            pair = paired_difference(losses[name].reindex(seeds), losses[names[0]].reindex(seeds))
            interval = mean_with_interval(pair["difference"], pair["low"], pair["high"])
            lines.append(f"- {name} minus {names[0]}, {which}: {interval}, {pair['seeds']} pairs")
    return "\n".join(lines)
