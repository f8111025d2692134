"""Statistics over seeds, some of which may have diverged: mean with Student-t interval, median."""

import math
import sys

import numpy as np
import pandas as pd
from scipy import stats

from experiments.records.runs import finite_so_far

LARGEST_LOG = math.log(sys.float_info.max)
SLOW_LOSS = 0.6  # nats, of a binary classifier; chance level is log 2 = 0.69


def seed_interval(table: pd.DataFrame, *, log: bool = False, confidence: float = 0.95) -> pd.DataFrame:
    """Mean over seeds with its Student-t interval (n - 1 degrees of freedom), epoch by epoch.

    Args:
        table: values, epochs by seeds. A seed is left out from its first non-finite value on, for
            good.
        log: compute mean and interval on the logarithm and map them back, for a logarithmic axis:
            the mean is then the geometric mean.
        confidence: coverage of the interval.

    Returns:
        Indexed by epoch: ``mean``, ``low``, ``high``, the number of ``seeds`` that entered, and the
        number ``excluded`` so far. One seed has no interval (NaN), no seed no mean.

    Raises:
        ValueError: ``log`` and a negative value. A value of zero makes the geometric mean zero, without interval.
    """
    values = table.where(finite_so_far(table))
    if log:
        if bool((values < 0).to_numpy().any()):
            raise ValueError(
                f"a logarithmic axis needs positive values; the smallest is {values.min().min():g}"
            )
        values = values.map(_log)
    interval = _student(values, confidence)
    if log:
        for column in ("mean", "low", "high"):
            interval[column] = interval[column].map(_exp)
    return interval.assign(excluded=table.shape[1] - interval["seeds"])


def seed_median(table: pd.DataFrame) -> pd.Series:
    """Median of a loss over all seeds, epoch by epoch.

    A diverged seed counts as +inf: a median cannot be improved by seeds that fail.
    """
    return table.where(finite_so_far(table)).fillna(np.inf).median(axis=1)


def final_summary(losses: pd.Series) -> dict[str, float]:
    """Of final losses by seed: the number of ``seeds``, of these ``diverged`` and ``slow`` (not diverged, and above
    ``SLOW_LOSS``), and ``median``, ``lowest`` and ``highest``, in which a diverged seed counts as infinite."""
    counted = losses.fillna(np.inf)
    numbers = {"median": counted.median(), "lowest": counted.min(), "highest": counted.max()}
    counts = {"diverged": int(losses.isna().sum()), "slow": int((losses > SLOW_LOSS).sum())}
    return {"seeds": len(losses), **counts, **numbers}


def paired_difference(first: pd.Series, second: pd.Series, confidence: float = 0.95) -> dict[str, float]:
    """The mean of ``first - second`` over the seeds that both have, paired by seed.

    Args: values by seed; a diverged seed's is NaN and leaves the pair out.

    Returns: ``difference`` with its Student-t interval ``low``, ``high``, and the number of ``seeds``.
    """
    pairs = (first - second).dropna()
    interval = _student(pairs.to_frame().T, confidence).iloc[0]
    return {
        "difference": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
        "seeds": len(pairs),
    }


def paired_ratio(first: pd.Series, second: pd.Series) -> dict[str, float]:
    """The geometric mean of ``first / second`` over the seeds that both have, paired by seed.

    Args: positive values by seed; a diverged seed's is NaN and leaves the pair out.

    Returns: ``ratio`` with its 95% Student-t interval ``low``, ``high``, mapped back from that of the logarithms, and
        the number of ``seeds``, and of those at which first is ``below`` second.
    """
    pair = paired_difference(first.map(_log), second.map(_log))
    bounds = {bound: _exp(pair[bound]) for bound in ("low", "high")}
    below = int((first < second).sum())
    return {"ratio": _exp(pair["difference"]), **bounds, "seeds": pair["seeds"], "below": below}


def _student(values: pd.DataFrame, confidence: float) -> pd.DataFrame:
    seeds = values.count(axis=1)
    mean = values.mean(axis=1)
    quantile = stats.t.ppf(0.5 + confidence / 2, df=seeds - 1)
    with np.errstate(invalid="ignore"):  # nothing deviates from a mean of -inf by a number
        half_width = quantile * values.std(axis=1, ddof=1) / np.sqrt(seeds)
    return pd.DataFrame({"mean": mean, "low": mean - half_width, "high": mean + half_width, "seeds": seeds})


def _log(value: float) -> float:
    """-inf for a loss of exactly zero."""
    return math.log(value) if value != 0 else -math.inf


def _exp(value: float) -> float:
    """inf for an interval of a few seeds so far apart that its end is no floating-point number."""
    return math.exp(value) if not value > LARGEST_LOG else math.inf
