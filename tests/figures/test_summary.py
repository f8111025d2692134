import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from experiments.figures import load_runs
from experiments.figures.summary import end_table, loss_table, summary_markdown
from experiments.figures.verdict import RULE, check_rule, verdict

PROBLEM = "deep_linear_mlp"


def scale(factor: float) -> Callable[[pd.DataFrame], None]:
    def edit(curves: pd.DataFrame) -> None:
        curves["train_loss"] *= factor

    return edit


def write_with_two_level(
    write_record: Callable[..., Path], two_level: Callable[[pd.DataFrame], None]
) -> None:
    for name in ("sgd", "adam", "kfac"):
        write_record(name)
    write_record("two_level_kfac", edit=two_level)


def test_reproduced(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all()
    write_all(root="results", edit=scale(1.15))
    runs, reference = (load_runs(tmp_path / root, PROBLEM) for root in ("runs", "results"))
    assert [check.answer for check in check_rule(runs, reference)] == ["yes"] * 8
    text = summary_markdown(runs, reference)
    assert RULE in text
    assert "**Verdict: reproduced.**" in text


def test_loss_table_numbers(write_record: Callable[..., Path], tmp_path: Path) -> None:
    def edit(curves: pd.DataFrame) -> None:
        losses = [0.1, 0.2, 0.3, 0.7, math.nan]
        curves["train_loss"] = [losses[seed] for seed in curves["seed"]]

    write_record("kfac", edit=edit, epochs=5)
    write_record("kfac", root="results", edit=scale(2), epochs=100)
    runs, reference = (load_runs(tmp_path / root, PROBLEM) for root in ("runs", "results"))
    losses = loss_table(runs, reference).set_index("epoch")
    row = losses.loc[5]
    assert row["median"] == 0.3
    assert row["mean"] == pytest.approx(0.325)
    half_width = 3.182446305284263 * math.sqrt(0.2075 / 3) / 2  # t quantile of 3 degrees of freedom
    assert row["low"] == pytest.approx(0.325 - half_width)
    assert row["high"] == pytest.approx(0.325 + half_width)
    assert (row["diverged"], row["slow"]) == (1, 1)
    assert row["committed"] == reference["kfac"].table("train_loss").loc[5, 2]
    assert losses.loc[100, ["median", "mean", "diverged", "slow"]].isna().all()


def test_end_table_numbers(write_record: Callable[..., Path], tmp_path: Path) -> None:
    path = write_record("kfac", epochs=40)
    write_record("kfac", root="results", epochs=20)
    runs, reference = (load_runs(tmp_path / root, PROBLEM) for root in ("runs", "results"))
    end = end_table(runs, reference).iloc[0]
    curves = pd.read_csv(path / "curves.csv")
    assert end["epochs"] == 40
    assert end["seconds"] == pytest.approx(0.5 * 40 / 0.25**0.5)
    assert end["median"] == pytest.approx(statistics.median(curves.query("epoch == 40")["train_loss"]))
    assert math.isnan(end["committed"])


@pytest.mark.parametrize(("factor", "answer"), [(1.19, "yes"), (1.21, "no"), (0.81, "yes")])
def test_tolerance(write_all: Callable[..., None], tmp_path: Path, factor: float, answer: str) -> None:
    write_all(edit=scale(factor))
    write_all(root="results")
    runs, reference = (load_runs(tmp_path / root, PROBLEM) for root in ("runs", "results"))
    assert {check.answer for check in check_rule(runs, reference)[:-1]} == {answer}


@pytest.mark.parametrize(("ratio", "answer"), [(0.79, "yes"), (0.81, "no")])
def test_gain_over_one_level(
    write_record: Callable[..., Path], tmp_path: Path, ratio: float, answer: str
) -> None:
    one_level = load_runs(write_record("kfac").parents[2], PROBLEM)["kfac"].curves

    def edit(curves: pd.DataFrame) -> None:
        curves["train_loss"] = ratio * one_level["train_loss"]

    write_record("two_level_kfac", edit=edit)
    runs = load_runs(tmp_path / "runs", PROBLEM)
    assert check_rule(runs)[-1].answer == answer


def test_diverged_seeds_cannot_win(write_record: Callable[..., Path], tmp_path: Path) -> None:
    def diverge(curves: pd.DataFrame) -> None:
        curves.loc[curves["seed"].isin([2, 3, 4]) & (curves["epoch"] > 50), "train_loss"] = math.nan

    write_with_two_level(write_record, diverge)
    runs = load_runs(tmp_path / "runs", PROBLEM)
    checks = check_rule(runs)
    assert verdict(checks) == "not reproduced"
    assert checks[-1].detail.startswith("inf against")


def test_all_diverged_against_a_diverged_reference_is_no_match(
    write_all: Callable[..., None], tmp_path: Path
) -> None:
    write_all(edit=scale(math.nan))
    runs = load_runs(tmp_path / "runs", PROBLEM)
    assert {check.answer for check in check_rule(runs, runs)} == {"no"}


def test_shortened_run_is_not_decided(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all(epochs=30)
    write_all(root="results")
    runs, reference = (load_runs(tmp_path / root, PROBLEM) for root in ("runs", "results"))
    text = summary_markdown(runs, reference)
    assert "**Verdict: not decided.**" in text
    assert "run has 30 epochs, rule needs 100" in text
    by_question = {check.question: check.answer for check in check_rule(runs, reference)}
    assert by_question["SGD, epoch 20: within 20% of the committed median"] == "yes"


def test_without_reference(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all()
    runs = load_runs(tmp_path / "runs", PROBLEM)
    checks = check_rule(runs)
    assert verdict(checks) == "not decided"
    assert checks[-1].answer == "yes"
    assert set(loss_table(runs, {})["committed"].isna()) == {True}


def test_missing_optimizer_is_not_decided(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("kfac")
    checks = check_rule(load_runs(tmp_path / "runs", PROBLEM))
    assert verdict(checks) == "not decided"
    assert checks[-1].detail == "no record of two-level K-FAC"


@pytest.mark.parametrize("settings", [{"label": "reduced"}, {"variant": "optimizer.lr=0.01"}])
def test_other_settings_are_not_decided(
    write_all: Callable[..., None], tmp_path: Path, settings: dict[str, str]
) -> None:
    write_all(**settings)
    runs = load_runs(tmp_path / "runs", PROBLEM, variant=settings.get("variant", "paper"))
    checks = check_rule(runs, runs)
    assert {check.answer for check in checks} == {"not decided"}
    assert next(iter(settings.values())) in checks[0].detail


def test_unknown_optimizer_has_its_row(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("shampoo")
    assert "| shampoo" in summary_markdown(load_runs(tmp_path / "runs", PROBLEM))
