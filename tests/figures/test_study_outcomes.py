"""The study's headlines under both losses."""

import math

import pandas as pd
import pytest

from experiments.figures.study import outcomes
from experiments.figures.study.outcomes import headline_markdown, headline_table
from experiments.records import Run
from experiments.study.arms import HEADLINES, TRAININGS, TUNED, Arm, one, two
from tests.figures.conftest import run_of


def losses(train: list[float], test: list[float]) -> Run:
    """Two seeds at twice as much in the second, a row per epoch."""
    rows = [
        {"seed": seed, "epoch": epoch, "train_loss": (1 + seed) * one, "test_loss": (1 + seed) * other}
        for seed in range(2)
        for epoch, (one, other) in enumerate(zip(train, test, strict=True), start=1)
    ]
    return run_of(pd.DataFrame(rows).assign(seconds=1.0))


def test_the_test_loss_is_a_median_which_spikes_leave_alone() -> None:
    run = losses([1.0] * 6, [9.0, 1.0, 1.0, 100.0, 1.0, 1.0])
    assert run.final_test_losses().tolist() == [1.0, 2.0]
    diverged = losses([1.0] * 6, [1.0, 1.0, 1.0, math.inf, 1.0, 1.0])
    assert diverged.final_test_losses().isna().all()


def test_both_outcomes_of_a_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {two(): losses([1.0] * 5, [3.0] * 5), one(): losses([2.0] * 5, [1.0] * 5)}

    class Study:
        def run(self, arm: Arm) -> Run:
            return runs[arm]

    monkeypatch.setattr(outcomes, "HEADLINES", {"two / one": (two(), one())})
    (row,) = headline_table(Study()).to_dict("records")  # pyright: ignore[reportArgumentType]
    assert (row["train"], row["test"]) == (pytest.approx(0.5), pytest.approx(3.0))
    assert (row["train_below"], row["test_below"], row["seeds"]) == (2, 0, 2)
    text = headline_markdown(pd.DataFrame([row]))
    assert "0.500 [0.500, 0.500]" in text
    assert "3.000 [3.000, 3.000]" in text


def test_headlines_compare_arms_that_are_trained() -> None:
    assert {arm for pair in HEADLINES.values() for arm in pair} <= set(TRAININGS)
    assert {arm for arms in TUNED.values() for arm in arms.values()} <= set(TRAININGS)
