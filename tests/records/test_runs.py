import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.records import NoRecordsError, Record, RecordError, Run, find_runs, load_runs

PROBLEM = "resnet20_cifar10_preview"
Write = Callable[..., Path]


def change(directory: Path, **values: Any) -> None:
    path = directory / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_config(directory: Path, key: str, **values: Any) -> None:
    config = json.loads((directory / "provenance.json").read_text())["config"]
    change(directory, config=config | {key: config[key] | values})


def test_seeds_are_merged_into_their_variant(
    write_resnet: Write, write_record: Write, tmp_path: Path
) -> None:
    write_resnet("sgd", seeds=[0, 2, 10])
    write_resnet("sgd", variant="batch_size=128", seeds=[0])
    run = load_runs(tmp_path / "runs", PROBLEM)["sgd"]
    assert list(run.curves["seed"].unique()) == run.seeds == [0, 2, 10]
    assert run.variant == "paper"
    assert run.replicas == [1, 1, 1]
    assert (len(run.curves), run.epochs) == (3 * 6, 6)
    assert {each.variant for each in find_runs(tmp_path / "runs", PROBLEM)} == {"paper", "batch_size=128"}
    assert run.of_seeds([2, 3]).table("seconds").equals(run.table("seconds")[[2]])
    write_record("sgd", problem="side_by_side", epochs=6, seeds=[0, 2, 10])
    together = load_runs(tmp_path / "runs", "side_by_side")["sgd"]
    assert together.replicas == [3]
    for metric in ("train_loss", "test_accuracy", "seconds"):
        assert run.table(metric).equals(together.table(metric))


def test_unfinished_seeds_are_left_out(write_resnet: Write, tmp_path: Path) -> None:
    unfinished = write_resnet("sgd", seeds=[0, 1, 2]) / "seed=1"
    write_resnet("adam", seeds=[0, 1, 2])
    change(unfinished, complete=False)
    (unfinished.with_name("seed=3")).mkdir()  # started, before its first file
    with pytest.warns(UserWarning, match="unfinished records") as warned:
        runs = load_runs(tmp_path / "runs", PROBLEM)
    assert str(unfinished) in str(warned[0].message)
    assert {name: run.seeds for name, run in runs.items()} == {"sgd": [0, 2], "adam": [0, 1, 2]}


def test_an_unfinished_seed_does_not_look_diverged(write_resnet: Write, tmp_path: Path) -> None:
    unfinished = write_resnet("sgd", seeds=[0, 1, 2]) / "seed=1"
    curves = pd.read_csv(unfinished / "curves.csv")
    curves[curves["epoch"] <= 4].to_csv(unfinished / "curves.csv", index=False)
    change(unfinished, complete=False)
    losses = load_runs(tmp_path / "runs", PROBLEM, allow_incomplete=True)["sgd"].table("train_loss")
    assert losses.shape == (4, 3)
    assert losses.notna().all(axis=None)


def test_a_seed_in_the_wrong_directory(write_resnet: Write, tmp_path: Path) -> None:
    path = write_resnet("sgd", seeds=[0])
    (path / "seed=0").rename(path / "seed=1")
    with pytest.raises(RecordError, match=r"seed=1: the record inside has the seeds \[0\]"):
        load_runs(tmp_path / "runs", PROBLEM)
    path.rename(path.parent.with_name("adam"))
    with pytest.raises(RecordError, match=r"seed=1: the record inside is of .* optimizer 'sgd'"):
        find_runs(tmp_path / "runs", PROBLEM)


def test_a_seed_that_is_there_twice(write_resnet: Write, write_record: Write, tmp_path: Path) -> None:
    write_record("sgd", problem=PROBLEM, epochs=6, seeds=[3, 4])
    own = write_resnet("sgd", seeds=[4])
    with pytest.raises(RecordError, match="seed 4 is in both") as caught:
        load_runs(tmp_path / "runs", PROBLEM)
    assert str(own / "seed=4") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", {"lr": 0.1}), ("training", {"batch_size": 1}), ("problem", {"depth": 8})],
    ids=["optimizer", "training", "problem"],
)
def test_seeds_of_other_settings_are_not_mixed(
    write_resnet: Write, tmp_path: Path, key: str, value: dict[str, Any]
) -> None:
    path = write_resnet("sgd", seeds=[0, 1])
    change_config(path / "seed=1", key, **value)
    with pytest.raises(RecordError, match=r"seed=0 and .*seed=1 were trained with different settings"):
        load_runs(tmp_path / "runs", PROBLEM)


