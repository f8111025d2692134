"""What the arms of ``experiments.study.decision`` say, by the rules in results/study/rules.md."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from experiments.figures.markdown import Columns, column, interval, markdown_table
from experiments.figures.statistics import final_summary
from experiments.figures.study.records import Study
from experiments.figures.study.words import compared, together
from experiments.records import Run
from experiments.study.arms import FULL, ONE_LEVEL, Arm
from experiments.study.decision import (
    CONTROLS,
    GRID,
    LENGTHS,
    PAPERS,
    RATES,
    REPEATED,
    SELECTION,
    TEST,
    Setting,
    arm,
)

K = TypeVar("K")
Outcome = Callable[[Run], pd.Series]
OUTCOMES: dict[str, Outcome] = {
    "full-batch training loss": Run.full_batch_losses,
    "test loss": Run.final_test_losses,
    "minibatch training loss": Run.final_losses,
}
SELECTED_BY = tuple(OUTCOMES)[:2]
ONE, TWO = GRID
RULE = (
    "Ratios are geometric means paired by seed, with 95% Student-t intervals; the words are those of "
    "[the rules](rules.md). A seed that diverged counts as infinite in medians and leaves its pair out of ratios."
)


def named(setting: Setting) -> str:
    damping, rate, momentum = setting
    return f"λ {damping:g}, η {rate:g}, μ {momentum:g}"


def lowest(study: Study, arms: Mapping[K, Arm], outcome: Outcome) -> K:
    """The settings of the lowest median outcome on the seeds that choose.

    Raises:
        NoRecordsError: an arm is not trained.
    """
    medians = {
        setting: final_summary(outcome(run).reindex(SELECTION))["median"]
        for setting, run in study.arms(arms).items()
    }
    return min(medians, key=lambda setting: medians[setting])


def chosen(study: Study, level: str, outcome: str) -> Setting:
    """What a level is compared with, chosen by an outcome."""
    return lowest(study, GRID[level], OUTCOMES[outcome])


def finalists(study: Study) -> dict[tuple[str, str], Arm]:
    """By outcome and level, what was chosen by that outcome, on the seeds that compare."""
    return {
        (outcome, level): arm(level, chosen(study, level, outcome), TEST)
        for outcome in SELECTED_BY
        for level in GRID
    }


def paper_markdown(study: Study) -> str:
    """Two levels against one at the paper's settings, and how well an outcome repeats."""
    runs, again = study.arms(PAPERS), study.arms(REPEATED)
    rows = []
    for outcome, losses in OUTCOMES.items():
        own = {level: losses(run) for level, run in runs.items()}
        spread = {
            f"{level}, spread": float(np.log(losses(again[level]) / own[level].reindex(SELECTION)).std())
            for level in runs
        }
        medians = {level: final_summary(values)["median"] for level, values in own.items()}
        rows.append({"outcome": outcome, **medians, **compared(own[TWO], own[ONE]), **spread})
    columns: Columns = [
        ("outcome", column("outcome")),
        *((f"{level}, median", column(level, "{:.4f}")) for level in GRID),
        *comparison("two / one"),
        *((f"repeatability, {level}", column(f"{level}, spread", "{:.3f}")) for level in GRID),
    ]
    return (
        "Seeds 0 to 9. Repeatability: the standard deviation over seeds 0 to 4 of the logarithm of the ratio between "
        f"two trainings that differ in rounding alone.\n\n{markdown_table(rows, columns)}"
    )


def grid_markdown(study: Study) -> str:
    """Median outcomes on the seeds that choose, a table for each outcome that chooses."""
    parts = []
    for outcome in SELECTED_BY:
        rows: dict[tuple[str, float, float], dict[Any, Any]] = {}
        for level in GRID:
            for (damping, rate, momentum), run in study.arms(GRID[level]).items():
                found = final_summary(OUTCOMES[outcome](run).reindex(SELECTION))
                row = rows.setdefault(
                    (level, momentum, damping), {"level": level, "μ": momentum, "λ": damping}
                )
                lost = int(found["diverged"] + found["slow"])
                row[rate] = f"{found['median']:.4f}" + (f" ({lost} lost)" if lost else "")
        columns: Columns = [
            ("", column("level")),
            *((name, column(name, "{:g}")) for name in ("μ", "λ")),
            *((f"η {rate:g}", column(rate)) for rate in RATES),  # pyright: ignore[reportArgumentType]
        ]
        parts.append(f"Median {outcome}, seeds 0 to 4:\n\n{markdown_table(rows.values(), columns)}")
    return "\n\n".join(parts)


def tuned_markdown(study: Study) -> str:
    """Each level's best against the other's, on seeds that chose nothing, under every outcome."""
    rows = []
    for selected_by in SELECTED_BY:
        settings = {level: chosen(study, level, selected_by) for level in GRID}
        runs = {level: study.run(arm(level, settings[level], TEST)) for level in GRID}
        for outcome, losses in OUTCOMES.items():
            own = {level: losses(run) for level, run in runs.items()}
            medians = {level: final_summary(values)["median"] for level, values in own.items()}
            rows.append(
                {"by": selected_by, "outcome": outcome, **medians, **compared(own[TWO], own[ONE])}
                | {f"{level} at": named(settings[level]) for level in GRID}
            )
    columns: Columns = [
        ("chosen by", column("by")),
        *((level, column(f"{level} at")) for level in GRID),
        ("outcome", column("outcome")),
        *((f"{level}, median", column(level, "{:.4f}")) for level in GRID),
        *comparison("two / one"),
    ]
    return markdown_table(rows, columns)


def controls_markdown(study: Study) -> str:
    """Each direction against one level and against the full one at the same kind of length."""
    runs = study.arms(CONTROLS)
    parts = []
    for outcome in SELECTED_BY:
        losses = {name: OUTCOMES[outcome](run) for name, run in runs.items()}
        medians = [{"arm": name, **final_summary(values)} for name, values in losses.items()]
        columns: Columns = [
            ("arm", column("arm")),
            ("median", column("median", "{:.4f}")),
            ("diverged", column("diverged")),
            ("above 0.6", column("slow")),
        ]
        parts.append(f"{outcome}:\n\n{markdown_table(medians, columns)}")
        for baseline in (ONE_LEVEL, *(f"{FULL}, {length}" for length in LENGTHS)):
            parts.append(_against(losses, baseline))
    return "\n\n".join(parts)


def _against(losses: Mapping[str, pd.Series], baseline: str) -> str:
    _, _, length = baseline.partition(", ")
    others = [name for name in losses if name != baseline and (not length or name.endswith(f", {length}"))]
    pairs = together([compared(losses[name], losses[baseline]) for name in others])
    rows = [{"arm": name} | pair for name, pair in zip(others, pairs, strict=True)]
    return markdown_table(rows, [(f"against {baseline}", column("arm")), *comparison("ratio"), P])


P = ("p (Holm)", column("p", "{:.2g}"))


def comparison(heading: str) -> Columns:
    """Of ``compared``."""
    return [
        (heading, interval("ratio", "{:.3f}", prefix="")),
        ("pairs below 1", lambda row: f"{row['below']} of {row['seeds']:.0f}"),
        ("left out", column("left_out")),
        ("word", column("word")),
    ]
