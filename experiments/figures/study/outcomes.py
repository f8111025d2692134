"""The study's headlines under both recorded losses: the minibatches' in training, and the test data's."""

from typing import Any

import pandas as pd

from experiments.figures.markdown import Columns, column, interval, markdown_table, mean_with_interval
from experiments.figures.statistics import final_summary, paired_ratio
from experiments.figures.study.records import Study
from experiments.records import FINAL_EPOCHS, Run
from experiments.study.arms import HEADLINES, TUNED, Arm

OUTCOMES = {
    "train": ("minibatch training loss", Run.final_losses),
    "test": ("test loss", Run.final_test_losses),
}
RULE = (
    f"Ratios of final losses, first / second arm, paired by seed: geometric means with 95% Student-t intervals. "
    f"The training loss is that of minibatches under their own batch statistics, a seed's mean over the last "
    f"{FINAL_EPOCHS} epochs; the test loss is that of the test data under running statistics, a seed's median over "
    "these epochs."
)
FIRST_HALF, SECOND_HALF = range(5), range(5, 10)


def headline_table(study: Study) -> pd.DataFrame:
    """A row for each of ``HEADLINES``: what is compared, the number of ``seeds``, and for each outcome ``o`` the
    ratio of the final losses with its interval (``o``, ``o_low``, ``o_high``) and how many pairs are below 1
    (``o_below``)."""
    return pd.DataFrame([_row(study, claim, *pair) for claim, pair in HEADLINES.items()])


def headline_markdown(table: pd.DataFrame) -> str:
    columns: Columns = [("first / second", column("claim")), ("seeds", column("seeds"))]
    for name, (heading, _) in OUTCOMES.items():
        below = column(f"{name}_below")
        columns = [*columns, (heading, interval(name, "{:.3f}")), ("seeds below 1", below)]
    return f"{RULE}\n\n{markdown_table(table.to_dict('records'), columns)}"


def chosen_by_test_loss(study: Study) -> str:
    """Each level's best of all that was trained at the paper's depth, chosen by the test loss of seeds 0 to 4."""
    best: dict[str, pd.Series] = {}
    for level, arms in TUNED.items():
        losses = {name: run.final_test_losses() for name, run in study.arms(arms).items()}
        name = min(losses, key=lambda name: final_summary(losses[name].reindex(FIRST_HALF))["median"])
        best[f"{level} ({name}, best of {len(arms)})"] = losses[name]
    (one, first), (two, second) = best.items()
    lines = [f"Chosen by the median test loss of seeds 0 to 4: {two} / {one}."]
    for which, seeds in (("all seeds", range(10)), ("seeds 5 to 9", SECOND_HALF)):
        pair = paired_ratio(second.reindex(seeds), first.reindex(seeds))
        interval_text = mean_with_interval(pair["ratio"], pair["low"], pair["high"], "{:.3f}")
        lines.append(f"- {which}: test loss {interval_text}, {pair['seeds']} pairs")
    return "\n".join([lines[0], "", *lines[1:]])


def _row(study: Study, claim: str, first: Arm, second: Arm) -> dict[str, Any]:
    row: dict[str, Any] = {"claim": claim}
    for name, (_, losses) in OUTCOMES.items():
        pair = paired_ratio(losses(study.run(first)), losses(study.run(second)))
        ends = {f"{name}_{end}": pair[end] for end in ("low", "high")}
        row |= {"seeds": pair["seeds"], name: pair["ratio"], f"{name}_below": pair["below"], **ends}
    return row
