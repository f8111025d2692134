"""A grid search: the table, the rule that chooses a winner, the text, the figure of its learning rates."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.figures import NoRecordsError, RecordError, save_figure
from experiments.figures.grid import Point, grid_markdown, grid_table, is_decided, winners, winning_runs
from experiments.figures.sensitivity import at_paper_settings, best_of_each_rate, sensitivity_figure

PROBLEM = "deep_linear_mlp"
Write = Callable[..., Path]
SEEDS = [0, 1, 2, 3, 4]


def constant(*losses: float) -> Callable[[pd.DataFrame], None]:
    """Each seed's training loss in every epoch but the first."""

    def edit(curves: pd.DataFrame) -> None:
        later = curves["epoch"] > 1
        curves.loc[later, "train_loss"] = [losses[seed] for seed in curves.loc[later, "seed"]]

    return edit


def point(variant: str = "paper", optimizer: str = "sgd", **settings: float) -> Point:
    return Point(optimizer, variant, SEEDS, settings or {"lr": 1e-3})


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., pd.DataFrame]:
    return lambda *points: grid_table(tmp_path / "runs", PROBLEM, points)


def test_final_losses_are_means_of_the_last_five_epochs(
    write_record: Write, table: Callable[..., pd.DataFrame]
) -> None:
    def edit(curves: pd.DataFrame) -> None:
        last = curves["epoch"] > 3
        curves["train_loss"] = 100.0
        curves.loc[last, "train_loss"] = curves.loc[last, "epoch"] + curves.loc[last, "seed"] ** 2

    write_record("sgd", epochs=8, edit=edit)
    (row,) = table(point()).to_dict("records")
    losses = [6 + seed**2 for seed in SEEDS]
    interval = stats.ttest_1samp(losses, 0).confidence_interval()
    assert (row["median"], row["mean"], row["lowest"], row["highest"]) == (10, 12, 6, 22)
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert (row["seeds"], row["diverged"], row["status"]) == (5, 0, "complete")


def test_no_configuration_wins_by_diverged_seeds(
    write_record: Write, table: Callable[..., pd.DataFrame]
) -> None:
    write_record("sgd", variant="lr=1.0", edit=constant(1e-3, 1e-3, math.nan, math.inf, math.nan))
    write_record("sgd", variant="lr=0.1", edit=constant(1e-3, 1e-3, 0.9, math.nan, math.nan))
    write_record("sgd", edit=constant(0.5, 0.5, 0.5, 0.5, 0.6))
    found = table(point("lr=1.0", lr=1.0), point("lr=0.1", lr=0.1), point())
    assert list(found["variant"]) == ["paper", "lr=0.1", "lr=1.0"]
    assert list(found["median"]) == [0.5, 0.9, math.inf]
    assert list(found["diverged"]) == [0, 2, 3]
    assert list(found["mean"])[2] == pytest.approx(1e-3)  # which would have won
    assert winners(found)["sgd"]["variant"] == "paper"
    assert winners(found.tail(1)) == {}


def test_ties_go_to_fewer_diverged_seeds_then_to_the_first(
    write_record: Write, table: Callable[..., pd.DataFrame]
) -> None:
    write_record("sgd", variant="a", edit=constant(0.5, 0.5, 0.5, math.nan, math.nan))
    for variant in ("b", "c"):
        write_record("sgd", variant=variant, edit=constant(0.5, 0.5, 0.5, 0.6, 0.6))
    found = table(point("a"), point("c"), point("b"))
    assert list(found["variant"]) == ["c", "b", "a"]


def test_what_is_not_there_has_a_status_and_no_numbers(
    write_record: Write, write_resnet: Write, table: Callable[..., pd.DataFrame], tmp_path: Path
) -> None:
    write_record("sgd", variant="unfinished", complete=False)
    failed = tmp_path / "runs" / PROBLEM / "sgd" / "failed"
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"error": "ValueError: no"}))
    write_record("sgd", variant="fewer", seeds=[0, 1])
    found = table(point(), point("unfinished"), point("failed"), point("fewer"))
    assert found[["median", "mean", "diverged"]].isna().to_numpy().all()
    assert dict(zip(found["variant"], found["status"], strict=True)) == {
        "paper": "missing",
        "unfinished": "incomplete",
        "failed": "failed: ValueError: no",
        "fewer": "incomplete",
    }
    assert not is_decided(found, "sgd")
    assert is_decided(found.query("variant == 'failed'"), "sgd")
    with pytest.raises(NoRecordsError, match="no configuration of the grid has a finite loss"):
        winning_runs(tmp_path / "runs", PROBLEM, found)
    text = grid_markdown("grid", found, None)
    assert "failed: ValueError: no" in text
    assert "| none " in text
    assert "0 of 4" in text


def test_a_damaged_record_is_an_error(write_record: Write, table: Callable[..., pd.DataFrame]) -> None:
    (write_record("sgd") / "curves.csv").write_text("seed,epoch\n")
    with pytest.raises(RecordError, match="lacks the columns"):
        table(point())


def test_records_of_single_seeds_and_their_label(write_resnet: Write, tmp_path: Path) -> None:
    write_resnet("kfac")
    write_resnet("kfac", variant="lr=0.1", seeds=[0, 1])
    points = [point("paper", "kfac"), point("lr=0.1", "kfac", lr=0.1)]
    found = grid_table(tmp_path / "runs", "resnet20_cifar10_preview", points)
    assert list(found["status"]) == ["complete", "incomplete"]
    assert str(found["label"].iloc[0]).startswith("preview")
    best = winning_runs(tmp_path / "runs", "resnet20_cifar10_preview", found)
    assert "**preview: ResNet20" in grid_markdown("grid", found, best)


