"""Statistics over seeds, some of which may have diverged: mean with Student-t interval, median."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from experiments.records import FINAL_EPOCHS

SLOW_LOSS = 0.6  # nats, of a binary classifier; chance level is log 2 = 0.69


def seed_table(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One record's ``metric`` as a table, epochs by seeds, with NaN from a seed's divergence on.

    A seed has diverged from the first epoch on at which ``metric`` or its training loss is not
    finite, and stays diverged even if later values are finite: an accuracy computed from NaN
    outputs is a number, but means nothing.
    """
    alive = _finite_so_far(_pivot(curves, "train_loss"))
    values = _pivot(curves, metric)
    return values.where(alive & _finite_so_far(values))


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
        ValueError: ``log`` and a value that is not positive.
    """
    values = table.where(_finite_so_far(table))
    if log:
        if bool((values <= 0).to_numpy().any()):
            raise ValueError(
                f"a logarithmic axis needs positive values; the smallest is {values.min().min():g}"
            )
        values = values.map(math.log)
    seeds = values.count(axis=1)
    mean = values.mean(axis=1)
    quantile = stats.t.ppf(0.5 + confidence / 2, df=seeds - 1)
    half_width = quantile * values.std(axis=1, ddof=1) / np.sqrt(seeds)
    interval = pd.DataFrame({"mean": mean, "low": mean - half_width, "high": mean + half_width})
    if log:
        interval = interval.map(math.exp)
    return interval.assign(seeds=seeds, excluded=table.shape[1] - seeds)


def seed_median(table: pd.DataFrame) -> pd.Series:
    """Median of a loss over all seeds, epoch by epoch.

    A diverged seed counts as +inf: a median cannot be improved by seeds that fail.
    """
    return table.where(_finite_so_far(table)).fillna(np.inf).median(axis=1)


def final_losses(curves: pd.DataFrame, epochs: int = FINAL_EPOCHS) -> pd.Series:
    """The final training loss by seed: the mean over the last ``epochs``; NaN for a diverged seed."""
    return seed_table(curves, "train_loss").tail(epochs).mean(skipna=False)


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
    interval = seed_interval(pairs.to_frame().T, confidence=confidence).iloc[0]
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
    pair = paired_difference(first.map(math.log), second.map(math.log))
    bounds = {bound: math.exp(pair[bound]) for bound in ("low", "high")}
    below = int((first < second).sum())
    return {"ratio": math.exp(pair["difference"]), **bounds, "seeds": pair["seeds"], "below": below}


def _pivot(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    return curves.pivot(index="epoch", columns="seed", values=metric).sort_index()


def _finite_so_far(table: pd.DataFrame) -> pd.DataFrame:
    finite = np.logical_and.accumulate(np.isfinite(table.to_numpy(dtype=float)), axis=0)
    return pd.DataFrame(finite, index=table.index, columns=table.columns)
