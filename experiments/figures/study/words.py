"""The words that results/study/rules.md gives to ratios paired by seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.figures.statistics import paired_ratio

AHEAD = 0.97
EQUAL = (0.95, 1.05)
LEVEL = 0.05


def compared(first: pd.Series, second: pd.Series) -> dict[str, Any]:
    """``paired_ratio`` with ``p`` of the paired two-sided t-test of the logarithms, how many seeds are ``left_out``
    because they diverged in either arm, and the ``word``. Without two pairs there is no interval and no p."""
    pair: dict[str, Any] = paired_ratio(first, second)
    logarithms = np.log((first / second).dropna())
    _, p = stats.ttest_1samp(logarithms, 0) if len(logarithms) > 1 else (np.nan, np.nan)
    left_out = len(first.index.intersection(second.index)) - len(logarithms)
    return pair | {"p": p, "left_out": left_out, "word": word(pair["low"], pair["high"])}


def together(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons of one table, whose "ahead" and "behind" must also withstand Holm's correction."""
    adjusted = holm([pair["p"] for pair in pairs])
    return [
        pair | {"p": p, "word": word(pair["low"], pair["high"], p)}
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def word(low: float, high: float, p: float = 0.0) -> str:
    """Of an interval, and of its test where it is one of several."""
    if p < LEVEL and high < AHEAD:
        return "ahead"
    if p < LEVEL and low > 1 / AHEAD:
        return "behind"
    if low >= EQUAL[0] and high <= EQUAL[1]:
        return "equal"
    return "undecided"


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the given order; a missing one is not counted and stays missing."""
    adjusted, largest = [np.nan] * len(ps), 0.0
    given = sorted((p, i) for i, p in enumerate(ps) if not np.isnan(p))
    for rank, (p, i) in enumerate(given):
        largest = max(largest, min(1.0, p * (len(given) - rank)))
        adjusted[i] = largest
    return adjusted
