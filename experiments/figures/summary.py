"""The numbers behind Figure 1: losses beside the committed ones, times, and the verdict."""

import numpy as np
import pandas as pd

from experiments.figures.curves import Runs, failures, machines, remarks, seed_counts
from experiments.figures.markdown import Columns, column, interval, markdown_table, paragraphs
from experiments.figures.statistics import SLOW_LOSS, seed_interval, seed_median
from experiments.figures.style import optimizer_styles
from experiments.figures.verdict import RULE, check_rule, verdict

EPOCHS = (5, 20, 100)
LOSS = "{:.4f}"
LOSSES: Columns = [
    ("optimizer", column("label")),
    ("epoch", column("epoch")),
    ("median", column("median", LOSS)),
    ("mean [95% interval]", interval("mean", prefix="")),
    ("diverged", column("diverged", "{:.0f}")),
    ("slow", column("slow", "{:.0f}")),
    ("committed median", column("committed", LOSS)),
]
ENDS: Columns = [
    ("optimizer", column("label")),
    ("epochs", column("epochs")),
    ("seconds", column("seconds", "{:.1f}")),
    ("median loss at the end", column("median", LOSS)),
    ("committed median", column("committed", LOSS)),
]
CHECKS: Columns = [
    ("part of the rule", column("question")),
    ("answer", column("answer")),
    ("numbers", column("detail")),
]


def summary_markdown(runs: Runs, reference: Runs | None = None, is_reference: bool = False) -> str:
    """The runs of the deep linear MLP beside the committed ``reference``, and the verdict.

    ``is_reference``: they are the committed ones themselves, and only the part of the rule that
    compares optimizers with each other applies.
    """
    checks = check_rule(runs, reference)
    if is_reference:
        checks = [check for check in checks if "committed" not in check.question]
    shown = -1 if is_reference else None  # the last column is the reference's
    return paragraphs(
        f"Training loss over {seed_counts(runs)}. The mean and its interval leave diverged seeds "
        f"out; slow: seeds with a loss above {SLOW_LOSS}.",
        remarks(runs),
        markdown_table(loss_table(runs, reference or {}).to_dict("records"), LOSSES[:shown]),
        failures({style.label: runs[name] for name, style in optimizer_styles(runs).items()}),
        f"Wall-clock time of a run, all its seeds side by side ({machines(runs)}).",
        markdown_table(end_table(runs, reference or {}).to_dict("records"), ENDS[:shown]),
        RULE,
        markdown_table([check._asdict() for check in checks], CHECKS),
        "These are the committed records themselves." if is_reference else f"**Verdict: {verdict(checks)}.**",
    )


def loss_table(runs: Runs, reference: Runs) -> pd.DataFrame:
    """Training loss over seeds, one row per (optimizer, epoch), with the optimizer's ``label``.

    ``median`` counts a diverged seed as +inf; the arithmetic ``mean`` and its 95% Student-t
    interval (``low``, ``high``) leave it out. ``diverged`` and ``slow`` (loss above ``SLOW_LOSS``)
    count seeds. ``committed`` is the reference's median. What is not there is NaN.
    """
    rows = []
    for name, style in optimizer_styles(runs).items():
        table = runs[name].table("train_loss")
        committed = seed_median(reference[name].table("train_loss")) if name in reference else np.nan
        columns = seed_interval(table).rename(columns={"excluded": "diverged"})
        columns = columns.assign(median=seed_median(table), slow=(table > SLOW_LOSS).sum(axis=1))
        columns = columns.assign(committed=committed).reindex(EPOCHS)
        rows.append(columns.assign(optimizer=name, label=style.label))
    return pd.concat(rows).rename_axis("epoch").reset_index()


def end_table(runs: Runs, reference: Runs) -> pd.DataFrame:
    """The end of each run: number of ``epochs``, wall-clock ``seconds``, ``median`` training loss.

    ``committed`` is the reference's median at the same epoch, NaN where it has none.
    """
    rows = []
    for name, style in optimizer_styles(runs).items():
        run = runs[name]
        row = {"optimizer": name, "label": style.label, "epochs": run.epochs}
        row["seconds"] = max(run.curves["seconds"])
        row["median"] = seed_median(run.table("train_loss"))[run.epochs]
        committed = seed_median(reference[name].table("train_loss")) if name in reference else pd.Series()
        rows.append(row | {"committed": committed.get(run.epochs, np.nan)})
    return pd.DataFrame(rows)
