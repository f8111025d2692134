"""The rules' fourth and fifth hypotheses: a damping that adapts itself, and convolutions."""

from typing import Any

from experiments.figures.markdown import Columns, column, interval, markdown_table
from experiments.figures.statistics import final_summary
from experiments.figures.study.decision import OUTCOMES, SELECTED_BY, P, comparison, lowest
from experiments.figures.study.records import Study
from experiments.figures.study.words import compared, together
from experiments.records import NoRecordsError, Run
from experiments.study.arms import FORMED, ONE_LEVEL
from experiments.study.decision import ADAPTIVE, CONVOLUTIONAL, FIXED, RECONCILED, SELECTION

PRIMARY = next(iter(OUTCOMES))
WORKS = 1.05
"""The largest upper limit of adaptive over fixed."""
SHAPE = {"ν": "nu", "correction / one-level step": "coarse_ratio", "negative eigenvalues": "coarse_negative"}
ENDS = {
    "training loss": lambda run: run.table("train_loss").iloc[-1],
    "test error": lambda run: 1 - run.table("test_accuracy").iloc[-1],
}


def adaptive_markdown(study: Study) -> str:
    """From every λ₀ against the fixed λ of the lowest median outcome, and what the rule makes of it."""
    rows: list[dict[str, Any]] = []
    for level, arms in ADAPTIVE.items():
        best = lowest(study, FIXED[level], OUTCOMES[PRIMARY])
        for start, run in study.arms(arms).items():
            own = final_summary(run.full_batch_losses())
            for outcome, losses in OUTCOMES.items():
                fixed = losses(study.run(FIXED[level][best])).reindex(SELECTION)
                values = losses(run)
                rows.append(
                    {"level": level, "λ₀": start, "outcome": outcome, "best": best}
                    | {"lost": own["diverged"] + own["slow"], "median": final_summary(values)["median"]}
                    | {"fixed": final_summary(fixed)["median"], **compared(values, fixed)}
                )
    decides = [row for row in rows if row["outcome"] == PRIMARY]
    works = all(row["high"] < WORKS and not row["lost"] for row in decides)
    columns: Columns = [
        ("", column("level")),
        ("λ₀", column("λ₀", "{:g}")),
        ("outcome", column("outcome")),
        ("median", column("median", "{:.4f}")),
        ("diverged or above 0.6", column("lost")),
        ("best fixed λ", column("best", "{:g}")),
        ("its median", column("fixed", "{:.4f}")),
        ("adaptive / fixed", interval("ratio", "{:.3f}", prefix="")),
    ]
    said = "works" if works else "does not work"
    return (
        f"Seeds 0 to 4.\n\n{markdown_table(rows, columns)}\n\nBy the rule, adaptive damping **{said}** here."
    )


def convolutions_markdown(study: Study) -> str:
    """Each coarse matrix against one level after the last epoch, and what became of the step there."""
    runs = study.arms(CONVOLUTIONAL)
    columns: Columns = [
        ("", column("arm")),
        *((name, column(name)) for name in ENDS),
        *((name, column(name, "{:.3g}")) for name in SHAPE),
    ]
    rows = [{"arm": name} | _ends(run) | _shape(run) for name, run in runs.items()]
    parts = [
        f"Each seed's, and medians over seeds of the last epoch's means.\n\n{markdown_table(rows, columns)}"
    ]
    others = [name for name in runs if name != ONE_LEVEL]
    for outcome, ends in ENDS.items():
        pairs = together([compared(ends(runs[name]), ends(runs[ONE_LEVEL])) for name in others])
        said = [
            {"arm": name} | pair | {"word": pair["word"].replace("equal", "undecided")}
            for name, pair in zip(others, pairs, strict=True)
        ]
        heading = f"{outcome}, against {ONE_LEVEL}"
        parts.append(markdown_table(said, [(heading, column("arm")), *comparison("ratio"), P]))
    devices = "; ".join(f"{name}: {run.machines}" for name, run in runs.items())
    return "\n\n".join([*parts, f"Trained on: {devices}."])


def reconciled_markdown(study: Study) -> str:
    """The trained forms, bases and dampings against one level, under the two outcomes that choose elsewhere."""
    parts, missing = [], []
    for damping, arms in RECONCILED.items():
        runs = {}
        for name, arm in arms.items():
            try:
                runs[name] = study.run(arm)
            except NoRecordsError:
                missing.append(f"{_spelled_out(name)} at λ {damping:g}")
        if len(runs) < 2 or ONE_LEVEL not in runs:
            continue
        for outcome in SELECTED_BY:
            losses = {name: OUTCOMES[outcome](run).reindex(SELECTION) for name, run in runs.items()}
            base = losses.pop(ONE_LEVEL)
            pairs = together([compared(own, base) for own in losses.values()])
            rows = [
                {"arm": name, **final_summary(own), **pair}
                for (name, own), pair in zip(losses.items(), pairs, strict=True)
            ]
            columns: Columns = [
                ("form, basis, damping", lambda row: _spelled_out(row["arm"])),
                ("median", column("median", "{:.4f}")),
                ("diverged", column("diverged")),
                ("above 0.6", column("slow")),
                *comparison("/ one level"),
                P,
            ]
            heading = f"λ {damping:g}, {outcome}; one level's median {final_summary(base)['median']:.4f}:"
            parts.append(f"{heading}\n\n{markdown_table(rows, columns)}")
    if not parts:
        raise NoRecordsError("no form of the correction is trained beside one level")
    not_yet = [f"Not trained yet: {'; '.join(missing)}."] if missing else []
    return "\n\n".join(["Seeds 0 to 4.", *parts, *not_yet])


def _spelled_out(name: str) -> str:
    return name.replace("_", ", " if name in FORMED else " ")


def _ends(run: Run) -> dict[str, str]:
    return {name: ", ".join(f"{value:.3f}" for value in ends(run)) for name, ends in ENDS.items()}


def _shape(run: Run) -> dict[str, float]:
    return {name: float(run.table(metric).iloc[-1].median()) for name, metric in SHAPE.items()}
