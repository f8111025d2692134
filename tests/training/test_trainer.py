"""The trainer's rows against a plain loop, its record, and what a diverged seed leaves."""

import json
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch

from kfac2 import TwoLevelKFAC
from kfac2.optim.first_order import SGD
from kfac2.problems import DeepLinearMLP
from kfac2.training.records import RunDirectory, write_atomically
from kfac2.training.tracking import NoTracker, WandbTracker
from kfac2.training.trainer import Training, TrainingSettings

SMALL: dict[str, Any] = {"depth": 3, "train_samples": 100, "test_samples": 30}
CONFIG = {"problem": {"name": "deep_linear_mlp"}, "optimizer": {"name": "sgd"}, "seeds": [0, 1]}
COLUMNS = [
    "seed",
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "seconds",
]


def sgd(model: torch.nn.Module, **options: object) -> SGD:
    return SGD(model, 0.01, momentum=0.9, **options)


def training(epochs: int = 3, factory=sgd, **settings) -> Training:
    return Training(DeepLinearMLP([0, 1], **SMALL), factory, TrainingSettings(epochs, 32, **settings))


def test_losses_are_means_over_the_epoch_s_samples() -> None:
    rows = training().train_epoch()
    problem = DeepLinearMLP([0, 1], **SMALL)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9)
    total, right = torch.zeros(2), torch.zeros(2)
    for inputs, targets in problem.train_batches(32):
        optimizer.zero_grad()
        output = problem.model(inputs)
        problem.losses(output, targets).sum().backward()
        optimizer.step()
        total += problem.losses(output, targets).detach() * targets.shape[1]
        right += ((output > 0) == (targets > 0.5)).sum(1)
    for r, row in enumerate(rows):
        assert list(row) == COLUMNS
        assert row["train_loss"] == pytest.approx(total[r].item() / 100, rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(right[r].item() / 100, rel=1e-6)


def test_learning_rate_follows_the_milestones() -> None:
    run = training(epochs=5, milestones=[0.4, 0.8])
    rates = [run.train_epoch()[0]["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


def test_record_is_complete_and_says_what_made_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG)
    training().run(directory, NoTracker())
    frame = pd.read_csv(directory.curves)
    assert list(frame.columns) == COLUMNS
    assert len(frame) == 2 * 3
    provenance = json.loads(directory.provenance.read_text())
    assert provenance["complete"] is True
    assert provenance["config"] == CONFIG
    assert provenance["torch_version"] == torch.__version__
    assert set(provenance) >= {"code_version", "device", "threads", "date", "replicas", "label"}
    assert {path.name for path in directory.path.iterdir()} == {"curves.csv", "provenance.json", ".lock"}


def test_a_record_of_another_configuration_is_refused(tmp_path: Path) -> None:
    training(1).run(RunDirectory(tmp_path, CONFIG), NoTracker())
    with pytest.raises(ValueError, match="another configuration"):
        RunDirectory(tmp_path, CONFIG | {"seeds": [0, 2]})


def test_two_writers_of_one_record_are_refused(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, CONFIG)
    with directory.locked(), pytest.raises(RuntimeError, match="another process is writing"):
        training(1).run(directory, NoTracker())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def disk_full(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, disk_full)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_kfac_logs_its_diagnostics() -> None:
    def factory(model, **options):
        return TwoLevelKFAC(model, 0.01, factor_interval=1, inverse_interval=2, **options)

    (row, _) = training(factory=factory).train_epoch()
    assert 0 < row["nu"] <= 1
    assert row["coarse_ratio"] > 0
    assert row["coarse_indefinite"] == 0


def test_a_diverged_seed_is_recorded_and_the_other_goes_on() -> None:
    def factory(model, **options):
        return TwoLevelKFAC(model, 0.01, factor_interval=1, inverse_interval=2, **options)

    healthy, broken = training(factory=factory), training(factory=factory)
    with torch.no_grad():
        broken.problem.model.get_parameter("layers.0.weight")[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        rows = broken.train_epoch()
    expected = healthy.train_epoch()
    assert rows[0] | {"seconds": 0} == expected[0] | {"seconds": 0}
    assert rows[1]["train_loss"] != rows[1]["train_loss"]
    assert broken.optimizer.diverged.tolist() == [False, True]


@pytest.mark.parametrize(
    "settings", [{"epochs": 0}, {"epochs": 1, "batch_size": 0}, {"epochs": 1, "milestones": [40]}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"training\."):
        TrainingSettings(**cast("dict[str, Any]", {"batch_size": 32} | settings))


def test_wandb_receives_one_offline_run_per_seed(tmp_path: Path) -> None:
    tracker = WandbTracker(directory=str(tmp_path / "tracked"))
    training(1).run(RunDirectory(tmp_path / "run", CONFIG), tracker)
    runs = list((tmp_path / "tracked" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({run.parent.name.rpartition("-")[2] for run in runs}) == 2


def test_a_wandb_failure_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(wandb, "init", broken)
    directory = RunDirectory(tmp_path / "run", CONFIG)
    with pytest.warns(UserWarning, match="W&B tracking stopped, the training goes on: no space"):
        training(2).run(directory, WandbTracker(directory=str(tmp_path)))
    assert directory.is_complete()


def test_a_rerun_that_cannot_start_keeps_the_record(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, CONFIG)
    training(1).run(directory, NoTracker())
    with directory.locked(), pytest.raises(RuntimeError, match="another process is writing"):
        training(1).run(directory, NoTracker(), rerun=True)
    assert directory.is_complete()
    training(1).run(directory, NoTracker(), rerun=True)
    assert directory.is_complete()
