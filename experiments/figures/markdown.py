"""Numbers and tables as Markdown text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.figures.statistics import SLOW_LOSS


def number(value: float, form: str = "{:.4f}") -> str:
    """``-`` for what is not there."""
    return "-" if np.isnan(value) else form.format(value)


def plain(value: Any) -> str:
    """A setting's value: numbers without trailing zeros."""
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def mean_with_interval(mean: float, low: float, high: float, form: str = "{:.4f}") -> str:
    return f"{number(mean, form)} [{number(low, form)}, {number(high, form)}]"


LOST = f"diverged + above {SLOW_LOSS}"
"""The heading of the numbers of lost seeds."""


def range_and_lost(row: Mapping[Any, Any]) -> tuple[str, str]:
    """Cells of ``final_summary``: the range over seeds; how many diverged, how many are slow, of how many."""
    return f"{number(row['lowest'])}-{number(row['highest'])}", f"{lost(row)} of {row['seeds']:.0f}"


def lost(row: Mapping[Any, Any], prefix: str = "") -> str:
    return f"{row[f'{prefix}diverged']:.0f} + {row[f'{prefix}slow']:.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well as plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
