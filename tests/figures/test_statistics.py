import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.figures.statistics import paired_difference, paired_ratio, seed_interval, seed_median


def table(*rows: list[float]) -> pd.DataFrame:
    """One row per epoch, one column per seed."""
    return pd.DataFrame(rows, index=range(1, len(rows) + 1), dtype=float)


def test_interval_by_hand() -> None:
    # Mean 3, standard deviation sqrt(2.5), t quantile of 4 degrees of freedom 2.7764.
    interval = seed_interval(table([1, 2, 3, 4, 5])).loc[1]
    half_width = 2.7764451051977987 * math.sqrt(2.5) / math.sqrt(5)
    assert interval["mean"] == pytest.approx(3)
    assert interval["low"] == pytest.approx(3 - half_width)
    assert interval["high"] == pytest.approx(3 + half_width)
    assert (interval["seeds"], interval["excluded"]) == (5, 0)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_agrees_with_scipy(confidence: float) -> None:
    values = np.random.default_rng(0).normal(size=(3, 7))
    interval = seed_interval(table(*values.tolist()), confidence=confidence)
    for epoch, row in enumerate(values, start=1):
        expected = stats.ttest_1samp(row, 0).confidence_interval(confidence)
        assert interval.loc[epoch, "low"] == pytest.approx(expected.low)
        assert interval.loc[epoch, "high"] == pytest.approx(expected.high)


def test_log_interval_is_the_interval_of_the_logarithm() -> None:
    values = table([0.1, 1.0, 10.0], [2.0, 4.0, 8.0])
    interval = seed_interval(values, log=True)
    assert interval["mean"].tolist() == pytest.approx([1.0, 4.0])
    expected = np.exp(seed_interval(values.map(math.log))[["low", "high"]].to_numpy())
    assert interval[["low", "high"]].to_numpy() == pytest.approx(expected)
    assert min(interval["low"]) > 0


def test_log_interval_refuses_values_without_logarithm() -> None:
    with pytest.raises(ValueError, match="positive values; the smallest is -2"):
        seed_interval(table([1, -2]), log=True)


@pytest.mark.filterwarnings("error")
def test_a_loss_of_zero_and_seeds_far_apart_have_a_mean() -> None:
    zero = seed_interval(table([0.0, 0.5]), log=True).loc[1]
    assert (zero["mean"], zero["seeds"]) == (0, 2)
    assert math.isnan(zero["high"])
    apart = seed_interval(table([3e38, 1e-300]), log=True).loc[1]
    assert (apart["low"], apart["high"]) == (0, math.inf)
    assert apart["mean"] == pytest.approx(math.sqrt(3e38 * 1e-300))
    assert paired_ratio(pd.Series([0.0, 1.0]), pd.Series([1.0, 1.0]))["ratio"] == 0


def test_one_seed_has_a_mean_but_no_interval() -> None:
    interval = seed_interval(table([0.5])).loc[1]
    assert interval["mean"] == 0.5
    assert math.isnan(interval["low"])
    assert math.isnan(interval["high"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_seed_is_left_out_for_good(bad: float) -> None:
    interval = seed_interval(table([1, 2, 9], [1, 2, bad], [1, 2, 9]), log=True)
    assert interval["excluded"].tolist() == [0, 1, 1]
    assert interval["seeds"].tolist() == [3, 2, 2]
    assert interval["mean"].tolist() == pytest.approx([18 ** (1 / 3), 2**0.5, 2**0.5])


def test_no_seed_left_gives_nan() -> None:
    interval = seed_interval(table([1, 2], [math.nan, math.inf]))
    assert math.isnan(interval.loc[2, "mean"])
    assert interval.loc[2, "excluded"] == 2


def test_median_counts_a_diverged_seed_as_infinite() -> None:
    nan = math.nan
    values = table([1, 2, 3, 4, 5], [1, nan, 3, 4, 5], [1, 2, 3, nan, nan])
    assert seed_median(values).tolist() == [3, 4, math.inf]


def test_paired_difference_is_a_paired_t_test() -> None:
    first = pd.Series([1.0, 2.0, 4.0, math.nan, 7.0], index=[0, 1, 2, 3, 5])
    second = pd.Series([0.5, 2.5, 2.0, 1.0, 9.0], index=[0, 1, 2, 3, 4])
    pair = paired_difference(first, second)
    interval = stats.ttest_rel([1, 2, 4], [0.5, 2.5, 2]).confidence_interval()
    assert pair["difference"] == pytest.approx(2 / 3)
    assert (pair["low"], pair["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert pair["seeds"] == 3
