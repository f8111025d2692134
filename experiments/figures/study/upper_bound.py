"""Whether curvature between layers can help: the exact natural gradient, whole and in blocks, by the rules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd

from experiments.figures.markdown import Columns, column, markdown_table
from experiments.figures.statistics import final_summary
from experiments.figures.study.decision import comparison, lowest
from experiments.figures.study.records import Study
from experiments.figures.study.words import compared
from experiments.records import NoRecordsError, Run
from experiments.study.arms import Arm
from experiments.study.decision import BLOCKS, EXACT, SELECTION, TEST, WHOLE, Net, Step, exact

CAN_HELP = 0.95
OUTCOMES: dict[str, Callable[[Run, int], pd.Series]] = {
    "full-batch training loss": Run.full_batch_losses,
    "test loss": Run.final_test_losses,
}
"""The rule's, which also chooses; and a seed's median over the epochs up to then."""
SHAPE = ("block_cosine", "block_ratio")
HOW = (
    "Seeds 0 to 4, each direction at its best λ and factor of that epoch. The last columns are what the block-diagonal "
    "direction does to the batch's logits, beside the whole one at the same parameters: medians over seeds of the "
    "epoch's means."
)


def best(study: Study, net: Net, correction: str, epoch: int) -> Step:
    """A direction's λ and factor of the lowest median outcome after an epoch."""
    return lowest(study, EXACT[net][correction], partial(Run.full_batch_losses, epoch=epoch))


def contestant(study: Study, net: Net, correction: str, epoch: int) -> Arm:
    """A direction at its best of an epoch, on the seeds that compare."""
    return exact(correction, best(study, net, correction, epoch), TEST, net)


def contestants(study: Study, net: Net) -> list[Arm]:
    """What is compared: whole and blocks, each at its best of every epoch."""
    chosen = [contestant(study, net, c, epoch) for c in (WHOLE, BLOCKS) for epoch in net.epochs]
    return list(dict.fromkeys(chosen))


def chosen_markdown(study: Study, net: Net) -> str:
    """For each direction that is trained: its best after each epoch, on the seeds that choose."""
    rows, missing = [], []
    for correction in EXACT[net]:
        try:
            rows += [_chosen_row(study, net, correction, epoch) for epoch in net.epochs]
        except NoRecordsError:
            missing.append(correction)
    if not rows:
        raise NoRecordsError("no direction is trained at all of its settings")
    columns: Columns = [
        ("direction", column("direction")),
        ("epoch", column("epoch")),
        ("λ", column("λ", "{:g}")),
        ("factor", column("factor", "{:g}")),
        ("full-batch training loss, median", column("median", "{:.4f}")),
        ("range", lambda row: f"{row['lowest']:.4f}-{row['highest']:.4f}"),
        ("cosine of blocks and whole", column("block_cosine", "{:.3f}")),
        ("length ratio", column("block_ratio", "{:.1f}")),
    ]
    text = f"{HOW}\n\n{markdown_table(rows, columns)}"
    return text + (f"\n\nNot trained yet: {', '.join(missing)}." if missing else "")


def verdict_markdown(study: Study, net: Net) -> str:
    """Whole against blocks on seeds that chose nothing under both outcomes, and what the rule makes of the first."""
    rows: list[dict[str, Any]] = []
    for outcome, losses in OUTCOMES.items():
        for epoch in net.epochs:
            whole, blocks = (
                losses(study.run(contestant(study, net, c, epoch)), epoch) for c in (WHOLE, BLOCKS)
            )
            rows.append({"outcome": outcome, "epoch": epoch, **compared(whole, blocks)})
    can = all(row["high"] < CAN_HELP for row in rows[: len(net.epochs)])
    said = "can help" if can else "is not shown to be able to help"
    columns: Columns = [(name, column(name)) for name in ("outcome", "epoch")]
    table = markdown_table(rows, [*columns, *comparison("whole / blocks")])
    return f"{table}\n\nBy the rule, cross-layer curvature **{said}** here."


def alike_markdown(study: Study, net: Net) -> str:
    """Whole against blocks where both are at one λ and factor, which the rule does not ask for; on the same seeds."""
    steps = [{best(study, net, c, epoch) for epoch in net.epochs} for c in (WHOLE, BLOCKS)]
    rows: list[dict[str, Any]] = []
    for step in sorted(set.intersection(*steps)):
        runs = [study.run(exact(c, step, TEST, net)) for c in (WHOLE, BLOCKS)]
        for outcome, losses in OUTCOMES.items():
            for epoch in net.epochs:
                whole, blocks = (losses(run, epoch) for run in runs)
                row = {"λ": step[0], "factor": step[1], "outcome": outcome, "epoch": epoch}
                rows.append(row | compared(whole, blocks))
    if not rows:
        return "No λ and factor was best for both."
    columns: Columns = [(name, column(name, "{:g}")) for name in ("λ", "factor")]
    columns += [(name, column(name)) for name in ("outcome", "epoch")]
    table = markdown_table(rows, [*columns, *comparison("whole / blocks")])
    return f"Not by the rule: both at one λ and factor.\n\n{table}"


def _chosen_row(study: Study, net: Net, correction: str, epoch: int) -> dict[str, Any]:
    damping, factor = step = best(study, net, correction, epoch)
    run = study.run(EXACT[net][correction][step])
    losses = run.full_batch_losses(epoch).reindex(SELECTION)
    shape = {name: run.table(name).loc[epoch].median() for name in SHAPE}
    return (
        {"direction": correction, "epoch": epoch, "λ": damping, "factor": factor}
        | final_summary(losses)
        | shape
    )
