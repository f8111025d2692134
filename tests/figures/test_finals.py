import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from experiments.figures import Panel, Run, final_markdown, load_runs
from experiments.figures.finals import final_table, order_table
from tests.figures.conftest import edited

PROBLEM = "resnet20_cifar10_preview"
Write = Callable[..., Path]


def ending(*losses: float) -> Callable[[pd.DataFrame], None]:
    """Gives each seed its training loss at the last epoch."""

    def edit(curves: pd.DataFrame) -> None:
        last = curves["epoch"] == max(curves["epoch"])
        curves.loc[last, "train_loss"] = [losses[seed] for seed in curves.loc[last, "seed"]]

    return edit


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, Run]]:
    return lambda variant="paper": load_runs(tmp_path / "runs", PROBLEM, variant=variant)


def test_final_numbers(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    def edit(curves: pd.DataFrame) -> None:
        ending(1.0, 1.5, 1.7, math.nan)(curves)
        peak = (curves["epoch"] == 2) & (curves["seed"] == 0)
        curves.loc[peak, "test_accuracy"] = 0.99
        curves["seconds"] = 10.0 * curves["epoch"] + curves["seed"]
        curves["nu"] = curves["epoch"] / 10
        curves["coarse_ratio"] = curves["epoch"] + curves["seed"]
        curves["coarse_indefinite"] = (curves["epoch"] > 1).astype(float)

    write_resnet("two_level_kfac", seeds=range(4), epochs=3, edit=edit)
    runs = load()
    (row,) = final_table(runs).to_dict("records")
    assert (row["seeds"], row["diverged"], row["epochs"]) == (4, 1, 3)
    interval = stats.ttest_1samp([1.0, 1.5, 1.7], 0).confidence_interval()
    assert row["train_loss_mean"] == pytest.approx(1.4)
    assert row["train_loss_low"] == pytest.approx(interval.low)
    assert row["train_loss_high"] == pytest.approx(interval.high)
    assert row["train_loss_median"] == pytest.approx(1.6)  # of 1, 1.5, 1.7 and infinity
    alive = runs["two_level_kfac"].curves.query("seed < 3")
    last = alive[alive["epoch"] == 3]
    for metric in ("train_accuracy", "test_accuracy"):
        interval = stats.ttest_1samp(last[metric], 0).confidence_interval()
        assert row[f"{metric}_mean"] == pytest.approx(last[metric].mean())
        assert row[f"{metric}_low"] == pytest.approx(interval.low)
    best = [max(of_seed["test_accuracy"]) for _, of_seed in alive.groupby("seed")]
    assert row["best_test_accuracy"] == pytest.approx(sum(best) / 3)
    assert row["best_test_accuracy"] > row["test_accuracy_mean"]
    assert row["seconds"] == pytest.approx(31)
    assert row["nu"] == pytest.approx(0.2)
    assert row["coarse_ratio"] == pytest.approx(4)
    assert row["coarse_indefinite"] == pytest.approx(2 / 3)


def test_order_by_hand(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    write_resnet("sgd", seeds=range(3), edit=ending(3.0, 3.1, 3.2))
    write_resnet("adam", seeds=range(3), edit=ending(1.0, 2.0, 3.0))
    write_resnet("kfac", seeds=range(2), edit=ending(0.9, 1.7))
    pairs = order_table(load())
    assert pairs[["lower", "higher"]].to_numpy().tolist() == [["kfac", "adam"], ["adam", "sgd"]]
    assert pairs["overlap"].tolist() == [True, True]
    assert pairs["seeds"].tolist() == [2, 3]
    # Seeds 0 and 1 differ by 0.1 and 0.3; 12.7062 is the t quantile of 1 degree of freedom.
    half_width = 12.706204736432095 * 0.1
    assert pairs.loc[0, ["difference", "low", "high"]].tolist() == pytest.approx(
        [0.2, 0.2 - half_width, 0.2 + half_width]
    )
    assert pairs.loc[1, "difference"] == pytest.approx(1.1)


def test_pairing_sees_what_overlapping_intervals_hide(
    write_resnet: Write, load: Callable[..., dict[str, Run]]
) -> None:
    write_resnet("kfac", seeds=range(3), edit=ending(1.0, 2.0, 3.0))
    write_resnet("adam", seeds=range(3), edit=ending(1.11, 2.1, 3.09))
    write_resnet("sgd", seeds=range(3), edit=ending(50.0, 50.1, 50.2))
    pairs = order_table(load()).to_dict("records")
    assert [pair["overlap"] for pair in pairs] == [True, False]
    assert 0 < pairs[0]["low"] < 0.1 < pairs[0]["high"]
    text = final_markdown(Panel("ResNet", load()))
    assert "lowest first: K-FAC (one level) 2.0000, Adam 2.1000, SGD 50.1000." in text
    assert "Neighbours whose 95% intervals overlap: K-FAC (one level) and Adam." in text
    assert "| Adam - K-FAC (one level) | yes" in text


def test_clearly_apart(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    write_resnet("kfac", edit=ending(1.0, 1.1, 1.0, 1.1, 1.0))
    write_resnet("adam", edit=ending(2.0, 2.1, 2.0, 2.1, 2.0))
    assert "No neighbours' 95% intervals overlap." in final_markdown(Panel("ResNet", load()))


def test_one_seed_has_no_interval(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    write_resnet("kfac", seeds=[0])
    write_resnet("adam", seeds=[0])
    (pair,) = order_table(load()).to_dict("records")
    assert pair["overlap"] is None
    assert math.isnan(pair["low"])
    text = final_markdown(Panel("ResNet", load()))
    assert "One seed has no interval." in text
    assert "overlap." not in text


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_diverged_seeds(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    write_resnet("kfac", seeds=range(3), edit=ending(1.0, math.nan, 1.2))
    write_resnet("adam", seeds=range(3), edit=ending(1.5, 1.6, math.inf))
    write_resnet("sgd", seeds=range(3), edit=ending(math.nan, math.nan, math.nan))
    pairs = order_table(load()).to_dict("records")
    assert [(pair["lower"], pair["higher"], pair["seeds"]) for pair in pairs] == [("kfac", "adam", 1)]
    text = final_markdown(Panel("ResNet", load()))
    assert (
        "K-FAC (one level) 1.1000 (1 of 3 seeds diverged), Adam 1.5500 (1 of 3 seeds diverged), "
        "SGD - (3 of 3 seeds diverged)." in text
    )


def test_controls_have_rows_and_no_place(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    write_resnet("sgd")
    write_resnet("adam")
    write_resnet("sgd", variant="batch_size=128")
    text = final_markdown(Panel("ResNet", load(), "committed records"), load("batch_size=128"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:5]] == ["SGD", "SGD, batch_size=128", "Adam"]
    order = text[text.index("lowest first") :]
    assert "batch_size" not in order[: order.index(".\n")]
    header = "preview: ResNet20, 5,000 images, 6 epochs; CIFAR-10 (JPEG copy); committed records"
    assert text.startswith(f"## ResNet\n\n**{header}**\n\nThe last epoch over 5 seeds.")


def test_no_label_no_header(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    write_resnet("sgd", label=None)
    assert final_markdown(Panel("ResNet", load())).startswith("## ResNet\n\nThe last epoch")


def test_a_run_with_failures_says_so(write_resnet: Write, load: Callable[..., dict[str, Run]]) -> None:
    def edit(curves: pd.DataFrame) -> None:
        curves["rejected_samples"] = curves["epoch"] * (curves["seed"] == 1)
        curves["failed_inverses"] = 2 * (curves["epoch"] > 1)
        curves.loc[
            (curves["seed"] == 1) & (curves["epoch"] == 3), ["rejected_samples", "failed_inverses"]
        ] = math.nan

    write_resnet("kfac", seeds=range(2), epochs=3, edit=edit)
    write_resnet("sgd", seeds=range(2), epochs=3)
    text = final_markdown(Panel("title", load()))
    assert "2 curvature samples that were not finite and 4 inverses that could not be computed." in text
    assert text.count("inverses that could not be computed") == 1


def test_a_run_without_failures_says_nothing(
    write_resnet: Write, load: Callable[..., dict[str, Run]]
) -> None:
    def edit(curves: pd.DataFrame) -> None:
        curves["rejected_samples"] = curves["failed_inverses"] = 0

    write_resnet("kfac", seeds=range(2), epochs=2, edit=edit)
    runs = load()
    uncounted = edited(
        runs["kfac"], lambda curves: curves.drop(columns=["rejected_samples", "failed_inverses"])
    )
    assert final_markdown(Panel("title", runs)) == final_markdown(Panel("title", {"kfac": uncounted}))