def test_seeds_of_other_machines_are_merged(write_resnet: Write, tmp_path: Path) -> None:
    path = write_resnet("sgd", seeds=[0, 1])
    change_config(path / "seed=1", "training", autocast=True)
    change(path / "seed=1", device="some GPU")
    run = load_runs(tmp_path / "runs", PROBLEM)["sgd"]
    assert run.machines == "cpu, 1 thread / some GPU, 1 thread"


def test_a_damaged_seed_is_named(write_resnet: Write, tmp_path: Path) -> None:
    path = write_resnet("sgd", seeds=[0, 1]) / "seed=1" / "curves.csv"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(RecordError, match=r"seed=1.* last line is cut off"):
        load_runs(tmp_path / "runs", PROBLEM)


@pytest.mark.filterwarnings("ignore:skipped unfinished")
def test_hints_where_there_is_nothing(write_resnet: Write, tmp_path: Path) -> None:
    write_resnet("sgd", variant="batch_size=128", seeds=[0])
    write_resnet("sgd", variant="lr=0.1", seeds=[0], complete=False)
    command = rf"python -m experiments\.train -m problem={PROBLEM} optimizer=sgd"
    with pytest.raises(NoRecordsError, match=rf"\(there is: batch_size=128; lr=0\.1\); .*{command}"):
        load_runs(tmp_path / "runs", PROBLEM)
    with pytest.raises(NoRecordsError, match=f"no finished records.* resumes them: {command}"):
        load_runs(tmp_path / "runs", PROBLEM, variant="lr=0.1")
    with pytest.raises(NoRecordsError, match=f"no records in .*paper; make them with: {command}"):
        load_runs(tmp_path / "elsewhere", PROBLEM)


def test_a_table_masks_every_metric_of_a_seed_whose_training_loss_diverged() -> None:
    curves = pd.DataFrame(
        {
            "seed": [0, 1, 0, 1, 0, 1],
            "epoch": [1, 1, 2, 2, 3, 3],
            "train_loss": [0.5, 0.6, 0.4, math.nan, 0.3, 0.5],
            "test_loss": [math.inf, 0.7, 0.5, 0.6, 0.4, 0.5],
            "test_accuracy": [0.7, 0.6, 0.8, 0.5, 0.9, 0.5],
        }
    )
    run = Run([Record(Path("sgd/paper"), curves, {})])
    accuracy = run.table("test_accuracy")
    assert accuracy[0].tolist() == [0.7, 0.8, 0.9]
    assert accuracy[1].isna().tolist() == [False, True, True]
    assert run.table("test_loss")[0].isna().tolist() == [True, True, True]
    assert run.final_losses().isna().tolist() == [False, True]


def test_failures_are_counted_over_seeds() -> None:
    curves = pd.DataFrame({"seed": [0, 0, 1, 1], "epoch": [1, 2, 1, 2], "failed_inverses": [0, 2, 1, 1]})
    run = Run([Record(Path("kfac/paper"), curves.assign(rejected_samples=0), {})])
    assert run.failures == "3 inverses that could not be computed"
    assert Run([Record(Path("sgd/paper"), curves.drop(columns="failed_inverses"), {})]).failures == ""


def test_full_batch_losses_are_read_where_they_were_recorded(write_record: Write, tmp_path: Path) -> None:
    path = write_record("sgd", problem="side_by_side", epochs=6, seeds=[0, 1]) / "curves.csv"
    curves = pd.read_csv(path)
    curves["full_batch_loss"] = (curves["seed"] + 1).where(curves["epoch"] == 5)
    curves.loc[(curves["seed"] == 1) & (curves["epoch"] == 2), "train_loss"] = math.nan
    curves.to_csv(path, index=False)
    run = load_runs(tmp_path / "runs", "side_by_side")["sgd"]
    first, second = run.full_batch_losses(5).tolist()
    assert first == 1
    assert math.isnan(second)
    for epoch in (None, 4, 7):
        with pytest.raises(RecordError, match="no full_batch_loss of epoch"):
            run.full_batch_losses(epoch)
