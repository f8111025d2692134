from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.records import NoRecordsError, RecordError, find_runs, load_record, load_runs


def test_record_properties(write_record: Callable[..., Path]) -> None:
    record = load_record(write_record("adam", variant="lr=0.01", label="preview", epochs=3))
    assert (record.problem, record.optimizer) == ("deep_linear_mlp", "adam")
    assert (record.variant, record.label, record.complete) == ("lr=0.01", "preview", True)
    assert len(record.curves) == 5 * 3


def test_runs_of_a_problem(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("sgd", epochs=2)
    write_record("kfac", epochs=2, edit=lambda curves: curves.insert(8, "nu", 0.5))
    write_record("kfac", epochs=2, variant="optimizer.lr=0.01,seeds=[0,1]")
    runs = load_runs(tmp_path / "runs", "deep_linear_mlp")
    assert {name: len(run.curves) for name, run in runs.items()} == {"sgd": 10, "kfac": 10}
    assert {run.variant for run in runs.values()} == {"paper"}
    assert np.isfinite(runs["kfac"].table("nu").to_numpy()).sum() == 10
    assert runs["sgd"].table("nu").isna().all(axis=None)
    name = "optimizer.lr=0.01,seeds=[0,1]"
    every = find_runs(tmp_path / "runs", "deep_linear_mlp")
    assert [(run.optimizer, run.variant) for run in every] == [
        ("kfac", name),
        ("kfac", "paper"),
        ("sgd", "paper"),
    ]
    (one,) = load_runs(tmp_path / "runs", "deep_linear_mlp", variant=name).values()
    assert one.variant == name


def test_nothing_found_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(NoRecordsError, match=r"python -m experiments\.train .*deep_linear_mlp"):
        load_runs(tmp_path, "deep_linear_mlp")


def test_incomplete_records_are_skipped_with_a_warning(
    write_record: Callable[..., Path], tmp_path: Path
) -> None:
    write_record("sgd", epochs=2)
    path = write_record("adam", epochs=2, complete=False)
    just_started = write_record("kfac", epochs=2, complete=False)
    (just_started / "curves.csv").unlink()
    with pytest.warns(UserWarning, match="unfinished records") as warned:
        runs = load_runs(tmp_path / "runs", "deep_linear_mlp")
    assert str(path) in str(warned[0].message)
    assert set(runs) == {"sgd"}
    with pytest.warns(UserWarning, match="kfac"):
        runs = load_runs(tmp_path / "runs", "deep_linear_mlp", allow_incomplete=True)
    assert {name: run.remarks for name, run in runs.items()} == {"sgd": "", "adam": "incomplete"}


@pytest.mark.filterwarnings("ignore:skipped unfinished")
def test_only_incomplete_records(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("sgd", epochs=2, complete=False)
    with pytest.raises(NoRecordsError, match="no finished records"):
        load_runs(tmp_path / "runs", "deep_linear_mlp")


def test_diverged_seeds_are_read(write_record: Callable[..., Path]) -> None:
    def diverge(curves: pd.DataFrame) -> None:
        curves.loc[curves.index[3:5], ["train_loss", "test_loss"]] = [np.nan, np.inf]

    curves = load_record(write_record(epochs=5, edit=diverge)).curves
    assert np.isnan(curves["train_loss"].to_numpy()).sum() == 2
    assert np.isinf(curves["test_loss"].to_numpy()).sum() == 2


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "damaged"),
        (lambda text: text.splitlines()[0] + "\n", "no rows"),
        (lambda text: text[:-3], "last line is cut off"),
        (lambda text: text[: text.rindex(",")] + "\n", "not a number in every row of seconds"),
        (lambda text: text + text.splitlines()[-1] + "\n", "2 rows for seed 4, epoch 3"),
        (lambda text: text + "1,2,3,4,5,6,7,8,9,10,11\n", "damaged"),
        (lambda text: text.replace("0.", "zero.", 1), "not a number in every row of train_loss"),
        (lambda text: text.replace("train_loss", "loss"), "lacks the columns train_loss"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "seed 4.*: 3$"),
    ],
)
def test_damaged_curves(
    write_record: Callable[..., Path], change: Callable[[str], str], message: str
) -> None:
    path = write_record(epochs=3)
    rewrite(path / "curves.csv", change)
    with pytest.raises(RecordError, match=message) as caught:
        load_record(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], "not valid JSON"),
        (lambda text: "[]", "lacks 'complete"),
        (lambda text: text.replace('"training"', '"trainer"'), r"lacks 'config\.training\.epochs'"),
        (lambda text: text.replace('"epochs": 3', '"epochs": 9'), "has 3 of 9 epochs"),
        (lambda text: text.replace("[0, 1,", "[0, 1, 7,"), "seeds are"),
    ],
)
def test_damaged_provenance(
    write_record: Callable[..., Path], change: Callable[[str], str], message: str
) -> None:
    path = write_record(epochs=3)
    rewrite(path / "provenance.json", change)
    with pytest.raises(RecordError, match=message):
        load_record(path)


def test_half_a_record(write_record: Callable[..., Path], tmp_path: Path) -> None:
    path = write_record(epochs=3)
    (path / "provenance.json").unlink()
    with pytest.raises(NoRecordsError, match=r"provenance\.json does not exist"):
        load_runs(tmp_path / "runs", "deep_linear_mlp")


def test_a_record_in_the_wrong_directory(write_record: Callable[..., Path], tmp_path: Path) -> None:
    path = write_record("sgd", epochs=2)
    path.parent.rename(path.parent.with_name("adam"))
    with pytest.raises(RecordError, match="optimizer 'sgd'"):
        load_runs(tmp_path / "runs", "deep_linear_mlp")