@pytest.fixture
def full(write_record: Write, table: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """Two optimizers, two learning rates, and damping for one of them."""
    losses = {"paper": 0.2, "lr=0.1": 0.3, "damping=1": 0.1, "damping=1,lr=0.1": math.nan}
    points = []
    for optimizer in ("kfac", "sgd"):
        for variant, loss in losses.items():
            if optimizer == "kfac" or "damping" not in variant:
                factor = 1 if optimizer == "kfac" else 2
                seeds = [factor * loss + 0.01 * seed**factor for seed in SEEDS]
                write_record(optimizer, variant=variant, edit=constant(*seeds))
                settings = {"lr": 0.1 if "lr" in variant else 0.001}
                if optimizer == "kfac":
                    settings["damping"] = 1.0 if "damping" in variant else 0.01
                points.append(point(variant, optimizer, **settings))
    return table(*points)


def test_the_winners_and_their_paired_differences(full: pd.DataFrame, tmp_path: Path) -> None:
    assert list(full["optimizer"]) == ["sgd"] * 2 + ["kfac"] * 4  # the legend's order
    assert list(full["damping"].isna()) == [True] * 2 + [False] * 4
    best = winning_runs(tmp_path / "runs", PROBLEM, full)
    assert {name: run.variant for name, run in best.items()} == {"sgd": "paper", "kfac": "damping=1"}
    text = grid_markdown("the grid", full, best)
    sgd, kfac = (np.array([f * a + 0.01 * s**f for s in SEEDS]) for f, a in ((2, 0.2), (1, 0.1)))
    interval = stats.ttest_rel(kfac, sgd).confidence_interval()
    pair = f"{(kfac - sgd).mean():.4f} [{interval.low:.4f}, {interval.high:.4f}]"
    assert f"| K-FAC (one level) - SGD | {pair} " in text
    assert "lr 0.001, damping 1 " in text
    assert "(so far)" not in text
    assert "5 of 5" in text


def test_learning_rates(full: pd.DataFrame) -> None:
    assert list(best_of_each_rate(full)["variant"]) == ["damping=1", "lr=0.1", "paper", "lr=0.1"]
    assert list(at_paper_settings(full)["variant"]) == ["paper", "lr=0.1", "paper", "lr=0.1"]


def test_a_figure_of_learning_rates_shows_what_diverged_and_what_is_missing(full: pd.DataFrame) -> None:
    table = full.query("variant != 'lr=0.1' or optimizer == 'sgd'").copy()
    table.loc[table["variant"] == "paper", ["median", "status"]] = [math.nan, "missing"]
    left, right = sensitivity_figure(table, "MLP").axes
    legend = left.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["SGD", "K-FAC (one level) (5 seeds diverged)"]
    bars = dict(zip(("SGD", "K-FAC"), left.containers, strict=True))["K-FAC"]
    height = np.asarray(bars.lines[0].get_ydata())  # pyright: ignore
    assert np.isfinite(height).all()
    assert height[1] == pytest.approx(1.5 * 0.76)  # above every finite loss
    assert "2 of 5 configurations not trained" in right.get_title()
    with pytest.raises(ValueError, match="no configuration has a finite median"):
        sensitivity_figure(table.query("median != median"), "MLP")


def test_without_the_paper_s_settings_there_is_one_panel(full: pd.DataFrame) -> None:
    table = full.assign(variant="epochs=3," + full["variant"])
    (axes,) = sensitivity_figure(table, "MLP").axes
    assert "best of the grid" in axes.get_title()


@pytest.mark.filterwarnings("error")
def test_extreme_losses_still_draw(full: pd.DataFrame, tmp_path: Path) -> None:
    for extreme in (0.0, 3e38):
        changed = full.assign(lowest=full["lowest"].clip(upper=extreme), highest=max(extreme, 1.0))
        save_figure(sensitivity_figure(changed, "MLP"), tmp_path, "extreme")


def test_a_record_of_other_settings_is_refused(
    write_record: Write, table: Callable[..., pd.DataFrame]
) -> None:
    write_record("sgd")
    config = {"optimizer": {"name": "sgd", "lr": 0.1}, "training": {"epochs": 100, "new_option": 1}}
    table(point()._replace(config=config))  # what an older record does not know is no contradiction
    with pytest.raises(RecordError, match=r"paper was trained with training\.epochs=100: move it away"):
        table(point()._replace(config={"training": {"epochs": 20}}))


def test_more_seeds_than_asked_for(write_record: Write, table: Callable[..., pd.DataFrame]) -> None:
    write_record("sgd", seeds=range(6), edit=constant(1, 1, 1, 1, 1, 100))
    (row,) = table(point()).to_dict("records")
    assert (row["status"], row["seeds"], row["highest"]) == ("complete", 5, 1)


def test_failures_with_any_text(tmp_path: Path, table: Callable[..., pd.DataFrame]) -> None:
    home = tmp_path / "runs" / PROBLEM / "sgd" / "paper" / "seed=1"
    home.mkdir(parents=True)
    (home / "failure.json").write_text(json.dumps({"error": "a | b"}))
    assert "failed: a \\| b" in grid_markdown("grid", table(point()), None)
    (home / "failure.json").write_text("{")
    with pytest.raises(RecordError, match=r"failure\.json is damaged .*: remove it"):
        table(point())


def test_settings_that_are_no_numbers(write_record: Write, table: Callable[..., pd.DataFrame]) -> None:
    write_record("kfac")
    settings: dict[str, Any] = {"inverse": "eigen", "kl_clip": None}
    found = table(Point("kfac", "paper", SEEDS, settings))
    assert "inverse eigen, kl_clip none" in grid_markdown("grid", found, None)
