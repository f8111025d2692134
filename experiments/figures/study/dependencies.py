"""How a small ViT's parts change what blocks do beside the whole natural gradient (rules, 7)."""

from typing import Any

import pandas as pd

from experiments.figures.markdown import Columns, column, markdown_table
from experiments.figures.study.records import Study
from experiments.study.arms import PARTS_OF_A_VIT
from experiments.study.decision import WITHOUT

LOW = 0.7
"""A cosine below it in all seeds, at one λ at both times, is what the rule asks for."""


def dependencies_markdown(study: Study) -> str:
    """A row for each net: each seed's cosines and the median length ratio by λ and time."""
    tables = {
        parts: study.measurement("dependencies", arm.group, "directions") for parts, arm in WITHOUT.items()
    }
    (first, last), dampings = (
        sorted(next(iter(tables.values()))[name].unique()) for name in ("epoch", "damping")
    )
    rows = []
    for parts, table in tables.items():
        row: dict[str, Any] = {part: "no" if part in parts else "yes" for part in PARTS_OF_A_VIT}
        for damping in dampings:
            for epoch in (first, last):
                own = table.loc[(table["damping"] == damping) & (table["epoch"] == epoch)].set_index("seed")
                cosines = ", ".join(f"{value:.2f}" for value in own["cosine"].sort_index())
                row[f"{damping:g}, {epoch}"] = f"{cosines}; {own['ratio'].median():.1f}"
        rows.append(row | {"loss": _losses(table, last), "may need": "yes" if may_need(table) else "no"})
    columns: Columns = [
        *((part.replace("_", " "), column(part)) for part in PARTS_OF_A_VIT),
        *((f"λ {d:g}, epoch {e}", column(f"{d:g}, {e}")) for d in dampings for e in (first, last)),
        ("loss, last epoch", column("loss")),
        ("may need it", column("may need")),
    ]
    return (
        "Cosine of blocks and whole in the logits for each seed; the median of their length ratio.\n\n"
        f"{markdown_table(rows, columns)}"
    )


def may_need(table: pd.DataFrame) -> bool:
    """By the rule."""
    return any(bool((own["cosine"] < LOW).all()) for _, own in table.groupby("damping"))


def _losses(table: pd.DataFrame, epoch: int) -> str:
    losses = table.loc[table["epoch"] == epoch].groupby("seed")["loss"].first()
    return ", ".join(f"{value:.2f}" for value in losses)
