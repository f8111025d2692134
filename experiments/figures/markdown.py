"""Numbers and tables as Markdown text. A table is a list of rows and a cell for each of its headings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.figures.statistics import SLOW_LOSS

Row = Mapping[Any, Any]
Cell = Callable[[Row], str]
Columns = Sequence[tuple[str, Cell]]


def number(value: float, form: str = "{:.4f}") -> str:
    """``-`` for what is not there."""
    return "-" if np.isnan(value) else form.format(value)


def plain(value: Any) -> str:
    """A setting's value: numbers without trailing zeros."""
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def mean_with_interval(mean: float, low: float, high: float, form: str = "{:.4f}") -> str:
    return f"{number(mean, form)} [{number(low, form)}, {number(high, form)}]"


def column(name: str, form: str = "{}") -> Cell:
    """A row's entry; ``-`` for what is not there."""

    def cell(row: Row) -> str:
        value = row.get(name, np.nan)
        return "-" if value != value else form.format(value)

    return cell


def setting(name: str) -> Cell:
    """A row's entry, a setting's value."""
    return lambda row: plain(row[name])


def interval(name: str, form: str = "{:.4f}", prefix: str | None = None) -> Cell:
    """A row's entry with its interval, whose ends are called ``<prefix>low`` and ``<prefix>high``, by default
    ``<name>_low`` and ``<name>_high``; ``-`` if the row has none."""
    ends = [f"{name}_{end}" if prefix is None else f"{prefix}{end}" for end in ("low", "high")]
    return lambda row: mean_with_interval(row[name], row[ends[0]], row[ends[1]], form) if name in row else "-"


def lost(prefix: str = "") -> Cell:
    """Of ``final_summary``: how many seeds diverged, and how many are slow."""
    return lambda row: f"{row[f'{prefix}diverged']:.0f} + {row[f'{prefix}slow']:.0f}"


LOST = f"diverged + above {SLOW_LOSS}"
RANGE: Columns = [
    ("range", lambda row: f"{number(row['lowest'])}-{number(row['highest'])}"),
    (LOST, lambda row: f"{lost()(row)} of {row['seeds']:.0f}"),
]
"""Of ``final_summary``."""


def markdown_table(rows: Iterable[Row], columns: Columns) -> str:
    """A Markdown table, padded so that it reads well as plain text too."""
    lines = [[heading for heading, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def paragraphs(*texts: str) -> str:
    """Those that are not empty."""
    return "\n\n".join(filter(None, texts)) + "\n"
