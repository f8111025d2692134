"""The study's tables: which records belong to which arm, and numbers that can be checked by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.figures.grid import labels_of
from experiments.figures.statistics import paired_ratio
from experiments.figures.study.arms import arm_markdown, arm_table, arms_figure
from experiments.figures.study.lines import best_of, goal_table, good_region, line_table, ratio_row
from experiments.figures.study.microscope import change_markdown, direction_table, over_seeds
from experiments.figures.study.records import Study
from experiments.records import NoRecordsError, RecordError, Run, load_measurement
from experiments.study.arms import FULL, ONE_LEVEL, one
from tests.figures.conftest import run_of

Write = Callable[..., Path]


def training_of(losses: dict[int, list[float]], **columns: Any) -> Run:
    """A run with these losses by seed, and other columns."""
    rows = [
        {"seed": seed, "epoch": epoch, "train_loss": loss, "seconds": 2.0 * epoch}
        for seed, values in losses.items()
        for epoch, loss in enumerate(values, start=1)
    ]
    return run_of(pd.DataFrame(rows).assign(**columns))


def constant(*losses: float, **columns: Any) -> Run:
    """Seeds 0, 1, … each at one loss for six epochs."""
    return training_of({seed: [loss] * 6 for seed, loss in enumerate(losses)}, **columns)


def test_an_arm_is_read_from_its_record(write_record: Write, tmp_path: Path) -> None:
    study = Study(tmp_path / "runs")
    with pytest.raises(NoRecordsError, match=r"/damping=1.0,seeds=0-1; make it with: make study"):
        study.run(one(damping=1.0, seeds=2))
    write_record("kfac", variant="seeds=0-1", seeds=[0, 1], epochs=2)
    write_record("kfac", variant="damping=1.0,seeds=0-1", seeds=[0, 1], epochs=3)
    arms = study.arms({"paper": one(seeds=2), "another λ": one(seeds=2, damping=1.0)})
    assert {name: run.epochs for name, run in arms.items()} == {"paper": 2, "another λ": 3}


def test_the_ratio_is_that_of_logarithms() -> None:
    first, second = pd.Series({0: 1.0, 1: 4.0, 2: math.nan}), pd.Series({0: 2.0, 1: 2.0, 2: 5.0})
    pair = paired_ratio(first, second)
    assert pair["ratio"] == pytest.approx(1)  # of 1/2 and 2
    assert pair["low"] == pytest.approx(1 / pair["high"])
    assert math.log(pair["high"]) == pytest.approx(
        12.706 * math.log(2), rel=1e-3
    )  # t of one degree of freedom
    assert (pair["seeds"], pair["below"]) == (2, 1)


def test_the_table_of_arms() -> None:
    arms = {
        ONE_LEVEL: constant(0.2, 0.4, 0.3),
        FULL: constant(0.1, 0.2, math.nan, nu=0.5, coarse_ratio=[*[1.0] * 6, *[3.0] * 12]),
    }
    table = arm_table(arms, [ONE_LEVEL]).set_index("arm")
    full = table.loc[FULL].to_dict()
    assert (full["seeds"], full["diverged"], full["median"], full["highest"]) == (3, 1, 0.2, math.inf)
    assert full["minus_one level"] == pytest.approx(-0.15)
    assert full["over_one level"] == pytest.approx(0.5)
    assert (full["below_one level"], full["pairs_one level"]) == (2, 2)
    assert (full["nu_1"], full["coarse_ratio_last"]) == (0.5, 2.0)  # the median over the two seeds alive
    one = table.loc[ONE_LEVEL].to_dict()
    assert math.isnan(one["over_one level"])
    assert math.isnan(one["coarse_ratio_1"])
    text = arm_markdown(arm_table(arms, [ONE_LEVEL]), [ONE_LEVEL])
    assert "1 + 0 of 3" in text
    assert "0.500 [0.500, 0.500]" in text


def test_a_curve_s_table() -> None:
    falling = [1 / epoch for epoch in range(1, 31)]
    table = arm_table({ONE_LEVEL: training_of({0: falling, 1: [2 * loss for loss in falling]})}, [ONE_LEVEL])
    row = table.iloc[0].to_dict()
    assert row["epoch_5"] == pytest.approx(1.5 / 5)
    assert row["epoch_20"] == pytest.approx(1.5 / 20)
    final = sum(falling[-5:]) / 5
    assert [row["lowest"], row["median"], row["highest"]] == pytest.approx([final, 1.5 * final, 2 * final])


def test_the_figure_says_how_many_seeds_diverged() -> None:
    diagnostics = {"nu": 0.5, "coarse_ratio": 0.0}
    arms = {ONE_LEVEL: constant(0.2, 0.4, **diagnostics), FULL: constant(0.1, math.nan, **diagnostics)}
    figure = arms_figure(arms, "title")
    assert [tick.get_text() for tick in figure.axes[1].get_yticklabels()] == ["full (1 of 2 pairs)"]
    _, labels_of_curves = figure.axes[0].get_legend_handles_labels()
    assert "full (1 of 2 seeds diverged)" in labels_of_curves


def test_a_line_s_good_region_and_its_best() -> None:
    line = {
        0.1: constant(1.0, 1.0),
        0.3: constant(0.52, 0.55),
        1.0: constant(0.4, 0.6),
        3.0: constant(0.1, math.nan),
    }
    table = line_table(line, "lr")
    assert table["median"].tolist() == [1.0, 0.535, 0.5, math.inf]  # the diverged seed counts as infinite
    assert good_region(table, "lr") == [0.3, 1.0]
    assert good_region(table, "lr", best=0.4) == []
    assert best_of(line, range(2)) == 1.0
    assert best_of(line, range(1, 2)) == 0.3
    lost = {1.0: constant(math.nan), 2.0: constant(math.nan)}
    assert good_region(line_table(lost, "lr"), "lr") == []
    with pytest.raises(ValueError, match="most seeds diverged in every training of the line"):
        best_of(lost, range(1))


def test_time_to_a_goal() -> None:
    arms = {
        "fast": training_of({0: [0.2, 0.04, 0.2], 1: [0.2, 0.2, 0.04], 2: [0.04, 0.3, 0.3]}),
        "never": training_of({0: [0.2, 0.2], 1: [0.04, 0.04], 2: [0.2, 0.2]}),
    }
    table = goal_table(arms).set_index("arm")
    assert (table.loc["fast", "epoch_0.05"], table.loc["fast", "seconds_0.05"]) == (2, 4.0)
    assert table.loc["never", "epoch_0.04"] == math.inf


def test_a_ratio_of_trainings() -> None:
    row = ratio_row(constant(0.1, math.nan), constant(0.2, 0.3))
    assert row["ratio"] == pytest.approx(0.5)
    assert (row["first_diverged"], row["second_diverged"], row["second_slow"]) == (1, 0, 0)
    assert row["second_median"] == pytest.approx(0.25)


def directions() -> pd.DataFrame:
    rows = [
        {"seed": seed, "epoch": epoch, "statistics": "batch", "direction": name, "error": error + seed}
        | {"scaled_error": error + seed, "cosine": 0.5, "pcg_iterations": 5000 if seed == 2 else 10}
        for seed in range(3)
        for epoch in (0, 1)
        for name, error in (("one_level", 0.5), ("two_level", 0.25 * epoch))
    ]
    return pd.DataFrame(rows)


def test_directions_over_seeds() -> None:
    table = direction_table(directions()).set_index(["statistics", "epoch", "direction"])
    row = table.loc[("batch", 1, "two_level")]
    assert row["scaled_error"] == row["error"] == pytest.approx(1.25)  # the mean, and the median
    half_width = row["scaled_error_high"] - row["scaled_error"]
    assert half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert (row["error_low"], row["error_high"]) == (0.25, 2.25)
    interval = over_seeds(directions(), ["statistics", "epoch", "direction"], "cosine")
    assert set(interval["cosine"]) == {0.5}
    assert (row["pcg_iterations"], row["pcg_iterations_high"]) == (10, math.inf)  # one of three was stopped
    text = change_markdown(directions())
    assert "-0.5000 [-0.5000, -0.5000]" in text
    assert "-0.2500 [-0.2500, -0.2500]" in text
    assert "0.0 [0.0, 0.0]" in text  # of the seeds with which both converge


def write_measurement(path: Path, complete: bool = True, label: str | None = "preview") -> None:
    path.mkdir(parents=True)
    pd.DataFrame({"seed": [1], "distance": [0.5]}).to_csv(path / "coarse.csv", index=False)
    (path / "provenance.json").write_text(json.dumps({"complete": complete, "label": label}))


def test_measurements(tmp_path: Path) -> None:
    home = tmp_path / "microscope" / "kfac"
    write_measurement(home / "paper" / "seed=1")
    write_measurement(home / "paper" / "seed=2", complete=False)
    frame = load_measurement(tmp_path, "microscope", "kfac/paper", "coarse")
    assert frame["distance"].tolist() == [0.5]
    assert labels_of(frame) == ["preview"]
    with pytest.raises(NoRecordsError, match="make study"):
        load_measurement(tmp_path, "microscope", "sgd/paper", "coarse")
    with pytest.raises(RecordError, match=r"spectrum\.csv does not exist, although"):
        load_measurement(tmp_path, "microscope", "kfac/paper", "spectrum")
    (home / "paper" / "seed=1" / "coarse.csv").write_text("")
    with pytest.raises(RecordError, match="is damaged"):
        load_measurement(tmp_path, "microscope", "kfac/paper", "coarse")
